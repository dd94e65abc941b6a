"""One run: what it is made of, where it is, and the generator of events that takes its steps.

`setup` has Setup and State, `batches` what draws them, `upper` the upper level, `refusals` what
cannot work together, `upper_step` one step (`accumulation` of several hypergradients, `nonfinite` where
it fails; `replayed` from its record, `sameness` of the two), `warnings` what it is warned of, `unmoved` what is
looked at when it is over, `evaluation` the problem's measures, `targets` and
`early_stop` what is watched of them, `held` those with x as it began, `engine` the loop. No file is written here and nothing is
printed.
"""

from typing import TYPE_CHECKING

from bilevel.registry.exports import exports

if TYPE_CHECKING:
    from bilevel.run.setup import Setup as Setup
    from bilevel.run.targets import Best as Best
    from bilevel.run.targets import EarlyStop as EarlyStop
    from bilevel.run.upper import Upper as Upper
else:
    __getattr__, __dir__ = exports(
        __name__,
        also={
            "Best": "bilevel.run.targets",
            "EarlyStop": "bilevel.run.targets",
            "Setup": "bilevel.run.setup",
            "Upper": "bilevel.run.upper",
        },
    )
