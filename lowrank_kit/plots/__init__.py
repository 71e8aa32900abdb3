"""Pictures of a compression: from plain data to a file, the same file every time."""
