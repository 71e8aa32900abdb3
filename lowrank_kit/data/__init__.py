"""Rows of benchmark sets and running text, from a source the user names, in the hub's own columns."""
