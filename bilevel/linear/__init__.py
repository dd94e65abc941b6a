"""Solvers of A v = b that know v ↦ A v and nothing else: no loss, no x, no y.

A file is named as the solver that it registers. Beside them `guards` has what every solver refuses
and measures alike, `lanczos` the eigenvalues that coefficients hold, `quasi_newton` inverses made
of pairs (s, A s).
"""
