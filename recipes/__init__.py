"""Recipes shipped with bilevel: YAML files, run by path or by name."""
