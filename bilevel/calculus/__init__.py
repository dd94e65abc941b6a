"""Every derivative of the two losses, and nothing else: who takes one takes it from here.

`products` has gradients, Hessian and cross products, counted; `gauss_newton` the products without
the curvature of a model; `fixed_point_maps` the maps T with y* = T(x, y*); `finite_differences`
central differences; `precision` whether a dtype resolves them. No solver and no estimator.
"""

from bilevel.calculus.products import (
    Linearization,
    gradient_x,
    gradient_y,
    gradients,
    linearize,
    require_graph,
    scalar,
    second_order,
    through,
    value,
    vjp,
)

__all__ = [
    "Linearization",
    "gradient_x",
    "gradient_y",
    "gradients",
    "linearize",
    "require_graph",
    "scalar",
    "second_order",
    "through",
    "value",
    "vjp",
]
