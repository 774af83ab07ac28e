"""Numbered samples."""
