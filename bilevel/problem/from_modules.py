"""A problem from two `nn.Module`s, for people who think in modules rather than in dicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import tree
from bilevel.errors import ProblemError
from bilevel.problem.protocol import OPTIONAL
from bilevel.rng import Streams
from bilevel.types import Params


@dataclass(frozen=True)
class Bound:
    """A module with its trainable parameters replaced: call it, or read `parameters`."""

    module: nn.Module
    parameters: Params

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _holding(self.module, self.parameters):
            return self.module(*args, **kwargs)


@contextmanager
def _holding(module: nn.Module, values: Params) -> Iterator[None]:
    """The module with some parameters or buffers replaced, wherever it holds them, and put back.

    Differs from `torch.func.functional_call`, which gives a layer that stands under two names a
    plain tensor back, and leaves a recurrent layer's list of flat weights as it was replaced.
    """
    by_id: dict[int, Any] = {id(_held(module, name)): value for name, value in values.items()}
    before = [
        (owner, [(held, dict(held)) for held in _tables(owner)], vars(owner).get("_flat_weights"))
        for owner in module.modules()
    ]
    try:
        for owner, tables, flat in before:
            for held, own in tables:
                if any(id(p) in by_id for p in own.values()):
                    held.update((n, by_id.get(id(p), p)) for n, p in own.items())
            if flat is not None:
                vars(owner)["_flat_weights"] = [by_id.get(id(p), p) for p in flat]
        yield
    finally:
        for owner, tables, flat in before:
            for held, own in tables:
                held.update(own)
            if flat is not None:
                vars(owner)["_flat_weights"] = flat


def _tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where a module holds its own parameters and buffers."""
    return module._parameters, module._buffers


def _held(module: nn.Module, name: str) -> Tensor | None:
    path, _, leaf = name.rpartition(".")
    parameters, buffers = _tables(module.get_submodule(path))
    return parameters[leaf] if leaf in parameters else buffers[leaf]


ModuleLoss = Callable[[Bound, Bound, Any], Tensor]
"""A loss of (upper, lower, batch), where upper and lower are called as the modules are."""


@dataclass(frozen=True)
class FromModules:
    """The problem whose variables are the trainable parameters of two modules.

    x and y are the parameters with `requires_grad`; frozen ones and buffers stay in the modules,
    which are never written to: `store(x, y)` puts a result into them when you ask for it.

    >>> import itertools, torch
    >>> penalty, model = nn.ParameterDict({"log": torch.zeros(())}), nn.Linear(3, 1)
    >>> data = torch.randn(8, 3), torch.randn(8, 1)
    >>> def fit(upper, lower, batch):
    ...     return ((lower(batch[0]) - batch[1]) ** 2).mean()
    >>> def regularised(upper, lower, batch):
    ...     size = sum((p**2).sum() for p in lower.parameters.values())
    ...     return fit(upper, lower, batch) + upper.parameters["log"].exp() * size
    >>> problem = FromModules(
    ...     penalty, model, fit, regularised,
    ...     make_upper_batches=lambda stream: itertools.repeat(data),
    ...     make_lower_batches=lambda stream: itertools.repeat(data),
    ... )
    """

    upper: nn.Module
    lower: nn.Module
    upper_objective: ModuleLoss
    lower_objective: ModuleLoss
    make_upper_batches: Callable[[torch.Generator], Iterator[Any]]
    make_lower_batches: Callable[[torch.Generator], Iterator[Any]]
    optional: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """Optional methods of a problem by name (`bilevel.problem.protocol.OPTIONAL`), such as
    {"evaluate": ...}. `evaluate` and `figures` are called with (upper, lower) as the losses are,
    the others with dicts of parameters."""

    def __post_init__(self) -> None:
        own = [name for name in self.optional if name not in OPTIONAL or name == "place"]
        if own:
            known = ", ".join(name for name in OPTIONAL if name != "place")
            raise ProblemError(
                f"FromModules(optional=...): {own[0]!r} is not an optional method that modules can "
                f"be given; expected one of {known}"
            )

    def __getattr__(self, name: str) -> Any:
        # only what was given may be found here
        if name not in OPTIONAL or name not in vars(self).get("optional", {}):
            raise AttributeError(name)
        method = self.optional[name]
        if name in ("evaluate", "figures"):
            return lambda x, y: method(Bound(self.upper, x), Bound(self.lower, y))
        return method

    def init(self, streams: Streams) -> tuple[Params, Params]:
        return tree.clone(_trainable(self.upper, "upper")), tree.clone(
            _trainable(self.lower, "lower")
        )

    def upper_loss(self, x: Params, y: Params, batch: Any) -> Tensor:
        return self.upper_objective(Bound(self.upper, x), Bound(self.lower, y), batch)

    def lower_loss(self, x: Params, y: Params, batch: Any) -> Tensor:
        return self.lower_objective(Bound(self.upper, x), Bound(self.lower, y), batch)

    def upper_batches(self, stream: torch.Generator) -> Iterator[Any]:
        return self.make_upper_batches(stream)

    def lower_batches(self, stream: torch.Generator) -> Iterator[Any]:
        return self.make_lower_batches(stream)

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Frozen parameters and buffers follow the run to its device and dtype."""
        self.upper.to(device, dtype)
        self.lower.to(device, dtype)

    @torch.no_grad()
    def store(self, x: Params, y: Params) -> None:
        """Write x and y into the modules' own parameters."""
        for module, params in ((self.upper, x), (self.lower, y)):
            for name, entry in params.items():
                module.get_parameter(name).copy_(entry)


def _trainable(module: nn.Module, level: str) -> Params:
    """Parameters with `requires_grad`; tied ones once, under their first name."""
    found: Params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not found:
        raise ProblemError(
            f"the {level} module has no trainable parameters; call requires_grad_() on those "
            "that are variables"
        )
    return found
