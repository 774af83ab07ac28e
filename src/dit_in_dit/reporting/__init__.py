"""Plots and documents."""
