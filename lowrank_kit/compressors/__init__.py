"""Methods that make a model smaller: one file each."""
