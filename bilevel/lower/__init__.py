"""Solvers of the lower level, min over y of G(x, y): a file is named as what it registers.

`auxiliary` solves the problems beside the lower one that first-order estimators pose. What
differentiates through steps is in `unrolling`, optimizers are in `optimizers`.
"""
