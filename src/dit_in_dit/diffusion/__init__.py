"""Noise, targets and loss: never sees a network, only `predict(x, t, y)`."""
