"""Inspection of a model without training: cost, shapes, hooks, launch plan."""
