"""To and from the files and classes of others."""
