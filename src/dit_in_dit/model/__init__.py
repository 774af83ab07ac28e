"""The network; it contains no noise, loss or file access."""
