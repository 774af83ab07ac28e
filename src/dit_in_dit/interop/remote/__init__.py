"""What stands in for modules that stay at home when code travels with a saved folder (`interop.bundle`)."""
