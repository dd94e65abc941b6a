"""K-FAC: exact where ∂²yy G is a Kronecker product, and fewer iterations where it is nearly one."""

import statistics

import pytest
import torch
from torch.nn import functional

from bilevel import calculus, hypergradient, solve_lower, tree
from bilevel.estimators.implicit import Implicit
from bilevel.linear.cg import CG
from bilevel.linear.dense import matrix
from bilevel.lower.lbfgs import LBFGS
from bilevel.lower.newton import Newton
from bilevel.preconditioners.kfac import KFAC
from bilevel.types import Counts, Loss, Losses, Point, System
from tests.cases import assert_close


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


INPUTS, TARGETS = normal(40, 3, seed=1) + 0.5, normal(40, 1, seed=2)


def system(lower, y, x=None, damping=0.0):
    counts = Counts()
    losses = Losses(Loss(lower, None, counts, "upper"), Loss(lower, None, counts, "lower"))
    at = Point(x or {"x": torch.ones((), dtype=torch.float64)}, y)
    product = calculus.linearize(losses.lower, at).hvp_yy
    b = tree.map(torch.ones_like, y)
    return System(lambda u: tree.axpy(damping, u, product(u)), b, losses, at, damping, None)


def inverse_of(preconditioner, given):
    apply, _ = preconditioner.prepare(given, preconditioner.init(given.at))
    return matrix(apply, given.b)


def layer(x, y, _):
    return (functional.linear(INPUTS, y["w"], y["b"]) - TARGETS).square().mean()


def product(x, y, _):
    return (INPUTS @ y["w"] - TARGETS).square().mean()


def transposed(x, y, _):
    return (INPUTS @ y["w"].T - TARGETS).square().mean()


def twisted(x, y, _):
    return (functional.linear(INPUTS, y["w"].T) - TARGETS).square().mean()


FORMS = {
    "linear": (layer, {"w": normal(1, 3), "b": normal(1)}),
    "matmul": (product, {"w": normal(3, 1)}),
    "matmul, transposed": (transposed, {"w": normal(1, 3)}),
    "linear, transposed": (twisted, {"w": normal(3, 1)}),
}


EIGENVALUES = ["product", "diagonal"]


@pytest.mark.parametrize("eigenvalues", EIGENVALUES)
@pytest.mark.parametrize("damping", [0.0, 0.2])
@pytest.mark.parametrize("form", FORMS)
def test_exact_on_one_layer_with_one_output(form, damping, eigenvalues):
    """Squared error: ∂²G/∂s² is 2 / 40 for every sample, so A ⊗ S is the Hessian."""
    lower, y = FORMS[form]
    given = system(lower, y, damping=damping)
    H = matrix(given.matvec, y)
    undamped = H - damping * torch.eye(len(H), dtype=torch.float64)
    expected = H + 0.1 * undamped.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    torch.testing.assert_close(
        inverse_of(KFAC(eigenvalues=eigenvalues), given),
        torch.linalg.inv(expected),
        rtol=1e-9,
        atol=1e-9,
    )


def test_a_layer_of_several_outputs_is_off_by_the_probes():
    """S is unbiased, its off-diagonal of size O(1 / √(probes · samples))."""
    targets = normal(40, 3, seed=5)

    def lower(x, y, _):
        return (functional.linear(INPUTS, y["w"]) - targets).square().sum() / 40

    given = system(lower, {"w": normal(3, 3)})
    H = matrix(given.matvec, given.at.y)
    expected = H + 0.1 * H.diagonal().mean() * torch.eye(9, dtype=torch.float64)
    errors = []
    for probes in (4, 400):
        found = [inverse_of(KFAC(probes=probes, seed=s), given) for s in range(5)]
        errors.append(
            statistics.mean(
                float((torch.linalg.inv(one) - expected).norm() / expected.norm()) for one in found
            )
        )
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.5)
    assert errors[1] < 0.05


def mlp(seed, decay=-7.0, samples=150, hidden=8):
    """A regression by a small network on badly scaled inputs, at its lower solution."""
    scale = 10 ** torch.linspace(0, -1, 6, dtype=torch.float64)
    inputs = normal(samples, 6, seed=seed) * scale + 0.5
    teacher = normal(6, 2, seed=seed + 100) / scale[:, None]
    targets = torch.sin(inputs @ teacher) + 0.1 * normal(samples, 2, seed=seed + 200)
    held_out = normal(40, 6, seed=seed + 300) * scale + 0.5

    def net(y, inputs):
        hidden = torch.tanh(functional.linear(inputs, y["w1"], y["b1"]))
        return functional.linear(hidden, y["w2"], y["b2"])

    def lower(x, y, _):
        penalty = sum((entry**2).sum() for entry in y.values())
        return functional.mse_loss(net(y, inputs), targets) + 0.5 * x["decay"].exp() * penalty

    def upper(x, y, _):
        return net(y, held_out).square().mean()

    zeros = {"dtype": torch.float64}
    x = {"decay": torch.tensor(decay, dtype=torch.float64)}
    y = {"w1": normal(hidden, 6, seed=seed) / 3, "b1": torch.zeros(hidden, **zeros)}
    y |= {"w2": normal(2, hidden, seed=seed + 1) / 3, "b2": torch.zeros(2, **zeros)}
    y = solve_lower(lower, x, y, solver=LBFGS(steps=800, tolerance=1e-6)).y
    return upper, lower, x, solve_lower(lower, x, y, solver=Newton(steps=20)).y


def test_fewer_iterations_on_a_network_and_the_same_answer():
    solver, counts = CG(iterations=2000, tolerance=1e-6), []
    for seed in (1, 2, 3):
        upper, lower, x, y = mlp(seed)
        plain, kfac = (
            hypergradient(upper, lower, x, y, estimator=Implicit(solver=solver, preconditioner=p))
            for p in (None, KFAC())
        )
        assert plain.stats.converged
        assert kfac.stats.converged
        assert kfac.stats.hvps == kfac.stats.iterations + 8
        assert kfac.stats.gradients == plain.stats.gradients + 1
        # residuals of 1e-6, magnified by the condition number, some 1e4
        assert_close(kfac.hypergradient, plain.hypergradient, rtol=1e-2)
        counts.append((plain.stats.hvps, kfac.stats.hvps))
    before, after = (statistics.median(column) for column in zip(*counts, strict=True))
    assert before > 1.3 * after, counts


def test_the_answer_is_that_of_plain_cg_once_converged():
    upper, lower, x, y = mlp(0, decay=-5.0)
    solver = CG(iterations=3000, tolerance=1e-11)
    plain, kfac = (
        hypergradient(upper, lower, x, y, estimator=Implicit(solver=solver, preconditioner=p))
        for p in (None, KFAC())
    )
    assert_close(kfac.hypergradient, plain.hypergradient, rtol=1e-6)


@pytest.mark.parametrize("eigenvalues", EIGENVALUES)
def test_positive_definite_where_the_hessian_is_not_and_entries_are_in_no_layer(eigenvalues):
    targets = normal(40, 2, seed=7)

    def lower(x, y, _):
        hidden = torch.tanh(functional.linear(INPUTS, y["w1"], y["b1"])) * y["gain"]
        z = functional.linear(functional.linear(hidden, y["w2"]), y["w2"], y["b2"])
        return (z - targets).square().mean() + 0 * y["unused"].sum()

    y = {"w1": normal(2, 3), "b1": normal(2), "gain": 1 + normal(2, seed=3)}
    y |= {"w2": normal(2, 2, seed=4), "b2": normal(2, seed=5), "unused": normal(2, seed=6)}
    given = system(lower, y)
    assert torch.linalg.eigvalsh(matrix(given.matvec, y))[0] < -1e-3
    preconditioner = KFAC(eigenvalues=eigenvalues)
    apply, state = preconditioner.prepare(given, preconditioner.init(given.at))
    assert set(state["layers"]) == {"w1", "w2"}
    # w2 is met with and without a bias: its first use is kept, and b2 goes with the rest
    assert set(state["rest"]) == {"gain", "b2", "unused"}
    M = matrix(apply, given.b)
    torch.testing.assert_close(M, M.T, rtol=1e-10, atol=1e-12)
    assert torch.linalg.eigvalsh(M)[0] > 0


def test_no_layer_at_all_is_a_multiple_of_the_identity():
    def lower(x, y, _):
        return 3 * (y["a"] ** 2).sum() + (y["b"] ** 2).sum()

    given = system(lower, {"a": normal(2), "b": normal(3)})
    expected = torch.tensor([1 / 6] * 2 + [1 / 2] * 3, dtype=torch.float64).diag()
    torch.testing.assert_close(inverse_of(KFAC(), given), expected, rtol=1e-12, atol=1e-12)


def test_built_once_and_again_when_it_no_longer_pays():
    lower, y = FORMS["linear"]
    given = system(lower, y)
    preconditioner = KFAC(probes=2)
    _, state = preconditioner.prepare(given, preconditioner.init(given.at))
    before = given.losses.counts.hvps

    def again(state, spent):
        one = System(given.matvec, given.b, given.losses, given.at, given.damping, spent)
        return preconditioner.prepare(one, state)[1]

    state = again(state, 3)
    state = again(state, 8)  # 5 beyond the fewest: not more than 2 · 2 + 1
    assert (state["built"], given.losses.counts.hvps) == (1, before)
    state = again(state, 4)
    assert state["built"] == 2
    assert given.losses.counts.hvps == before + 2


@pytest.mark.parametrize("eigenvalues", EIGENVALUES)
def test_a_layer_that_is_met_twice_has_the_curvature_of_both(eigenvalues):
    def lower(x, y, _):
        return sum((functional.linear(INPUTS, y["w"]) - t).square().mean() for t in (TARGETS, 0.5))

    given = system(lower, {"w": normal(1, 3)})
    H = matrix(given.matvec, given.at.y)
    expected = H + 0.1 * H.diagonal().mean() * torch.eye(3, dtype=torch.float64)
    found = inverse_of(KFAC(eigenvalues=eigenvalues), given)
    torch.testing.assert_close(found, torch.linalg.inv(expected), rtol=1e-9, atol=1e-9)


def test_a_bias_of_two_layers_goes_with_one():
    def lower(x, y, _):
        first = functional.linear(INPUTS, y["w1"], y["b"])
        return (first + functional.linear(INPUTS**2, y["w2"], y["b"]) - TARGETS).square().mean()

    given = system(lower, {"w1": normal(1, 3), "w2": normal(1, 3, seed=1), "b": normal(1)})
    M = inverse_of(KFAC(), given)
    torch.testing.assert_close(M, M.T, rtol=1e-10, atol=1e-12)
    assert torch.linalg.eigvalsh(M)[0] > 0


def test_a_layer_called_by_keywords_is_seen_as_it_is():
    def by_place(x, y, _):
        return (functional.linear(INPUTS, y["w"], y["b"]) - TARGETS).square().mean()

    def by_name(x, y, _):
        return (functional.linear(INPUTS, bias=y["b"], weight=y["w"]) - TARGETS).square().mean()

    y = {"w": normal(1, 3), "b": normal(1)}
    one, other = (inverse_of(KFAC(), system(lower, y)) for lower in (by_place, by_name))
    assert torch.equal(one, other)
    assert float(one[:-1, -1].norm()) > 0, "the bias is taken with its weight"


def test_an_entry_along_which_nothing_bends_is_left_alone():
    given = system(
        lambda x, y, _: (x["x"] * y["free"]).sum(), {"free": normal(3)}, {"x": normal(3)}
    )
    assert torch.equal(inverse_of(KFAC(), given), torch.eye(3, dtype=torch.float64))


# EKFAC ------------------------------------------------------------------------------------------


def dense_diagonal(given, name, layer):
    """[out, in]: dᵀ ∂²yy G d for every d = w uᵀ of the layer's eigenvectors, one product each."""
    found = torch.zeros_like(layer["values"])
    for i, w in enumerate(layer["outputs"].T):
        for j, u in enumerate(layer["inputs"].T):
            d = {n: torch.zeros_like(entry) for n, entry in given.b.items()}
            block = torch.outer(w, u)
            if layer["bias"]:
                d[layer["bias"]], block = block[:, -1].contiguous(), block[:, :-1]
            d[name] = (block.T if layer["transposed"] else block).contiguous()
            found[i, j] = tree.dot(d, given.matvec(d))
    return found


def loud(x, y, _):
    """Samples weigh as their first input is large: their inputs and their curvature go together."""
    weights = INPUTS[:, :1].square()
    return (weights * (functional.linear(INPUTS, y["w"], y["b"]) - TARGETS).square()).mean()


@pytest.mark.parametrize("eigenvalues", EIGENVALUES)
def test_the_eigenvalues_are_the_diagonal_of_the_hessian_in_its_eigenvectors(eigenvalues):
    """With one output every probe is exact; K-FAC's product is not that diagonal (the control)."""
    given = system(loud, {"w": normal(1, 3), "b": normal(1)})
    preconditioner = KFAC(eigenvalues=eigenvalues)
    _, state = preconditioner.prepare(given, preconditioner.init(given.at))
    layer = state["layers"]["w"]
    expected = dense_diagonal(given, "w", layer)
    expected = expected + 0.1 * expected.mean()
    off = float((layer["values"] - expected).norm() / expected.norm())
    assert off < 1e-12 if eigenvalues == "diagonal" else off > 0.1


def test_of_several_layers_they_are_off_by_the_probes():
    """Unbiased, and the products of one layer with the signs of another are noise: 1 / √probes."""
    targets = normal(40, 2, seed=7)

    def lower(x, y, _):
        hidden = torch.tanh(functional.linear(INPUTS, y["w1"], y["b1"]))
        return functional.mse_loss(hidden @ y["w2"], targets)

    y = {"w1": normal(4, 3) / 2, "b1": normal(4) / 2, "w2": normal(4, 2, seed=4)}
    given = system(lower, y)
    errors = {40: [], 1000: []}
    for probes, found in errors.items():
        for seed in range(2):
            preconditioner = KFAC(probes=probes, damping=1e-9, eigenvalues="diagonal", seed=seed)
            _, state = preconditioner.prepare(given, preconditioner.init(given.at))
            for name, layer in state["layers"].items():
                expected = dense_diagonal(given, name, layer)
                off = layer["values"] - expected.clamp(min=0)
                found.append(float(off.norm() / expected.norm()))
    few, many = (statistics.mean(found) for found in errors.values())
    assert few / many == pytest.approx(5, rel=0.4)
    assert many < 0.05


def apart(count):
    """Each sample has an input of its own, and a weight of its own: A and S know none of it."""
    weights = 10 ** torch.linspace(0, 3, count, dtype=torch.float64)[:, None]

    def lower(x, y, _):
        z = functional.linear(torch.eye(count, dtype=torch.float64), y["w"])
        return (weights * (z - 1).square()).mean()

    return lower, {"w": normal(1, count)}


@pytest.mark.untrusted("y is where the factors are looked at, and no solution")
@pytest.mark.parametrize("damping", [0.1, 1e-3])
@pytest.mark.parametrize("count", [20, 60])
def test_where_the_factors_know_nothing_the_diagonal_does(count, damping):
    """A is a multiple of I and S a number, so K-FAC changes nothing; in that basis H is diagonal."""
    lower, y = apart(count)

    def upper(x, y, _):
        return (y["w"] - 2).square().sum() + x["x"]

    def iterations(preconditioner):
        estimator = Implicit(
            solver=CG(iterations=2000, tolerance=1e-8), preconditioner=preconditioner
        )
        x = {"x": torch.ones((), dtype=torch.float64)}
        return hypergradient(upper, lower, x, y, estimator=estimator).stats.iterations

    plain = iterations(None)
    kfac, ekfac = (iterations(KFAC(damping=damping, eigenvalues=e)) for e in EIGENVALUES)
    assert abs(kfac - plain) <= 2
    assert ekfac < 0.75 * kfac
