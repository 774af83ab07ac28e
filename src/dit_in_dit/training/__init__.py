"""The training loop, a generator of events; it computes no metrics and draws no pictures."""
