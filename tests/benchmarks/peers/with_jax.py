"""JAX 0.10.2 with jaxopt 0.8.5: what has a solver or an implicit derivative there, by them.

Everything is compiled ahead of time, which is not timed, and waited for. Losses are those of
`tests/benchmarks/tasks.py`, written again. The single loops are those of benchopt's benchmark of
bilevel methods in form: a pure step of (state, blocks), `lax.scan` over the draws.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax  # pyright: ignore[reportMissingImports]
import jax.numpy as jnp  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
from jax import lax  # pyright: ignore[reportMissingImports]
from jaxopt.implicit_diff import root_vjp  # pyright: ignore[reportMissingImports]
from jaxopt.linear_solve import solve_cg  # pyright: ignore[reportMissingImports]

from tests.benchmarks import loop, maml, stochastic
from tests.benchmarks.hold import Held, Told
from tests.benchmarks.stochastic import Stochastic
from tests.benchmarks.tasks import EPSILON, SCALE, Params, Task, Transformer
from tests.benchmarks.whole import Loop, Maml, Prepared

jax.config.update("jax_enable_x64", True)  # off, float64 would be float32; float32 stays itself
Tree = Any
tree = jax.tree.map


def arrays(given: Tree) -> Tree:
    return tree(
        lambda part: jnp.asarray(part.detach().numpy()) if torch.is_tensor(part) else part, given
    )


def compiled(function: Callable[..., Tree], *given: Tree) -> Callable[[], Params]:
    """A call that is compiled and waits for its result."""
    run = jax.jit(function).lower(*given).compile()

    def work() -> Params:
        return tensors(jax.block_until_ready(run(*given)))

    return work


def tensors(found: Tree) -> Params:
    return {name: torch.from_dlpack(part) for name, part in found.items()}


# the losses of tasks.py


def mlp(y: Tree, inputs: Tree) -> Tree:
    depth = len(y) // 2
    for k in range(depth):
        inputs = inputs @ y[f"w{k}"].T + y[f"b{k}"]
        inputs = jnp.tanh(inputs) if k < depth - 1 else inputs
    return inputs


def layer_norm(h: Tree) -> Tree:
    off = h - h.mean(-1, keepdims=True)
    return off / jnp.sqrt(jnp.square(off).mean(-1, keepdims=True) + 1e-5)


def transformer(y: Tree, inputs: Tree) -> Tree:
    h = y["embed"][inputs] + y["place"]
    for k in range(sum(name.startswith("qkv") for name in y)):
        h = h + attention(y, k, layer_norm(h))
        wide = jax.nn.gelu(layer_norm(h) @ y[f"up{k}"].T, approximate=False)
        h = h + wide @ y[f"down{k}"].T
    return layer_norm(h) @ y["head"].T


def attention(y: Tree, k: int, h: Tree) -> Tree:
    batch, length, width = h.shape
    parts = (h @ y[f"qkv{k}"].T).reshape(batch, length, 3, 4, width // 4)
    query, key, value = parts.transpose(2, 0, 3, 1, 4)
    weights = jax.nn.softmax(query @ key.swapaxes(-1, -2) / math.sqrt(width // 4))
    return (weights @ value).swapaxes(1, 2).reshape(h.shape) @ y[f"out{k}"].T


def losses(task: Task) -> tuple[Callable[..., Tree], Callable[..., Tree]]:
    """(F, G) of (x, y, batch)."""
    net = transformer if isinstance(task.net, Transformer) else mlp

    def each(y: Tree, batch: Tree) -> Tree:
        logits = jax.nn.log_softmax(net(y, batch[0]))
        found = -jnp.take_along_axis(logits, batch[1][..., None], -1)[..., 0]
        return found.reshape(len(found), -1).mean(1)

    def lower(x: Tree, y: Tree, batch: Tree) -> Tree:
        loss = (jax.nn.sigmoid(x["logits"]) * each(y, batch)).mean()
        squares = sum(jnp.square(part).sum() for part in y.values()) if task.decay else 0.0
        return loss + 0.5 * task.decay * squares

    return lambda x, y, batch: each(y, batch).mean(), lower


def given(task: Task) -> Tree:
    return tuple(arrays(part) for part in (task.x, task.y, task.train, task.held_out))


# hypergradients


def cg(task: Task) -> Callable[[], Params]:
    """jaxopt: `root_vjp` with its `solve_cg`, one product more than steps."""
    F, G = losses(task)
    solve = partial(solve_cg, maxiter=task.work, tol=0.0)

    def work(x: Tree, y: Tree, train: Tree, held_out: Tree) -> Tree:
        F_y = jax.grad(F, 1)(x, y, held_out)
        slope = jax.grad(lambda y, x: G(x, y, train))
        return root_vjp(slope, y, (x,), F_y, solve=solve)[0]

    return compiled(work, *given(task))


def neumann(task: Task) -> Callable[[], Params]:
    F, G = losses(task)

    def work(x: Tree, y: Tree, train: Tree, held_out: Tree) -> Tree:
        term = jax.grad(F, 1)(x, y, held_out)
        _, product = jax.linearize(lambda y: jax.grad(G, 1)(x, y, train), y)

        def add(carried: Tree, _: None) -> tuple[Tree, None]:
            term, total = carried
            term = tree(lambda a, b: a - SCALE * b, term, product(term))
            return (term, tree(jnp.add, total, term)), None

        (_, total), _ = lax.scan(add, (term, term), length=task.work)
        _, transposed = jax.vjp(lambda x: jax.grad(G, 1)(x, y, train), x)
        return tree(lambda a: -SCALE * a, transposed(total)[0])

    return compiled(work, *given(task))


def unroll(task: Task, *, remat: bool = False) -> Callable[[], Params]:
    F, G = losses(task)

    def work(x: Tree, y: Tree, train: Tree, held_out: Tree) -> Tree:
        def value(x: Tree) -> Tree:
            def step(y: Tree, _: None) -> tuple[Tree, None]:
                slopes = jax.grad(G, 1)(x, y, train)
                return tree(lambda a, b: a - task.lr * b, y, slopes), None

            one = jax.checkpoint(step) if remat else step
            return F(x, lax.scan(one, y, length=task.work)[0], held_out)

        return jax.grad(value)(x)

    return compiled(work, *given(task))


def one_step(task: Task) -> Callable[[], Params]:
    F, G = losses(task)

    def work(x: Tree, y: Tree, train: Tree, held_out: Tree) -> Tree:
        slopes = jax.grad(G, 1)(x, y, train)
        F_y = jax.grad(F, 1)(x, tree(lambda a, b: a - task.lr * b, y, slopes), held_out)
        size = EPSILON / jnp.sqrt(sum(jnp.vdot(part, part) for part in F_y.values()))

        def side(step: Tree) -> Tree:
            return jax.grad(G)(x, tree(lambda a, b: a + step * b, y, F_y), train)

        above, below = side(size), side(-size)
        return tree(lambda a, b: -task.lr * (a - b) / (2 * size), above, below)

    return compiled(work, *given(task))


# a whole loop


def loop_step() -> tuple[Callable[[Tree, None], tuple[Tree, None]], Tree]:
    """(an upper step, the state before the first)."""
    (A, b), (C, d) = (
        arrays((loop.PROBLEM.splits[name]["A"], loop.PROBLEM.splits[name]["b"]))
        for name in ("lower", "upper")
    )

    def F(w: Tree) -> Tree:
        return jax.nn.softplus(-d * (C @ w)).mean()

    def G(w: Tree, x: Tree) -> Tree:
        return jax.nn.softplus(-b * (A @ w)).mean() + 0.5 * (jnp.exp(x) * w**2).sum()

    def step(state: Tree, _: None) -> tuple[Tree, None]:
        x, w, v, m, s, t = state

        def descend(w: Tree, _: None) -> tuple[Tree, None]:
            return w - loop.LR * jax.grad(G)(w, x), None

        w, _ = lax.scan(descend, w, length=loop.LOWER_STEPS)
        _, product = jax.linearize(lambda w: jax.grad(G)(w, x), w)
        v = solve_cg(product, jax.grad(F)(w), init=v, maxiter=loop.CG_STEPS, tol=0.0)
        _, cross = jax.vjp(lambda x: jax.grad(G)(w, x), x)
        h, t = -cross(v)[0], t + 1
        m, s = 0.9 * m + 0.1 * h, 0.999 * s + 0.001 * h * h
        root = jnp.sqrt(s / (1 - 0.999**t)) + 1e-8
        return (x - loop.UPPER_LR * (m / (1 - 0.9**t)) / root, w, v, m, s, t), None

    x = jnp.full(loop.FEATURES, loop.PROBLEM.initial_log_penalty)
    return step, (x, *(jnp.zeros(loop.FEATURES) for _ in range(4)), jnp.zeros(()))


def loop_jit(task: Loop) -> Callable[[], Params]:
    """A compiled upper step, called from Python."""
    step, start = loop_step()
    run = jax.jit(lambda state: step(state, None)[0]).lower(start).compile()

    def work() -> Params:
        state = start
        for _ in range(task.steps):
            state = run(state)
        return tensors({"log_penalty": jax.block_until_ready(state)[0]})

    return work


def loop_scan(task: Loop) -> Callable[[], Params]:
    """All upper steps in one program."""
    step, start = loop_step()
    return compiled(
        lambda state: {"log_penalty": lax.scan(step, state, length=task.steps)[0][0]}, start
    )


def maml_vmap(task: Maml) -> Callable[[], Params]:
    def error(y: Tree, batch: Tree) -> Tree:
        h = batch["a"]
        for i in range(3):
            h = h @ y[f"weight{i}"].T + y[f"bias{i}"]
            h = jnp.tanh(h) if i < 2 else h
        return jnp.square(h - batch["b"]).mean()

    def adapted(x: Tree, shot: Tree, query: Tree) -> Tree:
        y = x
        for _ in range(maml.STEPS):
            y = tree(lambda a, b: a - maml.LR * b, y, jax.grad(error)(y, shot))
        return error(y, query)

    def value(x: Tree, shots: Tree, queries: Tree) -> Tree:
        return jax.vmap(adapted, (None, 0, 0))(x, shots, queries).mean()

    return compiled(jax.grad(value), *map(arrays, task.drawn()))


# iterations of stochastic methods

Step = Callable[[Tree, Tree], Tree]


def iteration(task: Stochastic) -> tuple[Step, Tree]:
    """(an iteration from the blocks (of G, of F) drawn, the state before the first)."""
    lower, upper = (
        {name: jnp.asarray(rows.numpy()) for name, rows in level.items()}
        for level in (task.problem.lower, task.problem.upper)
    )
    counts = len(lower["y"]), len(upper["y"])
    x, y = (jnp.asarray(part.numpy()) for part in task.start())
    v = jnp.zeros_like(y)

    def value(x: Tree, y: Tree, k: Tree) -> Tree:
        of_y = y @ (0.5 * k["yy"] @ y + x @ k["xy"] + k["y"])
        return of_y + x @ (0.5 * k["xx"] @ x + k["x"])

    def five(G: Tree, F: Tree, x: Tree, y: Tree, v: Tree) -> tuple[Tree, ...]:
        g, pull = jax.vjp(lambda x, y: jax.grad(value, 1)(x, y, G), x, y)
        Jv, Hv = pull(v)
        return g, Hv, Jv, *jax.grad(value, (0, 1))(x, y, F)

    def at(level: Tree, block: Tree) -> Tree:
        return tree(lambda rows: rows[block], level)

    def directions(found: tuple[Tree, ...]) -> tuple[Tree, ...]:
        g, Hv, Jv, F_x, F_y = found
        return g, Hv - F_y, F_x - Jv

    def moved(here: Tree, d: Tree) -> Tree:
        rates = (stochastic.LR, stochastic.LR, stochastic.UPPER_LR)
        y, v, x = (a - r * b for a, r, b in zip((here[1], here[2], here[0]), rates, d, strict=True))
        return x, y, v

    def soba(state: Tree, blocks: Tree) -> Tree:
        found = five(at(lower, blocks[0]), at(upper, blocks[1]), *state[0])
        return (moved(state[0], directions(found)),)

    def saba(state: Tree, blocks: Tree) -> Tree:
        here, tables, means = state
        found = five(at(lower, blocks[0]), at(upper, blocks[1]), *here)
        rows = [blocks[0]] * 3 + [blocks[1]] * 2
        offs = [now - table[row] for now, table, row in zip(found, tables, rows, strict=True)]
        d = tuple(off + mean for off, mean in zip(offs, means, strict=True))
        means = tuple(
            mean + off / len(table) for mean, off, table in zip(means, offs, tables, strict=True)
        )
        tables = tuple(
            table.at[row].set(now) for table, row, now in zip(tables, rows, found, strict=True)
        )
        return moved(here, directions(d)), tables, means

    def srba(state: Tree, blocks: Tree) -> Tree:
        here, before, d, age = state

        def full(_: None) -> Tree:
            whole = (tree(lambda rows: rows.mean(0), level) for level in (lower, upper))
            return directions(five(*whole, *here))

        def change(_: None) -> Tree:
            G, F = at(lower, blocks[0]), at(upper, blocks[1])
            now, old = (directions(five(G, F, *point)) for point in (here, before))
            return tuple(a + b - c for a, b, c in zip(d, now, old, strict=True))

        d = lax.cond(age % stochastic.PERIOD == 0, full, change, None)
        return moved(here, d), here, d, age + 1

    here, zeros = (x, y, v), jnp.zeros_like
    sizes = (y, y, x, x, y)
    tables = tuple(jnp.zeros((counts[k > 2], len(part))) for k, part in enumerate(sizes))
    starts = {
        "soba": (here,),
        "saba": (here, tables, tuple(zeros(part) for part in sizes)),
        "srba": (here, here, (zeros(y), zeros(y), zeros(x)), jnp.zeros((), int)),
    }
    return {"soba": soba, "saba": saba, "srba": srba}[task.method], starts[task.method]


def single_jit(task: Stochastic) -> Callable[[], Params]:
    """A compiled iteration, called from Python, its result waited for."""
    step, start = iteration(task)
    blocks, drawn = task.blocks(), [start]
    run = jax.jit(step).lower(start, (0, 0)).compile()

    def work() -> Params:
        for i, j in itertools.islice(blocks, task.steps):
            drawn[0] = jax.block_until_ready(run(drawn[0], (i, j)))
        return tensors({"x": drawn[0][0][0]})

    return work


def single_scan(task: Stochastic) -> Callable[[], Params]:
    """The iterations of a call in one program, the blocks drawn before."""
    step, start = iteration(task)
    blocks, drawn = task.blocks(), [start]

    def go(state: Tree, order: Tree) -> Tree:
        return lax.scan(lambda state, pair: (step(state, pair), None), state, order)[0]

    def order() -> Tree:
        pairs = list(itertools.islice(blocks, task.steps))
        return tuple(jnp.asarray(side) for side in zip(*pairs, strict=True))

    run = jax.jit(go).lower(start, order_like(task.steps)).compile()

    def work() -> Params:
        drawn[0] = jax.block_until_ready(run(drawn[0], order()))
        return tensors({"x": drawn[0][0][0]})

    return work


def order_like(steps: int) -> Tree:
    return tuple(jax.ShapeDtypeStruct((steps,), jnp.int64) for _ in range(2))


def held(task: Held) -> Told:
    """jaxopt's solver, warm-started; the product is torch's, called back and counted."""

    def solve(product, b, v, tolerance):
        def back(u: Tree) -> Tree:
            return product(torch.from_numpy(np.array(u))).numpy()

        shape = jax.ShapeDtypeStruct(b.shape, jnp.float64)
        found = solve_cg(
            lambda u: jax.pure_callback(back, shape, u),
            jnp.asarray(b.numpy()),
            init=jnp.asarray(v.numpy()),
            tol=tolerance,
            maxiter=1000,
        )
        return torch.from_dlpack(jax.block_until_ready(found)).clone()

    return Told(task, solve)


SINGLE = ("soba", "saba", "srba")
METHODS = {
    "jaxopt": {"cg": Prepared(cg), "products": Prepared(held)},
    "JAX": {
        "neumann": Prepared(neumann),
        "unroll": Prepared(unroll),
        "one step": Prepared(one_step),
        "maml": Prepared(maml_vmap),
    },
    "JAX, rematerialized": {"unroll": Prepared(partial(unroll, remat=True))},
    "JAX, a step compiled": {
        "loop": Prepared(loop_jit),
        **dict.fromkeys(SINGLE, Prepared(single_jit)),
    },
    "JAX, one scan": {
        "loop": Prepared(loop_scan),
        **dict.fromkeys(SINGLE, Prepared(single_scan)),
    },
}
