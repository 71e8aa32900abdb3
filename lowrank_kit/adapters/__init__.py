"""Methods that train: one file each."""
