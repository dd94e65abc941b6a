"""K-FAC for whatever linear layers the lower loss has. Martens and Grosse (2015), arXiv:1503.05671.
Its eigenvalues replaced by a diagonal: EKFAC, George et al. (2018), arXiv:1806.03884, sec. 3.

Unlike there, the factor of the outputs is the loss's own curvature in them, by random probes, and
not the covariance of gradients, which would need the likelihood that the loss stands for; and the
damping is added to the Kronecker product in its eigenbasis, not split over its factors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bilevel import ranks, rng, tree
from bilevel.calculus import grad, value
from bilevel.components import component
from bilevel.preconditioners.rebuild import RebuildRule
from bilevel.types import Matvec, Params, Point, System


@component
class KFAC:
    """M = A ⊗ S + λ I for each weight of a linear layer, a multiple of I for every other entry of y.

    A = mean of a aᵀ over the inputs a of the layer (with a 1 where its bias is in y too), S = sum
    over samples of ∂²G/∂s² for its outputs s. Found while G is evaluated: a weight is an entry of
    y that meets `torch.nn.functional.linear`, or `@` with the samples on the left, as it is or
    transposed. λ = system damping + `damping` · the mean eigenvalue of A ⊗ S: too small a value
    makes the directions that M misses expensive; 0.1 was a fair middle on small networks. A
    penalty on y that outweighs A ⊗ S is not seen. Other entries get the mean of |diagonal| that
    random signs find. Symmetric positive definite; exact up to λ for one layer whose ∂²G/∂s² is
    the same for all samples.

    `eigenvalues: diagonal` (EKFAC) keeps the eigenvectors of A ⊗ S and replaces its eigenvalues by
    the diagonal of the weight's own block of ∂²yy G in them, Σ over samples of (a · u)² wᵀ(∂²G/∂s²)w
    for u ⊗ w, from the same probes; negative ones count as 0. Of all diagonals there it is nearest
    to the block. No product more, but the probes' are kept while it is built.

    Building costs 1 gradient and `probes` HVPs, twice as many where an entry of y is in no layer,
    and in³ + out³ flops a layer; the off-diagonal of S has a variance of O(1 / (probes ·
    samples)). Over several ranks A, S and the diagonal are sums over the rows of all, and the signs those
    of one rank. It is built at the first call, and again when the iterations spent beyond the fewest
    since then exceed that. Samples have to be rows of the input, none touching another (no batch
    normalisation in training mode).
    """

    needs_whole: ClassVar[str] = "preconditioner: hutchinson or diagonal"
    probes: PositiveInt = 8
    damping: PositiveFloat = 0.1
    eigenvalues: Literal["product", "diagonal"] = "product"
    seed: int = 0

    def init(self, at: Point) -> dict[str, Any]:
        return {"built": 0, "layers": {}, "rest": {}, **RebuildRule().state()}

    def prepare(self, system: System, state: dict[str, Any]) -> tuple[Matvec, dict[str, Any]]:
        rule = RebuildRule(state["fewest"], state["excess"]).after(system.spent)
        if not state["built"] or rule.excess > 2 * self.probes + 1:
            stream = rng.stream(self.seed, f"kfac.{state['built']}")
            layers = self._layers(system, stream)
            covered = {name for n, layer in layers.items() for name in (n, layer["bias"])}
            others = [name for name in system.b if name not in covered]
            rest = _curvatures(system, others, self.probes, stream) if others else {}
            state = {"built": state["built"] + 1, "layers": layers, "rest": rest}
            rule = RebuildRule()
        layers, rest = state["layers"], state["rest"]
        return (lambda r: _apply(layers, rest, r)), {**state, **rule.state()}

    def _layers(self, system: System, stream: torch.Generator) -> dict[str, Any]:
        """The factors of each layer in which G bends, and what is added to their product."""
        layers, keep = {}, self.eigenvalues == "diagonal"
        for name, seen in _probed(system, self.probes, stream, keep).items():
            (a, U), (s, W) = _spectrum(seen.A / seen.calls), _spectrum(seen.S)
            values = seen.diagonal(U, W).clamp(min=0.0) if keep else s[:, None] * a
            mean = float(values.mean())
            if mean > 0:
                layers[name] = {
                    "bias": seen.bias,
                    "transposed": int(seen.transposed),
                    "values": values + system.damping + self.damping * mean,
                    "inputs": U,
                    "outputs": W,
                }
        return layers


def _apply(layers: dict[str, Any], rest: dict[str, float], r: Params) -> Params:
    """M⁻¹ r, layer by layer."""
    found = {name: r[name] / curvature for name, curvature in rest.items()}
    for name, layer in layers.items():
        bias = layer["bias"]
        R = r[name].T if layer["transposed"] else r[name]
        R = torch.cat([R, r[bias][:, None]], dim=1) if bias else R
        U, W = layer["inputs"], layer["outputs"]
        solved = W @ ((W.T @ tree.wide(R) @ U) / layer["values"]) @ U.T
        solved = solved.to(r[name].dtype)
        if bias:
            found[bias], solved = solved[:, -1].contiguous(), solved[:, :-1]
        found[name] = (solved.T if layer["transposed"] else solved).contiguous()
    return {name: found[name] for name in r}


def _spectrum(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, none below zero, and eigenvectors of the symmetric part."""
    values, vectors = torch.linalg.eigh((factor + factor.T) / 2)
    return values.clamp(min=0.0), vectors


def _curvatures(
    system: System, names: list[str], probes: int, stream: torch.Generator
) -> dict[str, float]:
    """The mean of the diagonal of ∂²yy G + damping · I over each entry, its size alone; > 0."""
    total = dict.fromkeys(names, 0.0)
    for _ in range(probes):
        signs = tree.map(lambda p: rng.signs(p, stream), system.b)
        bent = tree.mul(signs, system.matvec(signs))
        for name in names:
            total[name] += float(tree.wide(bent[name]).mean()) / probes
    least = 1e-6 * max(abs(curvature) for curvature in total.values()) or 1.0
    return {name: max(abs(curvature), least) for name, curvature in total.items()}


_Draws = list[tuple[Tensor, Tensor]]
"""(signs, their product with ∂²G/∂s²), a row a sample, divided by √(their number)."""


@dataclass
class _Seen:
    """What met one weight: Σ over calls of the mean of a aᵀ, and of the curvature of the outputs."""

    bias: str
    transposed: bool
    A: Tensor
    S: Tensor
    kept: list[tuple[Tensor, _Draws]]
    """The inputs and draws of each call."""
    calls: int = 1

    def diagonal(self, U: Tensor, W: Tensor) -> Tensor:
        """[out, in]: (w ⊗ u)ᵀ (Σ over samples of aaᵀ ⊗ ∂²G/∂s²) (w ⊗ u) for columns u, w of U, W."""
        found = torch.zeros(len(W), len(U), dtype=U.dtype, device=U.device)
        for inputs, draws in self.kept:
            along = sum((signs @ W) * (product @ W) for signs, product in draws)
            found += torch.as_tensor(along).T @ (inputs @ U).square()
        return ranks.here().sum_of(found)


@dataclass
class _Call:
    weight: str
    bias: str
    transposed: bool
    inputs: Tensor
    shift: Tensor


def _probed(system: System, probes: int, stream: torch.Generator, keep: bool) -> dict[str, _Seen]:
    """The factors of every layer, from one graph of ∂G/∂s; `probes` products with ∂²G/∂s²."""
    loss, mode = system.losses.lower, _LinearLayers(tree.leaves(system.at.y))
    with torch.enable_grad():
        with mode:
            output = value(loss, tree.detach(system.at.x), mode.y)
        shifts = [call.shift for call in mode.calls]
        if not shifts:
            return {}
        slopes = grad(loss, [output], shifts, create_graph=True)
    loss.counts.gradients += 1
    curvatures = [tree.wide(shift.new_zeros(shift.shape[-1], shift.shape[-1])) for shift in shifts]
    kept: list[_Draws] = [[] for _ in shifts]
    live = [(i, g) for i, g in enumerate(slopes) if g is not None and g.requires_grad]
    for _ in range(probes if live else 0):
        loss.counts.hvps += 1
        signs = {i: _own_signs(g, stream) for i, g in live}
        bent = grad(
            loss,
            [g for _, g in live],
            [shifts[i] for i, _ in live],
            grad_outputs=list(signs.values()),
            retain_graph=True,
        )
        for (i, _), product in zip(live, bent, strict=True):
            if product is not None:
                draw = _rows(signs[i]) / probes**0.5, _rows(product) / probes**0.5
                curvatures[i] += draw[1].T @ draw[0]
                kept[i] += [draw] if keep else []
    return _joined(mode.calls, ranks.here().sum(curvatures), kept)


def _own_signs(like: Tensor, stream: torch.Generator) -> Tensor:
    """Random signs of this rank's rows: those rows of what one rank would draw for all."""
    if ranks.here().is_alone:
        return rng.signs(like, stream)
    begin, total = ranks.place(len(like))
    return rng.signs(like.new_empty((total, *like.shape[1:])), stream)[begin : begin + len(like)]


def _mean_of_squares(a: Tensor) -> Tensor:
    """The mean of a aᵀ over the rows of all ranks."""
    count = a.new_tensor(float(len(a)))
    total, rows = ranks.here().sum([a.T @ a, count])
    return total / rows


def _joined(calls: list[_Call], curvatures: list[Tensor], kept: list[_Draws]) -> dict[str, _Seen]:
    """Calls of one weight are taken together, if they are of one kind; a bias goes with one weight."""
    found: dict[str, _Seen] = {}
    for call, S, draws in zip(calls, curvatures, kept, strict=True):
        shared = any(seen.bias == call.bias for n, seen in found.items() if n != call.weight)
        bias, a = "" if shared else call.bias, _rows(call.inputs.detach())
        a = torch.cat([a, a.new_ones(len(a), 1)], dim=1) if bias else a
        A, own, seen = _mean_of_squares(a), [(a, draws)] if draws else [], found.get(call.weight)
        if seen is None:
            found[call.weight] = _Seen(bias, call.transposed, A, S, own)
        elif (seen.bias, seen.transposed) == (bias, call.transposed):
            both, of_both = (seen.A + A, seen.S + S), seen.kept + own
            found[call.weight] = _Seen(bias, call.transposed, *both, of_both, seen.calls + 1)
    return found


def _rows(value: Tensor) -> Tensor:
    return tree.wide(value.reshape(-1, value.shape[-1]))


_PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


@dataclass
class _Weights:
    """The names of y by identity: autograd leaves, and transposed views of them."""

    y: Params
    names: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = {id(entry): name for name, entry in self.y.items()}

    def find(self, weight: Any) -> tuple[str, bool]:
        """(name, whether it is a transposed view), or no name."""
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            return "", False
        name = self.named(weight)
        if name or (base := weight._base) is None:
            return name, False
        if (weight.shape, weight.stride()) != (base.shape[::-1], base.stride()[::-1]):
            return "", False
        return self.names.get(id(base), ""), True

    def named(self, entry: Tensor) -> str:
        """The name of an entry of y, as it is or through a view of all of it, as over ranks; or none."""
        base = entry._base
        if id(entry) not in self.names and base is not None:
            same = entry.shape == base.shape and entry.stride() == base.stride()
            entry = base if same else entry
        return self.names.get(id(entry), "")


class _LinearLayers(TorchFunctionMode):
    """Notes the inputs of linear layers, and adds zeros to their outputs to differentiate in."""

    def __init__(self, y: Params) -> None:
        super().__init__()
        self.y, self.calls = y, list[_Call]()
        self._weights = _Weights(y)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear:
            return self._note(result, _linear(*args, **(kwargs or {})), out_first=True)
        if func in _PRODUCTS and len(args) == 2:
            return self._note(result, (*args, None), out_first=False)
        return result

    def _note(self, result: Tensor, given: tuple[Any, Any, Any], *, out_first: bool) -> Tensor:
        inputs, weight, bias = given
        name, flipped = self._weights.find(weight)
        if not name or inputs.ndim < 2:
            return result
        bias_name = self._weights.named(bias) if bias is not None else ""
        shift = torch.zeros_like(result, requires_grad=True)
        # K-FAC's matrix has the outputs first; y holds it the other way if exactly one is turned
        self.calls.append(_Call(name, bias_name, out_first == flipped, inputs, shift))
        return result + shift


def _linear(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias
