"""Sweeps: what is varied, what Optuna makes of it, what is left."""
