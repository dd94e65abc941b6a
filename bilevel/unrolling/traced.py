"""The adjoint of one lower step, traced once and replayed without what it need not compute.

Rebuilding a step to differentiate it computes ∇y G itself too, of which the adjoint needs the graph
alone: 5 of the 54 matrix products of a perceptron of five layers. The trace has them removed. What
Python decided while it was taken (branches, closures, numbers) is frozen in it, so `traced` compares
the trace with the step as it is now, once a call, before it trusts it. What is replayed then is a
lighter form of the trace, in which products are added where they are made. It rounds otherwise, and
so is not what is compared: the derivative of Adam's first step is little more than rounding.

Differs from an ordinary trace in:

1. It is compared with the eager step at its first use in every call, not trusted by its key alone;
   one that disagrees is taken again, and a new one that disagrees is refused.
2. Every tensor enters under an alias of its own, since tracing merges inputs that are one object.
3. It is taken on fake tensors: real ones would all be alive at once.
4. Graphs that write in place are replayed as they are; those that draw random numbers are refused.
"""

from __future__ import annotations

import itertools
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from bilevel import tree
from bilevel.errors import ProblemError
from bilevel.types import Loss, Params, Path
from bilevel.unrolling.nested import flat, rebuild

aten = torch.ops.aten

Adjoint = tuple[Params, Any]
Pull = Callable[[Path, Loss, Params, Adjoint], tuple[Params, Adjoint]]
"""(a path of one step, G, x, adjoint after it) ↦ (contribution to the hypergradient, adjoint before)."""

LIMIT = 8
"""Traces kept; one holds the constants that it met, such as the weights of a frozen network."""

Graph = Callable[[list[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class _Trace:
    same: Graph
    """The operations of the eager step, but for those that no output needs."""
    light: Graph
    owners: tuple[Callable[[], Any], ...]
    """Weakly, whose loss and projection these are: ids are used again."""


_traces: OrderedDict[Any, _Trace] = OrderedDict()


def traced(eager: Pull) -> Pull:
    """`eager`, from a trace of it that is checked at its first use, and kept for the next call.

    The first step is taken both ways. A trace from an earlier call that disagrees is taken again.
    Costs one eager step a call and, where nothing is kept, the tracing of one.

    Raises (the returned function):
        ProblemError: the loss cannot be traced, or a new trace disagrees with the loss.
    """
    checked: set[Any] = set()

    def pull(one: Path, loss: Loss, x: Params, adjoint: Adjoint) -> tuple[Params, Adjoint]:
        key = _key(one, loss, x, adjoint)
        if key in checked and (known := _known(key, _owners(loss))):
            loss.counts.losses += 1
            loss.counts.gradients += 1
            return _replay(known.light, one, x, adjoint)
        truth = eager(one, loss, x, adjoint)
        known = _known(key, _owners(loss))
        if known is None or not _agree(_replay(known.same, one, x, adjoint), truth):
            known = _keep(key, _trace(eager, one, loss, x, adjoint))
            if not _agree(_replay(known.same, one, x, adjoint), truth):
                raise ProblemError(
                    f"memory: traced: {loss.level}_loss gives other derivatives when it is called "
                    "again with the same arguments, so its trace cannot be trusted: it is random, "
                    "or keeps something between calls, or its derivatives are nothing but rounding; "
                    "make it pure, or set memory: recompute"
                )
        checked.add(key)
        return truth

    return pull


def _inputs(one: Path, x: Params, adjoint: Adjoint) -> list[Tensor]:
    """Every tensor that the pull depends on, under an alias of its own: tracing merges equals."""
    batch = [leaf for _, leaf in tree.named(one.batches[0]) if isinstance(leaf, Tensor)]
    groups = [x.values(), one.start.values(), flat(one.state), batch]
    groups += [adjoint[0].values(), flat(adjoint[1])]
    return [leaf.detach() for group in groups for leaf in group]


def _outputs(found: tuple[Params, Adjoint]) -> list[Tensor]:
    contribution, (at_y, at_state) = found
    return [*contribution.values(), *at_y.values(), *flat(at_state)]


def _replay(graph: Graph, one: Path, x: Params, adjoint: Adjoint) -> tuple[Params, Adjoint]:
    with torch.no_grad():
        leaves = iter(graph(_inputs(one, x, adjoint)))
    contribution = {name: next(leaves) for name in x}
    return contribution, ({name: next(leaves) for name in one.start}, rebuild(one.state, leaves))


def _trace(eager: Pull, one: Path, loss: Loss, x: Params, adjoint: Adjoint) -> _Trace:
    """The pull as a graph of tensor operations."""
    apart = replace(loss, counts=replace(loss.counts))

    def function(inputs: list[Tensor]) -> list[Tensor]:
        given = iter(inputs)
        at_x = {name: next(given) for name in x}
        start = {name: next(given) for name in one.start}
        state = rebuild(one.state, given)
        batch = tree.map_nested(
            lambda leaf: next(given) if isinstance(leaf, Tensor) else leaf, one.batches[0]
        )
        after = {name: next(given) for name in adjoint[0]}, rebuild(adjoint[1], given)
        here = replace(one, start=start, state=state, batches=(batch,))
        return _outputs(eager(here, apart, at_x, after))

    try:
        # on fakes: real ones would all be alive at once, 140 MB where the replay takes 90
        graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(
            _inputs(one, x, adjoint)
        )
    except RuntimeError as error:
        if "Generator" in str(error):  # for which torch 2.11 has no place in a trace
            raise _draws(loss, "a torch.Generator") from error
        raise ProblemError(
            f"memory: traced: a lower step cannot be traced ({str(error).splitlines()[0]}); "
            "where the loss, the projection or the optimizer turns a tensor into a Python number "
            "or branches on one, set memory: recompute"
        ) from error
    _refuse_random(graph, loss)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    light = fx.Graph()
    light.output(light.graph_copy(graph.graph, {}))
    light.set_codegen(graph.graph._codegen)
    _lighten(light)
    return _Trace(graph, GraphModule(graph, light), tuple(_weak(owner) for owner in _owners(loss)))


def _refuse_random(graph: GraphModule, loss: Loss) -> None:
    """A generator would be frozen as an object, and go on from one replay to the next."""
    for node in _operations(graph.graph):
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise _draws(loss, node.target)


def _draws(loss: Loss, by: Any) -> ProblemError:
    return ProblemError(
        f"memory: traced: {loss.level}_loss draws random numbers ({by}), which a trace cannot draw "
        "again from the start; make them part of the batch, or set memory: recompute"
    )


def _operations(graph: fx.Graph) -> list[Any]:
    return [node for node in graph.nodes if isinstance(node.target, OpOverload)]


def _lighten(graph: fx.Graph) -> None:
    """Makes a + b c one pass: 4 % less time on a perceptron.

    Not in a graph that writes in place: a product taken later would see what was written, and a
    detached tensor may have been given another shape of its own.
    """
    if any(node.target._schema.is_mutable for node in _operations(graph)):
        return
    for node in graph.nodes:
        if node.target is aten.detach.default:
            node.replace_all_uses_with(node.args[0])
        elif node.target is aten.t.default and node.args[0].target is aten.t.default:
            node.replace_all_uses_with(node.args[0].args[0])
    graph.eliminate_dead_code()
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        for term, product in itertools.permutations(node.args):
            if not node.kwargs and _is_product(product) and _fits(term, product, node):
                with graph.inserting_before(node):
                    fused = graph.call_function(aten.addmm.default, (term, *product.args))
                fused.meta = node.meta
                node.replace_all_uses_with(fused)
                break
    graph.eliminate_dead_code()


def _is_product(node: Any) -> bool:
    """Whether it is a matrix product that one sum alone uses."""
    return isinstance(node, Node) and node.target is aten.mm.default and len(node.users) == 1


def _fits(term: Any, product: Node, total: Node) -> bool:
    """Whether addmm gives the sum in the shape, type and layout that it has."""
    if not isinstance(term, Node):
        return False  # a number
    one, other, both = (node.meta["val"] for node in (term, product, total))
    kinds = {(val.shape, val.dtype, val.device) for val in (one, other, both)}
    return len(kinds) == 1 and both.stride() == other.stride()


def _owners(loss: Loss) -> tuple[Any, ...]:
    """The objects that the step's functions are methods of, or the functions."""
    project = loss.structure.project
    functions = (loss.function, project) if project else (loss.function,)
    return tuple(getattr(function, "__self__", function) for function in functions)


def _weak(owner: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(owner)
    except TypeError:
        return lambda: owner


def _known(key: Any, owners: tuple[Any, ...]) -> _Trace | None:
    found = _traces.get(key)
    if found is None or any(a() is not b for a, b in zip(found.owners, owners, strict=True)):
        return None
    _traces.move_to_end(key)
    return found


def _keep(key: Any, made: _Trace) -> _Trace:
    _traces[key] = made
    _traces.move_to_end(key)
    while len(_traces) > LIMIT:
        _traces.popitem(last=False)
    return made


def _key(one: Path, loss: Loss, x: Params, adjoint: Adjoint) -> Any:
    """What a trace is frozen to: the loss, the step, every shape, and what in a batch is no tensor."""
    leaves = [leaf for _, leaf in tree.named(one.batches[0])]
    structure = tree.map_nested(lambda leaf: None, one.batches[0])
    constants = tuple((type(leaf), leaf) for leaf in leaves if not isinstance(leaf, Tensor))
    for kind, _ in constants:
        if kind not in (int, float, bool, str, type(None)):
            raise ProblemError(
                f"memory: traced: the batch holds a {kind.__name__}, which a trace would freeze; "
                "pass tensors, numbers and strings in containers of Python, or set memory: "
                "recompute"
            )
    shapes = tuple(
        (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) for leaf in _inputs(one, x, adjoint)
    )
    owners = tuple(id(owner) for owner in _owners(loss))
    function = owners, getattr(loss.function, "__name__", "")
    names = tuple(x), tuple(one.start)
    settings = repr(one.optimizer), getattr(loss.structure.project, "__name__", ""), repr(structure)
    return function, names, settings, constants, shapes


def _agree(got: tuple[Params, Adjoint], truth: tuple[Params, Adjoint]) -> bool:
    """Whether two pulls are equal but for rounding: the trace does the same operations."""
    parts = zip(
        (got[0], got[1][0], _named(got[1][1])),
        (truth[0], truth[1][0], _named(truth[1][1])),
        strict=True,
    )
    for ours, theirs in parts:
        if not tree.norm(tree.sub(ours, theirs)) <= tree.eps(theirs) ** 0.75 * tree.norm(theirs):
            return False
    return True


def _named(state: Any) -> Params:
    return {str(k): leaf for k, leaf in enumerate(flat(state)) if leaf.is_floating_point()}
