"""The rows of the benchmark: which methods are measured side by side, and why a library is not."""

from __future__ import annotations

from dataclasses import dataclass, field

MAIN = ["-c", "import sys; from bilevel.cli import main; sys.exit(main())"]
COMMANDS = {
    "start-up, import": ["-c", "import bilevel; bilevel.hypergradient"],
    "start-up, --help": [*MAIN, "--help"],
    "start-up, ls": [*MAIN, "ls"],
    "start-up, validate": [*MAIN, "validate", "quadratic"],
    "start-up, run": [*MAIN, "run", "quadratic", "--no-report"],
}
"""Of this library; `run` until its first line."""


@dataclass(frozen=True)
class Row:
    """Methods in the order of the page; the first is the floor."""

    title: str
    methods: tuple[str, ...]
    rounds: int
    absent: dict[str, str] = field(default_factory=dict)
    per: int = 1
    """Iterations a call, where the page speaks of one."""
    unit: str = "seconds"

    @property
    def floor(self) -> str:
        return self.methods[0]


SOLVERS = ("torchopt", "boat-torch", "betty-ml")
OTHERS = ("betty-ml", "boat-torch", "higher", "torchopt")
CG = Row(
    "Conjugate gradient",
    ("floor", "bilevel", *SOLVERS, "jaxopt"),
    7,
    {"higher": "it has no linear solver"},
)
UNROLL = Row(
    "Unrolling",
    (
        "autograd, all graphs kept",
        "bilevel, store",
        "bilevel, recompute",
        "bilevel, traced",
        "bilevel, mixed",
        "bilevel, checkpoint",
        "higher",
        "torchopt",
        "boat-torch",
        "JAX",
        "JAX, rematerialized",
    ),
    5,
    {"betty-ml": "it unrolls one step at most"},
)
SINGLE = Row(
    "Iterations of single-loop methods",
    (
        "by hand",
        "bilevel",
        "bilevel, compile: step",
        "bilevel, compile: inductor",
        "JAX, a step compiled",
        "JAX, one scan",
    ),
    15,
    dict.fromkeys(OTHERS, "it has no such method"),
    per=64,
)
ROWS = {
    "loop": Row(
        "A whole loop",
        (
            "by hand",
            "bilevel",
            "bilevel, compile: step",
            "bilevel, compile: inductor",
            "torchopt",
            "JAX, a step compiled",
            "JAX, one scan",
        ),
        11,
        {
            "betty-ml": "its conjugate gradient is wrong and starts at zero, this one at the last adjoint",
            "boat-torch": "its conjugate gradient starts at zero",
            "higher": "it has no linear solver",
        },
        per=60,
    ),
    "maml": Row(
        "MAML",
        (
            "by hand",
            "by hand, vmap",
            "by hand, a loop over tasks",
            "bilevel",
            "torchopt",
            "higher",
            "JAX",
        ),
        15,
        {
            "betty-ml": "it unrolls one step at most",
            "boat-torch": "its inner steps are those of higher, in a loop over tasks as there",
        },
    ),
    "soba": SINGLE,
    "saba": SINGLE,
    "srba": SINGLE,
    "cg": CG,
    "cg, larger batch": CG,
    "neumann": Row(
        "Neumann series",
        ("floor", "bilevel", *SOLVERS, "JAX"),
        7,
        {"higher": "it has no linear solver", "jaxopt": "it has no such solver; JAX is by hand"},
    ),
    "unroll": UNROLL,
    "unroll, momentum": Row(
        "Unrolling with momentum",
        (
            "autograd, all graphs kept",
            "bilevel, store",
            "bilevel, recompute",
            "bilevel, traced",
            "bilevel, mixed",
            "bilevel, checkpoint",
            "bilevel, reversible",
        ),
        5,
    ),
    "one step": Row(
        "One step in finite differences",
        ("by hand", "bilevel", "betty-ml", "boat-torch", "JAX"),
        9,
        dict.fromkeys(("higher", "torchopt"), "it has no finite difference"),
    ),
    "products": Row(
        "Products to hold an error",
        ("by hand, told when to stop", "bilevel", "torchopt", "boat-torch", "jaxopt"),
        1,
        {
            "betty-ml": "its conjugate gradient is wrong",
            "higher": "it has no linear solver",
        },
        unit="products",
    ),
    **{name: Row("Start-up", ("import torch", "bilevel"), 5, unit="start-up") for name in COMMANDS},
}


def is_by_hand(method: str) -> bool:
    """Whether plain torch is what is measured: a floor or another way to write it, and no peer."""
    return method.startswith(("by hand", "floor", "autograd", "import torch"))
