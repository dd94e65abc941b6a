"""Which estimator: questions in order, each with where a "yes" leads; as a picture and as a list.

What a leaf says is what docs/estimators.md says; the list of docs/choosing.md is written from here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from docs.pictures.style import BLUE, INK, PALE, canvas

TITLE = "Which estimator: questions in order, and where a yes leads"


class Question(NamedTuple):
    """`names` are registered estimators or presets, `page` is in docs/estimators; `why` is one line."""

    ask: str
    names: tuple[str, ...]
    options: str
    page: str
    why: str


QUESTIONS = (
    Question(
        "One variable at both levels?",
        ("dynamic_barrier", "rising_penalty"),
        "",
        "simple_bilevel",
        "x is empty; there is no hypergradient",
    ),
    Question(
        "Is x where y starts, over many tasks?",
        ("maml", "fomaml", "imaml"),
        "",
        "meta_learning",
        "`fomaml` for less, `imaml` with a proximal G",
    ),
    Question(
        "Is y restricted, G not smooth, or y* the fixed point of a map?",
        ("fixed_point", "kkt"),
        "",
        "constrained",
        "`kkt` for constraints given as such; others would ignore them, and are refused",
    ),
    Question(
        "Are there many y* for one x?",
        ("bda", "sl_bamm"),
        "",
        "aggregation",
        "the Hessian is singular, and F chooses among them",
    ),
    Question(
        "Much data, one batch a step?",
        ("soba", "saba"),
        "",
        "stochastic",
        "`saba` where the data are few blocks",
    ),
    Question(
        "Has F no gradient worth the name?",
        ("zeroth_order",),
        "",
        "zeroth_order",
        "from values of F alone",
    ),
    Question(
        "Are there no second derivatives, or none wanted?",
        ("f2sa_p", "value_gap"),
        "",
        "penalty",
        "a bias stays, which falls with `strength`",
    ),
    Question(
        "Is y far from y*, or do the steps themselves matter?",
        ("unroll",),
        "memory: recompute",
        "unroll",
        "exact for the path taken; `memory: recompute` for many steps",
    ),
    Question(
        "Is H not positive definite (curvature ≤ 0)?",
        ("implicit",),
        "damping or minres",
        "gauss_newton",
        "more lower steps first; then `damping`, `minres`, or a Gauss–Newton matrix",
    ),
    Question(
        "Has y up to a few hundred entries?",
        ("implicit",),
        "solver: dense",
        "linear_solvers",
        "no truncation at all",
    ),
)
LAST = Question(
    "None of these",
    ("implicit",),
    "target_error: 1e-3",
    "fewer_products",
    "holds that error, for as few products as it needs",
)


def listing() -> str:
    """The same as text, with links."""

    def leaf(question: Question) -> str:
        names = ", ".join(f"`{name}`" for name in question.names)
        option = f" with `{question.options}`" if ":" in question.options else ""
        return f"[{names}](estimators/{question.page}.md){option}: {question.why}."

    asked = [f"{i}. {q.ask} {leaf(q)}" for i, q in enumerate(QUESTIONS, 1)]
    return "\n".join([*asked, "", f"{LAST.ask}: {leaf(LAST)}"])


def compute() -> list[list[str]]:
    return [[q.ask, ", ".join(q.names), q.options] for q in (*QUESTIONS, LAST)]


def draw(data: list[list[str]]) -> Figure:
    with canvas(6.4, 0.56 * len(data) + 0.1) as figure:
        axes = figure.subplots()
        axes.set(xlim=(0, 100), ylim=(-len(data) + 0.42, 0.45))
        axes.axis("off")
        for row, (ask, names, options) in enumerate(data):
            last = row == len(data) - 1
            if not last:
                _box(axes, 0, -row, 59, ask, PALE)
                _arrow(axes, (28, -row - 0.31), (28, -row - 0.69), "no", (29.5, -row - 0.5))
                _arrow(axes, (58.5, -row), (65.5, -row), "yes", (60, -row + 0.19))
            left = 10 if last else 65
            words = names + (f"\n{options}" if options else "")
            _box(axes, left, -row, 36 if last else 35, words, BLUE)
        return figure


def _box(axes: Any, left: float, middle: float, width: float, words: str, color: str) -> None:
    shape = FancyBboxPatch(
        (left + 0.8, middle - 0.29),
        width - 1.6,
        0.58,
        boxstyle="round,pad=0,rounding_size=0.1",
        mutation_aspect=0.1,
        facecolor="none",
        edgecolor=color,
    )
    axes.add_patch(shape)
    look = {"ha": "center", "va": "center", "fontsize": 8.2, "color": INK, "linespacing": 1.25}
    axes.text(left + width / 2, middle, words, **look)


def _arrow(axes: Any, start: Any, end: Any, word: str, at: Any) -> None:
    look = {"arrowstyle": "-|>", "color": PALE, "shrinkA": 0, "shrinkB": 0, "linewidth": 1}
    axes.annotate("", end, start, arrowprops=look)
    axes.text(*at, word, fontsize=8, color=PALE, va="center")
