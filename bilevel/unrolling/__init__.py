"""Derivatives of lower steps: a recorded path replayed, and its adjoint step by step.

`path` replays steps with their graph; `traced` replays the trace of one; `forward_over_reverse`
takes products in forward mode; `reversible` runs momentum backwards. `estimators/unroll` chooses.
No step is chosen here and no optimizer defined.
"""
