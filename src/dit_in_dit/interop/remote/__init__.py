"""Replacements of modules that are not exported with a saved folder's code (`interop.remote_code`)."""
