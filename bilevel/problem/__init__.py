"""What a problem is, how one is made of others, and what its losses must not do.

`protocol` is the contract; `from_modules`, `over_tasks`, `learned_start` make a problem of modules
or of another problem; `tied` gives two names of one tensor one variable; `purity` refuses losses
that are no functions of (x, y, batch). No solver, no estimator by name.
"""
