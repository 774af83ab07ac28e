"""Checks of a model, its training and its data."""
