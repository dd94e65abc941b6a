"""The graph of a record as a function of straight Python code: numbers are added and compared as one would by hand.

What `torch.fx` writes calls a function for each operation, also for a sum of two floats: of a step of
conjugate gradient there are a hundred. Differs from it in that arithmetic, comparisons and what a replay expects of
numbers are expressions of Python.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from bilevel.replay.recorder import Departed, expect_between

_INFIX = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.truediv: "/",
    operator.floordiv: "//",
    operator.mod: "%",
    operator.pow: "**",
}
_COMPARED = {
    operator.gt: ">",
    operator.lt: "<",
    operator.ge: ">=",
    operator.le: "<=",
    operator.eq: "==",
    operator.ne: "!=",
}


def function_of(graph: fx.Graph) -> Callable[..., Any]:
    """What the graph computes, of its placeholders in their order."""
    return _Writer(graph).function()


class _Writer:
    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._bound: dict[str, Any] = {"Departed": Departed}
        """Objects that the code names."""
        self._names: dict[int, str] = {}
        """Of these objects by their ids, which stay theirs as long as they are bound."""
        self._lines: list[str] = []

    def function(self) -> Callable[..., Any]:
        ends = self._last_users()
        for node in self._graph.nodes:
            if node.op == "call_function":
                self._lines.append(self._line(node))
            elif node.op == "output":
                self._lines.append(f"return {self._expression(node.args[0])}")
            if ends.get(node):
                self._lines.append(f"del {', '.join(ends[node])}")
        given = [node.name for node in self._graph.nodes if node.op == "placeholder"]
        body = "\n    ".join(self._lines)
        exec(compile(f"def made({', '.join(given)}):\n    {body}", "<record>", "exec"), self._bound)
        return self._bound["made"]

    def _last_users(self) -> dict[fx.Node, list[str]]:
        """The tensors that are needed no more after a node, whose memory may be used again."""
        ends: dict[fx.Node, list[str]] = {}
        ended: set[fx.Node] = set()
        for node in reversed(self._graph.nodes):
            for one in node.all_input_nodes:
                if one not in ended and one.op == "call_function" and node.op != "output":
                    ends.setdefault(node, []).append(one.name)
                ended.add(one)
        return ends

    def _line(self, node: fx.Node) -> str:
        function, args = node.target, node.args
        if function is expect_between:
            where, low, found, high = (self._expression(one) for one in args)
            return f"if not {low} < {found} < {high}: raise Departed({where})"
        answers = getattr(function, "answers", None)
        if answers in _COMPARED or answers is bool:
            value, where, *numbers = args
            given = f" {_COMPARED.get(answers, '')} ".join(self._expression(one) for one in numbers)
            holds = f"not {given}" if value else given
            return f"if {holds}: raise Departed({self._expression(where)})"
        found = self._call(node)
        return f"{node.name} = {found}" if node.users else found

    def _call(self, node: fx.Node) -> str:
        function, given = node.target, [self._expression(one) for one in node.args]
        if not node.kwargs:
            if function in _INFIX:
                return f"{given[0]} {_INFIX[function]} {given[1]}"
            if function is operator.neg:
                return f"-{given[0]}"
            if function is operator.getitem:
                return f"{given[0]}[{given[1]}]"
            if function is Tensor.item:
                return f"{given[0]}.item()"
            if function in (max, min) and len(given) == 2:
                one, other = given  # of equals both give the first
                return f"{other} if {other} {'>' if function is max else '<'} {one} else {one}"
        if not all(name.isidentifier() for name in node.kwargs):
            raise SyntaxError(f"an operation is given {[*node.kwargs]} by name")
        given += [f"{name}={self._expression(one)}" for name, one in node.kwargs.items()]
        return f"{self._name(function)}({', '.join(given)})"

    def _expression(self, value: Any) -> str:
        kind = type(value)
        if isinstance(value, fx.Node):
            return value.name
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            return f"{self._name(slice)}({', '.join(self._expression(one) for one in parts)})"
        if isinstance(value, dict):
            parts = (f"{self._expression(k)}: {self._expression(one)}" for k, one in value.items())
            return f"{{{', '.join(parts)}}}"
        if isinstance(value, list):
            return f"[{', '.join(self._expression(one) for one in value)}]"
        if isinstance(value, tuple) and (kind is tuple or _has_nodes(value)):
            return f"({''.join(f'{self._expression(one)}, ' for one in value)})"
        text = repr(value)
        if kind in (int, float) and text not in ("inf", "-inf", "nan"):
            return f"({text})"  # for the sake of powers of what is negative
        return text if value is None or kind in (bool, str) else self._name(value)

    def _name(self, value: Any) -> str:
        """A name for an object."""
        if id(value) not in self._names:
            name = f"_{len(self._names)}"
            self._names[id(value)], self._bound[name] = name, value
        return self._names[id(value)]


def _has_nodes(value: Any) -> bool:
    return any(
        isinstance(one, fx.Node) or (isinstance(one, (list, tuple)) and _has_nodes(one))
        for one in value
    )
