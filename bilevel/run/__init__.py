"""One run: what it is made of, where it is, and the generator of events that takes its steps.

`setup` has Setup and State, `batches` what draws them, `upper` the upper level, `refusals` what
cannot work together, `upper_step` one step, `warnings` what it is warned of, `evaluation` the problem's
measures, `held` those with x as it began, `engine` the loop. No file is written here and nothing is
printed.
"""

from typing import TYPE_CHECKING

from bilevel.registry.exports import exports

if TYPE_CHECKING:
    from bilevel.run.setup import Setup as Setup
    from bilevel.run.upper import Upper as Upper
else:
    __getattr__, __dir__ = exports(
        __name__, also={"Setup": "bilevel.run.setup", "Upper": "bilevel.run.upper"}
    )
