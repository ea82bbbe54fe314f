"""Strings to measure on: drawn from a model, or from an older version of it."""
