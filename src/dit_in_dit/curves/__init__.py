"""Training curves: logs, convergence, plots."""
