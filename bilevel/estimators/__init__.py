"""Estimators of the hypergradient: one paper a file, named as what it registers.

None imports another. Derivatives come from `calculus`, which counts them.
"""
