"""Samples measured against real images."""
