"""Metrics of samples against real images."""
