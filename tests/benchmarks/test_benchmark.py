"""The benchmark's own side at toy size: right numbers, an honest table. `make benchmark` measures."""

import pytest
import torch

from tests.benchmarks.environments import PEERS, ROOT
from tests.benchmarks.peers import by_hand, ours
from tests.benchmarks.run import AGAINST, ROWS, measure, rows_of
from tests.benchmarks.table import Row, table, write
from tests.benchmarks.tasks import TASKS, kind, mlp, transformer
from tests.benchmarks.worker import answer

CASES = [(row, task) for task in TASKS for row in rows_of(task) if row in ours.METHODS]


def off(got, expected):
    both = [torch.cat([part.flatten() for part in params.values()]) for params in (got, expected)]
    return float((both[0] - both[1]).norm() / both[1].norm())


@pytest.mark.untrusted("a fixed number of products, as what is timed has")
@pytest.mark.parametrize(("row", "task"), CASES)
def test_what_is_timed_is_right(row, task):
    toy = TASKS[task](toy=True).to(torch.float64)
    truth, method = by_hand.TRUTH[kind(task)](toy), ours.METHODS[row][kind(task)]
    # 1e-10: reversible steps are of 2^-46, which tenfold momentum and four steps multiply by 1e2
    assert off(method(toy), truth) < 1e-10
    # negative control: a hypergradient of one product or step less is another
    assert off(method(toy.shorter()), truth) > 1e-4


@pytest.mark.parametrize("task", TASKS)
def test_the_module_is_the_functions(task):
    toy = TASKS[task](toy=True)
    found = toy.module()()
    assert found.keys() == toy.y.keys()
    assert torch.equal(
        toy.lower(toy.x, found, toy.train).detach(), toy.lower(toy.x, toy.y, toy.train)
    )


def test_the_sizes_that_the_page_speaks_of():
    assert sum(entry.numel() for entry in mlp().y.values()) == 238_602
    assert sum(entry.numel() for entry in transformer().y.values()) == 5_054_464


def test_every_row_has_a_method():
    known = ours.METHODS.keys() | by_hand.METHODS.keys() | PEERS.keys()
    assert ROWS.keys() <= TASKS.keys()
    for task in TASKS:
        assert set(rows_of(task)) <= known
        assert AGAINST[kind(task)] in rows_of(task)
    assert ours.METHODS.keys() <= {row for task in TASKS for row in rows_of(task)}


def test_a_worker_answers():
    toy = mlp(toy=True)
    method = ours.METHODS["bilevel, store"]["unroll"]
    assert answer("time", method, toy) > 0
    assert answer("memory", method, toy) >= 0
    assert torch.tensor(answer("value", method, toy)).shape == (1, 6)
    with pytest.raises(ValueError, match="weight"):
        answer("weight", method, toy)


def test_a_row_is_measured_in_a_process_of_its_own(tmp_path):
    (row,) = measure("unroll", ["bilevel, recompute"], "toy", 2, tmp_path)
    assert len(row.seconds) == 2
    assert row.error < 1e-5


ROWS_OF_A_TABLE = [
    Row("floor", [1.0, 4.0, 2.0], 100_000_000, None),
    Row("right", [2.0, 4.4, 2.2], 50_000_000, 1e-7),
    Row("broken", [1.0, 4.0, 2.0], 200_000_000, 0.3),
]


def test_the_table_takes_ratios_within_a_round_and_marks_what_is_wrong():
    lines = table(ROWS_OF_A_TABLE, "floor").splitlines()[2:]
    assert lines == [
        "| floor | 2.00 | 1.00 | 100 | 1.00 | – |",
        "| right | 2.20 | 1.10 | 50 | 0.50 | 1e-07 |",
        "| broken | 2.00 | 1.00 | 200 | 2.00 | **0.3, wrong** |",
    ]


def test_the_table_goes_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- cg -->\nold\n<!-- /cg -->\nb\n", encoding="utf-8")
    write(page, "cg", "new \\1")
    assert page.read_text(encoding="utf-8") == "a\n<!-- cg -->\n\nnew \\1\n\n<!-- /cg -->\nb\n"
    with pytest.raises(ValueError, match="unroll"):
        write(page, "unroll", "new")


def test_the_page_has_a_place_for_every_table():
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for task in TASKS:
        assert f"<!-- {task} -->\n" in text
        assert f"<!-- /{task} -->" in text
