"""Optimizers of either level: (y, gradient, state) ↦ (y, state), out of place.

`differentiable` has those whose steps autograd can differentiate, `torch_optim` all of torch's.
No loss is evaluated here.
"""
