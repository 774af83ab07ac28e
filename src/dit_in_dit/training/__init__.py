"""The training loop: a generator of facts. Knows no evaluation and draws no picture."""
