"""From samples and runs to numbers and findings that say how they were made."""
