"""Path, loss and samplers; the network is a function `predict(x, t, y)` here."""
