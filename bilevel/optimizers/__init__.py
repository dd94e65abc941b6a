"""Optimizers of either level: (y, gradient, state) ↦ (y, state), out of place.

`differentiable` has those whose steps autograd can differentiate, `torch_optim` all of torch's;
`learned` what their options may be in the place of numbers; `schedule` and `clip` what a level does to
the rate and to the gradient before a step; `stepped` calls one and checks what it returns.
No loss is evaluated here.
"""

from typing import TYPE_CHECKING

from bilevel.registry.exports import exports

if TYPE_CHECKING:
    from bilevel.optimizers.clip import Clip as Clip
    from bilevel.optimizers.differentiable import SGD as SGD
    from bilevel.optimizers.differentiable import Adam as Adam
    from bilevel.optimizers.differentiable import AdamW as AdamW
    from bilevel.optimizers.differentiable import RMSprop as RMSprop
    from bilevel.optimizers.learned import Learned as Learned
    from bilevel.optimizers.schedule import Schedule as Schedule
    from bilevel.optimizers.torch_optim import TorchOptimizer as TorchOptimizer
else:
    __getattr__, __dir__ = exports(
        __name__,
        "optimizers",
        {
            "Clip": "bilevel.optimizers.clip",
            "Learned": "bilevel.optimizers.learned",
            "Schedule": "bilevel.optimizers.schedule",
        },
    )
