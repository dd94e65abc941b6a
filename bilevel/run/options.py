"""Options of a run beside its components: checked alike in a recipe and as arguments of `minimize`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from bilevel.components import COMPONENT, component, faults, refusal
from bilevel.problem.autocast import NEEDS_FLOAT32
from bilevel.registry.fields import fields_of
from bilevel.run.targets import EarlyStop
from bilevel.run.upper import Upper


def _seed(value: Any) -> Any:
    if type(value) is not int or value < 0:
        raise ValueError("must be an integer ≥ 0")
    return value


Seed = Annotated[int, BeforeValidator(_seed)]
"""What every random stream of a run is derived from."""


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        raise ValueError("must be auto, cpu, cuda, cuda:N or mps")
    return text


def _autocast(value: Any) -> Any:
    if value == "float16":
        raise ValueError(
            "float16 overflows at 65,504 and needs losses that are scaled, and with them every product "
            "of second derivatives; take bfloat16, which has the range of float32"
        )
    return value


def _teams(count: int) -> int:
    if count != -1 and count < 1:
        raise ValueError("must be ≥ 1, or -1 for what is left")
    return count


@component
class Mesh:
    """The ranks of a run as `data` teams of `shard` ranks; each rank of a team has its rows of y."""

    data: Annotated[int, AfterValidator(_teams)] = -1
    """-1 is what is left: the number of ranks over `shard`."""
    shard: PositiveInt = 1
    """How many ranks hold y together, and an x of a million numbers; 1: each rank has all."""


@component
class Runtime:
    """Where a run is computed and in what precision, and by which ranks."""

    device: Annotated[str, AfterValidator(_device)] = "auto"
    """auto is the first CUDA device if there is one, else the CPU."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    autocast: Annotated[Literal["bfloat16"] | None, BeforeValidator(_autocast)] = None
    """What the products in both losses are taken in, under `torch.autocast`; all else stays in dtype."""
    compile: Literal["off", "step", "inductor"] = "off"
    """step: an upper step is recorded once and replayed without the Python around its operations, to
    the same bits, on CUDA by CUDA graphs; where it cannot be, steps are taken as with off, and a warning
    says why. inductor: its operations are compiled by TorchInductor besides, which needs a C++ compiler
    and some ten seconds; the same to rounding."""

    mesh: Mesh = Field(default_factory=Mesh)
    keep: Literal["whole", "again"] = "whole"
    """Whether the graph of a loss keeps whole variables that ranks hold together, or gathers them again."""
    timeout: PositiveFloat = 600.0
    """Seconds that a rank waits for the others in a sum before it gives up; not while the first works alone."""

    @model_validator(mode="after")
    def _autocast_needs_float32(self) -> Self:
        if self.autocast is not None and self.dtype != "float32":
            raise ValueError(NEEDS_FLOAT32)
        return self


@component
class Evaluate:
    """When the problem's own measures are taken: always after the run."""

    before: bool = True
    """Also before the first step. The run is the same without, and no measure has a `before`."""
    every: NonNegativeInt = 0
    """Also every so many steps; 0 for never."""
    held: bool = True
    """At the end also with x as it began and y trained as long: what is above that is owed to x.
    Costs the lower solves of the run again, and one evaluation."""
    figures: bool = True
    """Whether the problem draws its figures at the end."""
    stop: EarlyStop | None = None
    """When a measure that gains nothing ends the run; needs `every`."""

    @model_validator(mode="after")
    def _stop_needs_measures(self) -> Self:
        if self.stop is not None and not self.every:
            raise ValueError("stop looks at the measures of every so many steps; set every")
        return self


ARGUMENTS: Mapping[str, tuple[type[Any], str]] = {
    "steps": (Upper, "steps"),
    "device": (Runtime, "device"),
    "dtype": (Runtime, "dtype"),
    "autocast": (Runtime, "autocast"),
    "compile": (Runtime, "compile"),
    "evaluate_every": (Evaluate, "every"),
    "evaluate_held": (Evaluate, "held"),
}
"""By argument of `minimize`: the option of a recipe that it is."""


def require(**arguments: Any) -> None:
    """Raise `RecipeError` with all arguments that a recipe would not take either."""
    lines: list[str] = []
    for name, value in arguments.items():
        try:
            _adapter(name).validate_python(value)
        except ValidationError as error:
            lines += faults(error, value, name)
    if lines:
        raise refusal(lines)


@cache
def _adapter(argument: str) -> TypeAdapter[Any]:
    if argument == "seed":
        return TypeAdapter(Seed)
    cls, option = ARGUMENTS[argument]
    return TypeAdapter(fields_of(cls)[0][option].annotation, config=COMPONENT)
