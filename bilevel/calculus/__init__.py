"""Every derivative of the two losses, and nothing else: who takes one takes it from here.

`products` has gradients, Hessian and cross products, counted; `gauss_newton` the products without
the curvature of a model; `fixed_point_maps` the maps T with y* = T(x, y*); `finite_differences`
central differences; `checkpointing` a function without its graph; `unsupported` what torch cannot differentiate; `precision` whether a dtype resolves them. No solver and no estimator.
"""

from bilevel.calculus.checkpointing import checkpointed
from bilevel.calculus.products import (
    Linearization,
    gradient_with_graph,
    gradient_with_value,
    gradient_x,
    gradient_y,
    gradients,
    linearize,
    require_graph,
    require_y,
    scalar,
    through,
    through_from,
    value,
    vjp,
)
from bilevel.calculus.unsupported import grad, second_order

__all__ = [
    "Linearization",
    "checkpointed",
    "grad",
    "gradient_with_graph",
    "gradient_with_value",
    "gradient_x",
    "gradient_y",
    "gradients",
    "linearize",
    "require_graph",
    "require_y",
    "scalar",
    "second_order",
    "through",
    "through_from",
    "value",
    "vjp",
]
