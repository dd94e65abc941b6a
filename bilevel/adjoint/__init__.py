"""The adjoint system (∂²yy G + damping · I) v = ∇y F along a run: where a solve starts, when it stops.

`starts` makes a start of past adjoints, `stopping` asks for an error of the hypergradient. Linear
solvers know nothing of it.
"""
