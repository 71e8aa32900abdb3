"""Judging a model: metrics with their standard errors, as records."""
