"""What a problem is, how one is made of others, and what its losses must not do.

`protocol` is the contract; `from_modules`, `over_tasks`, `learned_start` make a problem of modules
or of another problem; `tied` gives two names of one tensor one variable; `purity` refuses losses
that are not functions of (x, y, batch). No solver, no estimator by name.
"""

from typing import TYPE_CHECKING

from bilevel.registry.exports import exports

if TYPE_CHECKING:
    from bilevel.problem.from_modules import FromModules as FromModules
    from bilevel.problem.learned_start import LearnedStart as LearnedStart
    from bilevel.problem.levels import Levels as Levels
    from bilevel.problem.over_tasks import OverTasks as OverTasks
    from bilevel.problem.protocol import Problem as Problem
else:
    __getattr__, __dir__ = exports(
        __name__,
        "problems",
        also={
            "FromModules": "bilevel.problem.from_modules",
            "Levels": "bilevel.problem.levels",
            "Problem": "bilevel.problem.protocol",
        },
    )
