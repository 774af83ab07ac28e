"""The functions that `import dit_in_dit` offers, over what the commands call."""
