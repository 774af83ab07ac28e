"""Import from and export to the files and classes of other projects."""
