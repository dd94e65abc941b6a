"""The benchmark's own side at toy size: right numbers, an honest table. `make benchmark` measures."""

import json
from contextlib import nullcontext

import pytest
import torch

from bilevel.linear.cg import CG
from tests.benchmarks import growth, measured, page, run, startup
from tests.benchmarks.environments import PEERS
from tests.benchmarks.hold import CannotHold, Told
from tests.benchmarks.measured import Measured, Method
from tests.benchmarks.peers import by_hand, ours
from tests.benchmarks.rows import COMMANDS, ROWS, Row, is_by_hand
from tests.benchmarks.run import home, measure
from tests.benchmarks.table import exponent, summary, table
from tests.benchmarks.table import growth as growth_table
from tests.benchmarks.table import startup as startup_table
from tests.benchmarks.tasks import TASKS as HYPERGRADIENTS
from tests.benchmarks.tasks import kind, mlp, transformer
from tests.benchmarks.whole import TASKS
from tests.benchmarks.worker import Timed, answer

CASES = [
    (method, task)
    for task in HYPERGRADIENTS
    for method in ROWS[task].methods
    if method in ours.METHODS
]


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


WHOLE = [task for task in TASKS if task not in HYPERGRADIENTS]


@pytest.mark.untrusted("a fixed number of products, as what is timed has")
@pytest.mark.parametrize("task", WHOLE)
def test_every_way_of_a_whole_row_ends_at_the_same_value(task):
    toy = TASKS[task](toy=True).to(torch.float64)
    truth = by_hand.TRUTH[task](toy)
    # test_maml.py has the other ways by hand
    ways = {"bilevel", "bilevel, compile: step", ROWS[task].floor}
    for name in ways & set(ROWS[task].methods):
        method = (ours.METHODS | by_hand.METHODS)[name][task]
        # to hold an error of 1e-3 is what the row of products asks for
        assert off(method(toy), truth) < (1e-3 if task == "products" else 1e-10), name


@pytest.mark.parametrize(("task", "attribute"), [("loop", "CG_STEPS"), ("maml", "STEPS")])
def test_another_computation_is_seen(task, attribute, monkeypatch):
    """Negative control: one step less, and a row would say that the value is wrong."""
    module = getattr(ours, task)
    toy = TASKS[task](toy=True).to(torch.float64)
    truth = by_hand.TRUTH[task](toy)
    monkeypatch.setattr(module, attribute, getattr(module, attribute) - 1)
    assert off(ours.METHODS["bilevel"][task](toy), truth) > 1e-5


@pytest.mark.parametrize("task", HYPERGRADIENTS)
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


def test_every_row_has_its_methods():
    known = ours.METHODS.keys() | by_hand.METHODS.keys()
    assert ROWS.keys() == {*TASKS, *COMMANDS}
    for name in TASKS:
        row = ROWS[name]
        assert is_by_hand(row.floor)
        assert any(method.startswith("bilevel") for method in row.methods)
        for method in row.methods:
            if method in known:
                assert kind(name) in (ours.METHODS | by_hand.METHODS)[method]
        libraries = {*PEERS, "jax"}
        spoken_of = {
            m.split(",")[0].replace("JAX", "jax").replace("jaxopt", "jax") for m in row.methods
        }
        # of reversible steps there is no other implementation
        assert libraries <= spoken_of | row.absent.keys() or name == "unroll, momentum"
    assert ours.METHODS.keys() <= {method for row in ROWS.values() for method in row.methods}


def test_a_method_runs_in_the_environment_of_its_library(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "python_of", lambda name, cache: cache / name)
    assert home("JAX, one scan", tmp_path) == (tmp_path / "jax", "with_jax")
    assert home("torchopt", tmp_path) == (tmp_path / "torchopt", "with_torchopt")
    assert [home(m, tmp_path)[1] for m in ("by hand, vmap", "bilevel, store")] == [
        "by_hand",
        "ours",
    ]


def test_a_worker_answers():
    timed = Timed(ours.METHODS["bilevel, store"]["unroll"], mlp(toy=True))
    assert answer("memory", timed) >= 0
    assert torch.tensor(answer("value", timed)).shape == (1, 6)
    with pytest.raises(ValueError, match="weight"):
        answer("weight", timed)


def test_what_is_done_once_is_not_timed(monkeypatch):
    class Call:
        calls = started = 0

        def again(self):
            self.started += 1

        def __call__(self):
            Call.calls += 1

    class Method:
        ready = staticmethod(lambda task: Call())

    monkeypatch.setattr("tests.benchmarks.worker.LEAST", 0.0)
    timed = Timed(Method(), None)
    assert timed.time() >= 0
    assert timed.time() >= 0
    assert Call.calls == 3  # one that says how many a round has, and a round each
    assert timed._ready().started == 3


def test_products_are_counted_in_the_place_of_time():
    task = TASKS["products"](toy=True)
    timed = Timed(by_hand.METHODS["by hand, told when to stop"]["products"], task)
    cold = timed.time()
    assert cold == int(cold) > 20
    assert Timed(ours.METHODS["bilevel"]["products"], task).time() != cold


def test_a_solver_that_cannot_hold_the_error_is_absent_with_the_reason(tmp_path, monkeypatch):
    def never(product, b, v, tolerance):
        return torch.zeros_like(b)

    def cg(product, b, v, tolerance):
        solver = CG(iterations=1000, tolerance=tolerance)
        return solver.solve(lambda u: {"w": product(u["w"])}, {"w": b}, {"w": v}).solution["w"]

    task = TASKS["products"](toy=True)
    with pytest.raises(CannotHold, match=r"no tolerance down to 1e-16 .* an error of 0.001"):
        Told(task, never)
    assert Told(task, cg).products() > 20  # control: of one that can, products are counted

    class Saying:
        def __init__(self, method):
            self.method = method

        def ask(self, word):
            if self.method == "torchopt":
                raise CannotHold("for a reason")
            return {"memory": 0, "time": 1.0, "value": [[0.0]]}[word]

    monkeypatch.setattr(run, "worker", lambda method, *rest: nullcontext(Saying(method)))
    monkeypatch.setattr(by_hand, "TRUTH", {"products": lambda task: {"w": torch.ones(1)}})
    row = Row("toy", ("floor", "torchopt"), 1, {"betty-ml": "it is wrong"})
    found = measure("products", row, "toy", 3, tmp_path)
    assert [(method.name, len(method.seconds)) for method in found.methods] == [("floor", 3)]
    assert found.absent == {"betty-ml": "it is wrong", "torchopt": "for a reason"}


def test_a_row_is_measured_in_a_process_of_its_own(tmp_path):
    row = Row("toy", ("autograd, all graphs kept",), 2)
    found = measure("unroll", row, "toy", 2, tmp_path)
    (method,) = found.methods
    assert len(method.seconds) == 2
    assert method.error < 1e-5


def test_start_up_is_measured_to_the_end_and_to_the_first_line(tmp_path):
    spin = "x = sum(range(3_000_000))"
    code = f"print('a line', flush=True); {spin}; {spin}; {spin}"
    command = [run.sys.executable, "-S", "-c", code]
    first, whole = startup.until_first_line(command, tmp_path), startup.until_end(command, tmp_path)
    assert 0 <= first < whole
    with pytest.raises(RuntimeError, match="exit 3"):
        startup.until_end([run.sys.executable, "-S", "-c", "raise SystemExit(3)"], tmp_path)
    with pytest.raises(RuntimeError, match="without a line"):
        startup.until_first_line([run.sys.executable, "-S", "-c", ""], tmp_path)


def row_of(name="cg", **changes):
    methods = [
        Method("floor", [1.0, 4.0, 2.0], 100_000_000, None),
        Method("bilevel", [2.0, 4.4, 2.2], 50_000_000, 1e-7),
        Method("peer", [1.0, 5.0, 2.0], 200_000_000, 1e-6),
        Method("broken", [0.1, 0.1, 0.1], 200_000_000, 0.3),
    ]
    made = {"absent": {"other": "it has none"}, "commit": "abc", "date": "2026-01-02"}
    made |= {"row": name, "floor": "floor", "methods": methods, "machine": measured.machine()}
    return Measured(**made | changes)


def test_the_table_takes_ratios_within_a_round_and_marks_what_is_wrong_or_lost():
    lines = table(row_of()).splitlines()
    assert lines == [
        "| | CPU time | / floor | / peer, the best peer | peak MB | relative error |",
        "|---|---|---|---|---|---|",
        "| floor | 2 s | 1.00 |  | 100 | – |",
        "| bilevel | 2.2 s | 1.10 (1.10 to 1.55) | **1.10** | 50 | 1e-07 |",
        "| peer | 2 s | 1.00 (1.00 to 1.12) |  | 200 | 1e-06 |",
        "| broken | 100 ms | 0.05 (0.04 to 0.08) |  | 200 | **0.3, wrong** |",
        "| other | – | | | | |",
        "",
        "- other: it has none.",
    ]
    faster = row_of(
        methods=[Method("floor", [2.0]), Method("bilevel", [1.0]), Method("peer", [2.0])]
    )
    assert "| bilevel | 1 s | 0.50 | 0.50 | – |" in table(faster)
    assert summary([row_of(), faster]).splitlines()[2:] == [
        "| cg | 2.2 s | 1.10 (1.10 to 1.55) | peer | **1.10** |",
        "| cg | 1 s | 0.50 | peer | 0.50 |",
    ]


def test_a_value_that_is_no_number_is_wrong():
    assert Method("peer", [1.0], 1, float("nan")).is_wrong
    assert not Method("peer", [1.0], 1, 1e-2).is_wrong


@pytest.fixture
def state(monkeypatch):
    now = {"commit": "abc"}
    monkeypatch.setattr(measured, "commit", lambda: now["commit"])
    return now


def test_the_command_goes_on_with_the_rows_that_are_missing(tmp_path, state):
    asked = []

    def how(name):
        if name == "maml" and not asked.count("maml"):
            asked.append(name)
            raise KeyboardInterrupt
        asked.append(name)
        return row_of(name, commit="", date="", machine={})

    with pytest.raises(KeyboardInterrupt):
        run.go(["cg", "maml", "loop"], how, tmp_path)
    assert run.go(["cg", "maml", "loop"], how, tmp_path) == ["maml", "loop"]
    assert asked == ["cg", "maml", "maml", "loop"]
    assert run.go(["cg", "maml"], how, tmp_path) == []
    assert run.go(["cg"], how, tmp_path, again=True) == ["cg"]
    state["commit"] = "def"
    assert run.go(["cg", "maml"], how, tmp_path) == ["cg", "maml"]
    lines = measured.history(tmp_path)
    assert [(line["commit"], list(line["rows"])) for line in lines] == [
        ("abc", ["cg", "maml", "loop"]),
        ("abc", ["cg"]),
        ("def", ["cg", "maml"]),
    ]
    assert lines[0]["rows"]["cg"] == {"floor": 1.1, "peer": 1.1, "best": "peer"}
    assert lines[0]["machine"] == measured.machine()


def test_what_is_kept_is_read_as_it_was(tmp_path):
    measured.save(row_of("cg, larger batch"), tmp_path)
    assert measured.load("cg, larger batch", tmp_path) == row_of("cg, larger batch")
    assert measured.load("maml", tmp_path) is None


def test_the_page_is_made_of_what_is_kept_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "measure", None)
    path = tmp_path / "page.md"
    places = ("machine", "summary", "cg", "start-up")
    path.write_text("".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in places))
    measured.save(row_of(), tmp_path)
    methods = [Method("import torch", [2.0]), Method("bilevel", [0.5])]
    measured.save(row_of("start-up, ls", floor="import torch", methods=methods), tmp_path)
    page.write(path, tmp_path)
    text = path.read_text(encoding="utf-8")
    assert "old" not in text
    assert table(row_of()) in text
    assert "| `bilevel ls` | 500 ms | 0.25 |" in text
    assert "commit abc, 3 rounds: cg" in text
    before = text
    page.write(path, tmp_path)
    assert path.read_text(encoding="utf-8") == before
    measured.save(row_of("maml"), tmp_path)
    with pytest.raises(ValueError, match="maml"):
        page.write(path, tmp_path)


def test_the_page_is_that_of_what_is_kept_now():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.written(text, page.rows()) == text, "run python -m tests.benchmarks.page"
    for name in TASKS:
        assert f"<!-- {name} -->\n" in text
    kept = json.loads(growth.KEPT.read_text(encoding="utf-8"))["axes"]
    assert growth_table(kept) in text


def test_start_up_is_a_table_of_commands():
    methods = [Method("import torch", [2.0]), Method("bilevel", [0.5]), Method("jax", [1.0])]
    row = Measured("start-up, import", "import torch", methods)
    run_ = Measured("start-up, run", "import torch", methods[:2])
    assert startup_table([row, run_]).splitlines()[2:] == [
        "| `import torch` | 2 s | 1.00 |",
        "| `import bilevel` | 500 ms | 0.25 |",
        "| `import jax` | 1 s | 0.50 |",
        "| `bilevel run` | 500 ms | 0.25 |",
    ]


ASKED = {
    # (work, memory) at most, by what the arithmetic asks for
    ("x", "implicit, CG"): (1, 1),
    ("y", "implicit, CG"): (1, 1),
    ("y", "unroll, recompute"): (1, 1),
    ("tasks", "unroll, store"): (1, 1),
    ("batch", "unroll, store"): (1, 1),
    ("K", "implicit, CG"): (1, 0),
    ("K", "unroll, store"): (1, 1),
    ("K", "unroll, checkpoint"): (1.02, 0.5),
}
SIZES = {"x": (4096, 16384), "y": (1024, 4096), "K": (16, 64), "tasks": (8, 32), "batch": (64, 256)}


@pytest.mark.untrusted("lower steps of a fixed number")
@pytest.mark.parametrize(("axis", "name"), ASKED)
def test_no_exponent_is_above_what_the_arithmetic_asks_for(axis, name):
    found = growth.counts(name, axis, SIZES[axis])
    work, memory = ASKED[axis, name]
    assert exponent(SIZES[axis], found["work"]) <= work + 0.02
    assert exponent(SIZES[axis], found["memory"]) <= memory + 0.02


def test_a_count_that_grows_faster_is_seen():
    """Negative control: pairs of entries are work and memory of exponent 2."""

    def pairs(n):
        return growth.counted(lambda: torch.outer(torch.ones(n), torch.ones(n)).sum())

    found = [pairs(n) for n in (64, 256)]
    for kind_ in ("work", "memory"):
        assert exponent((64, 256), [one[kind_] for one in found]) > 1.9


def test_memory_that_is_freed_is_not_counted_twice():
    def waves():
        for _ in range(5):
            torch.ones(1000).sum()

    found = growth.counted(waves)
    assert found["work"] == 5 * 1001
    assert 4000 <= found["memory"] <= 4000 + 5 * 64
