"""The adjoint system (∂²yy G + damping · I) v = ∇y F along a run: start, solve, stop, bound.

`starts` makes a start of past adjoints, `stopping` asks for an error of the hypergradient, `solve`
puts them and a preconditioner together with a linear solver, which knows nothing of it; `bound`
says how far h is off.
"""
