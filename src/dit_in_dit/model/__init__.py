"""The network: knows no noise, loss or file."""
