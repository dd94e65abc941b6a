"""The parts of a comparison against hand-made truth; cells run in this process to save time."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bilevel import recipe as recipes
from bilevel import registry
from bilevel.cli.compare import left, shrinking
from bilevel.cli.names import shipped
from bilevel.comparing import cell, figure, files, launch, plan, scene, table
from bilevel.comparing.memory import peak
from bilevel.errors import ProblemError, RecipeError, RequirementError
from bilevel.estimators import betty
from bilevel.recipe.seeds import parse_seeds
from bilevel.registry import presets
from tests.comparing.cells import GREEDY, SHORT, variant

TIGHT = {"name": "implicit", "solver": {"name": "cg", "iterations": 100, "tolerance": 1e-12}}
CPU = torch.device("cpu")


def measure(points: Path, recipe, where: Path, budget: int | None = None) -> dict:
    path = where / "cell.yaml"
    path.write_text(recipe.dump())
    spec = {
        "kind": "cell",
        "recipe": str(path),
        "folder": str(points),
        "budget": budget,
        "result": str(where / "cell.json"),
    }
    cell.main(spec)
    return files.read(where / "cell.json")


def test_the_points_lie_along_the_run_and_hold_the_truth(quadratic, points):
    truths = list(scene.load(points))
    assert [truth.step for truth in truths] == [0, 2, 4]
    for truth in truths:
        x = truth.state["x"]
        assert truth.reference is not None
        assert truth.reference.name == "closed form"
        assert torch.equal(truth.reference.truth, quadratic.problem.hypergradient(x)["x"])
        assert torch.equal(truth.tight["y"], quadratic.problem.lower_solution(x)["y"])


def test_a_converged_solve_has_no_error_and_a_cut_off_one_has(quadratic, points, tmp_path):
    cut = {"name": "implicit", "solver": {"name": "cg", "iterations": 2}}
    made = variant(quadratic, tight=TIGHT, cut=cut)
    errors = {}
    for label in ("tight", "cut"):
        found = measure(points, made[label], tmp_path)
        assert found["status"] == "ok"
        errors[label] = [point["error"] for point in found["along"]]
        in_run = [point["error_in_run"] for point in found["along"]]
        assert min(in_run) > 1e-3  # twenty lower steps do not solve the lower level
        assert found["estimate"]["gradients"] == 2 + 0
        assert found["estimate"]["cross_products"] == 1
        assert found["estimate"]["hvps"] == found["estimate"]["iterations"]
    assert max(errors["tight"]) < 1e-9
    assert min(errors["cut"]) > 1e-3  # negative control


def test_a_warm_start_is_measured_and_helps_a_solve_that_is_cut_off(quadratic, points, tmp_path):
    """Two CG steps go on where those of the point before ended; without its state they cannot."""
    cut = {"name": "implicit", "solver": {"name": "cg", "iterations": 2}}
    made = variant(quadratic, warm=cut, cold={**cut, "start": "cold"}, none="none")
    along = {label: measure(points, recipe, tmp_path)["along"] for label, recipe in made.items()}
    assert not [key for key in along["warm"][0] if "warm" in key]  # nothing came before
    for point in along["warm"][1:]:
        assert point["error_again"] < 0.9 * point["error_warm"] < 0.8 * point["error"]
        assert point["hvps_warm"] == 3  # one more, for the residual of a start that is not zero
    for label in ("cold", "none"):  # negative control: a state that is not used changes nothing
        for point in along[label][1:]:
            assert point["error_again"] == point["error_warm"] == point["error"]


def test_counts_are_those_of_the_estimator(quadratic, points, tmp_path):
    found = measure(points, variant(quadratic, none="none")["none"], tmp_path)
    got = [found["estimate"][name] for name in ("gradients", "hvps", "cross_products")]
    assert got == [1, 0, 0]


def test_the_budget_is_that_of_the_recipe_and_is_kept(quadratic, points, tmp_path):
    own = measure(points, quadratic, tmp_path)["run"]
    # 4 steps: 20 lower gradients, 2 gradients, 10 HVPs or one more from a warm start, 1 cross
    assert own["budget"] == own["calls"]
    assert own["steps"] == 4
    assert 4 * 33 <= own["budget"] <= 4 * 34
    cheap = measure(points, variant(quadratic, none="none")["none"], tmp_path)["run"]
    assert cheap["steps"] == own["budget"] // 21  # 20 lower gradients and 1
    assert cheap["calls"] == 21 * cheap["steps"] <= own["budget"]
    small = measure(points, quadratic, tmp_path, budget=40)["run"]
    assert small["steps"] == 1
    assert small["upper_loss"] > own["upper_loss"]
    assert small["at"] == "y*(x)"


def test_f_reached_is_the_closed_form_value_at_the_end_of_the_run(quadratic, points, tmp_path):
    x = list(scene.load(points))[-1].state["x"]
    problem = quadratic.problem
    value = problem.upper_loss(x, problem.lower_solution(x), problem.constants)
    got = measure(points, quadratic, tmp_path)["run"]["upper_loss"]
    assert got == pytest.approx(float(value), rel=1e-12)


def test_memory_sees_what_an_estimator_allocates(quadratic, points, tmp_path):
    (tmp_path / "greedy.py").write_text(GREEDY)
    name = f"{tmp_path / 'greedy.py'}:Greedy"
    made = variant(quadratic, much={"name": name}, none={"name": name, "megabytes": 0})
    much = measure(points, made["much"], tmp_path)["estimate"]
    little = measure(points, made["none"], tmp_path)["estimate"]
    assert "lower bound" not in much["memory_is"]
    assert much["memory"] - little["memory"] == pytest.approx(200e6, rel=0.2)


def test_memory_freed_before_does_not_count():
    torch.ones(50_000_000)
    with peak(CPU) as nothing:
        pass
    with peak(CPU) as some:
        torch.ones(10_000_000)
    assert nothing.bytes < 5e6
    assert some.bytes == pytest.approx(40e6, rel=0.2)


def test_pareto_front_of_known_points():
    known = {"a": (1, 9.0), "b": (2, 3.0), "c": (3, 3.0), "d": (5, 1.0), "e": (6, 2.0)}
    assert table.pareto(known) == {"a", "b", "d"}
    assert table.pareto(known | {"f": (1, 0.5)}) == {"f"}
    assert table.pareto({"a": (1, 1.0), "twin": (1, 1.0)}) == {"a", "twin"}


def found(error: float | None, hvps: int, status: str = "ok") -> dict:
    cost = {"seconds": 1.0, "memory": 1, "gradients": 2, "hvps": hvps, "cross_products": 1}
    point = {"error": error, "cosine": 1.0, "error_in_run": error}
    return {"status": status, "reason": "why", "estimate": cost, "along": [point]}


def test_rows_are_ranked_by_error_then_by_hvps():
    results = [
        ("bad", 0, found(0.5, 0)),
        ("dear", 0, found(1e-12, 30)),
        ("unknown", 0, found(None, 1)),
        ("cheap", 0, found(1e-9, 10)),
    ]
    rows = table.rows(results, tolerance=1e-6)
    assert [(r.label, r.rank) for r in rows] == [
        ("cheap", 1),
        ("dear", 2),
        ("bad", 3),
        ("unknown", None),
    ]
    assert [r.label for r in table.rows(results, 0.0)][:2] == ["dear", "cheap"]
    assert [r.warm for r in rows] == [None] * 4  # cells of before this was measured
    assert {r.label for r in rows if r.is_front} == {"bad", "cheap"}  # dear is no better than cheap
    assert {r.label for r in table.rows(results, 0.0) if r.is_front} == {"bad", "cheap", "dear"}


def test_a_reason_is_said_once_with_its_seeds():
    broken = {"status": "failed", "reason": "it broke"}
    other = {"status": "failed", "reason": "killed"}
    (row,) = table.rows([("a", 0, broken), ("a", 1, other), ("a", 2, broken)], 0.0)
    assert row.failures == ("seeds 0, 2: it broke", "seed 1: killed")


@pytest.mark.parametrize(
    ("warm", "tolerance", "has_state"),
    [(0.3, 0.0, True), (0.9, 0.0, True), (0.5, 0.0, False), (0.3, 1.0, False), (None, 0.0, False)],
)
def test_what_lives_from_its_state_is_marked(warm, tolerance, has_state):
    result = found(0.5, 1)
    result["along"].append({**result["along"][0], "error_warm": warm})
    (row,) = table.rows([("a", 0, result)], tolerance)
    assert row.has_state is has_state


def test_the_time_left_is_that_of_the_like_measured_now_or_before(quadratic):
    made = plan.make(quadratic, labels=["none", "kkt"], seeds=(0, 1))
    cells = {(c.label, c.seed): c for c in made.cells}

    def done(label: str | None, seed: int, seconds: float, reused: bool) -> launch.Done:
        cell = cells[label, seed] if label else None
        return launch.Done(label or "points", seed, {"status": "ok"}, reused, seconds, cell)

    first = [done(None, 0, 7.0, True)]
    assert left(made, first) == 7.0 * 5  # points and two cells of seed 1, two cells of seed 0
    first += [
        done("implicit", 0, 3.0, True),
        done("none", 0, 1.0, True),
        done("kkt", 0, 0.0, False),
    ]
    assert left(made, first) == 7.0 + 3.0 + 1.0  # kkt cannot work: nothing is started
    assert left(made, []) == left(made, first[-1:]) == 0.0  # nothing is known
    every = [*first, *(done(label, 1, 1.0, False) for label in (None, "implicit", "none", "kkt"))]
    assert left(made, every) == 0.0


def test_a_gradient_that_shrinks_is_told():
    points = [{"step": step, "size": size} for step, size in ((0, 50.0), (2, 9.0), (4, 0.5))]
    assert "from 5.0e+01 at the start of the run to 5.0e-01" in (shrinking(points) or "")
    assert shrinking(points[:2]) is None
    assert shrinking([{"step": 0, "size": None}, {"step": 1}]) is None


def test_one_named_that_is_not_installed_is_a_cell_that_says_why(quadratic, monkeypatch):
    def absent():
        raise RequirementError("betty-ml is not installed")

    monkeypatch.setattr(betty, "require", absent)
    made = plan.make(quadratic, labels=["betty:neumann", "none"], seeds=(0, 1))
    refused = {(c.label, c.seed): c.refused for c in made.cells if c.refused}
    assert refused == {("betty:neumann", seed): "betty-ml is not installed" for seed in (0, 1)}
    assert not made.left_out
    with pytest.raises(RequirementError, match="betty:neumann: betty-ml is not installed"):
        plan.make(quadratic, labels=["betty:neumann"])
    with pytest.raises(ProblemError, match="not installed; kkt: "):
        plan.make(quadratic, labels=["betty:neumann", "kkt"])


def test_medians_are_over_seeds_and_failures_are_named():
    results = [("a", seed, found(error, 1)) for seed, error in enumerate((0.1, 0.5, 0.2))]
    results.append(("a", 3, {"status": "failed", "reason": "it broke"}))
    (row,) = table.rows(results, 0.0)
    assert row.error == 0.2
    assert row.failures == ("seed 3: it broke",)
    assert row.spread["error"] == (0.1, 0.5)
    (alone,) = table.rows(results[:1], 0.0)
    assert alone.spread == {}  # one seed has none


def test_the_figure_is_png_and_svg(tmp_path):
    pytest.importorskip("matplotlib")
    rows = table.rows([("a", 0, found(0.5, 0)), ("b", 0, found(0.0, 9))], 0.0)
    png, svg = figure.draw(rows, tmp_path, "title")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()
    first = svg.read_bytes()
    assert figure.draw(rows, tmp_path, "title")[1].read_bytes() == first
    assert figure.draw([replace(row, error=None) for row in rows], tmp_path, "t") == []


def drawn(results, tolerance: float):
    pytest.importorskip("matplotlib")
    return figure.compose(table.rows(results, tolerance), "title")


def test_the_front_is_a_staircase_and_all_is_named():
    results = [("a", 0, found(0.5, 0)), ("b", 0, found(1e-3, 9)), ("c", 0, found(0.7, 20))]
    results += [("d", 0, found(1e-12, 30)), ("lost", 0, {"status": "failed", "reason": "why"})]
    made = drawn(results, 1e-6)
    (axes,) = made.axes
    (front,) = [line for line in axes.lines if line.get_label() == "Pareto front"]
    corners = [tuple(corner) for corner in front.get_xydata()]
    for before, after in itertools.pairwise(corners):
        assert before[0] == after[0] or before[1] == after[1], "no slope"
    assert {(3, 0.5), (12, 1e-3), (33, 1e-6 / 3)} <= set(corners)  # 1e-12 is not told from 1e-7
    assert (12, 0.5) in corners
    names = [text.get_text() for text in made.legends[0].get_texts()]
    assert names[0] == "below 1e-06: the reference tells no two apart"
    assert names[-1] == "failed: lost"
    assert "on the Pareto front" in names
    without = drawn(results[:3], 0.0)
    assert len(without.legends[0].get_texts()) == len(names) - 2  # no zone, no failure


@pytest.mark.parametrize("errors", [(0.3, 0.45), (1e-12, 0.5)], ids=["narrow", "wide"])
def test_ticks_do_not_overlap(errors):
    made = drawn(
        [(name, 0, found(e, n)) for name, e, n in zip("ab", errors, (2, 40), strict=True)], 0.0
    )
    renderer = made.canvas.get_renderer()
    for axis in (made.axes[0].xaxis, made.axes[0].yaxis):
        low, high = sorted(axis.get_view_interval())
        ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        boxes = [tick.label1.get_window_extent(renderer) for tick in ticks]
        assert len(boxes) >= 2
        assert not any(one.overlaps(two) for one, two in itertools.combinations(boxes, 2))
        assert not any(text.get_text() for text in axis.get_minorticklabels())


def test_labels_hide_neither_each_other_nor_a_point():
    results = [(f"method_{n}", 0, found(0.9 - n / 60, n % 5)) for n in range(24)]
    made = drawn(results, 1e-6)
    renderer, (axes,) = made.canvas.get_renderer(), made.axes
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    names = [name for text in axes.texts for name in text.get_text().split("\n")]
    assert sorted(names) == sorted(label for label, _, _ in results)
    assert not any(one.overlaps(two) for one, two in itertools.combinations(boxes, 2))
    for markers in axes.collections:
        for at in axes.transData.transform(markers.get_offsets()):
            assert not any(box.contains(*at) for box in boxes)


def test_seeds():
    assert parse_seeds("0..3") == (0, 1, 2, 3)
    assert parse_seeds("5, 1..2,2") == (5, 1, 2)
    with pytest.raises(RecipeError, match="more than 1,000 of them"):
        parse_seeds("0..99999999999")
    for wrong in ("", "a", "3..1", "-1", "1...2"):
        with pytest.raises(RecipeError, match="--seeds"):
            parse_seeds(wrong)


def test_a_plan_has_the_own_estimator_first_with_its_options(quadratic):
    made = plan.make(quadratic, labels=["unroll", "implicit"], seeds=(0, 3))
    assert [(c.label, c.seed) for c in made.cells] == [
        ("implicit", 0),
        ("implicit", 3),
        ("unroll", 0),
        ("unroll", 3),
    ]
    assert made.cells[0].recipe == quadratic
    assert made.scenes[3].seed == 3
    changed = recipes.load(shipped()["quadratic"], [*SHORT, "lower.steps=21"])
    assert plan.make(changed, labels=[]).name != made.name
    assert len({c.stem for c in made.cells}) == 4


def test_without_labels_what_cannot_work_is_left_out():
    made = plan.make(recipes.load(shipped()["ridge"]))
    assert "cannot be replayed" in made.left_out["unroll"]
    assert {"implicit", "alternating"} <= {c.label for c in made.cells}


def test_one_named_that_cannot_work_is_a_cell_that_says_why():
    ridge = recipes.load(shipped()["ridge"])
    made = plan.make(ridge, labels=["unroll", "kkt", "none"])
    refused = {c.label: c.refused for c in made.cells}
    assert refused["implicit"] is refused["none"] is None
    assert "cannot be replayed" in (refused["unroll"] or "")
    assert "lower_constraints" in (refused["kkt"] or "")
    assert not made.left_out
    with pytest.raises(ProblemError, match=r"unroll: .* kkt: .*lower_constraints"):
        plan.make(ridge, labels=["unroll", "kkt"])


def test_all_are_the_presets_too(quadratic):
    made = plan.make(quadratic, labels=["all"], given={"cut": "none"})
    labels = {c.label for c in made.cells}
    assert labels | set(made.left_out) >= {
        *registry.names("estimators"),
        *presets.of("estimators"),
        "cut",
    }
    assert {"darts", "soba", "cut"} <= labels
    assert {"fomaml", "kkt", "shine"} <= set(made.left_out)
    assert (
        presets.of("estimators").keys().isdisjoint(c.label for c in plan.make(quadratic).cells)
    )  # without labels: components alone


def test_labels_become_names_of_files(quadratic):
    made = plan.Cell("betty:neumann", 0, quadratic, None)
    assert re.fullmatch(r"betty_neumann-seed0-\w{12}", made.stem)


def test_paths_begin_at_x_where_the_problem_says_so(tmp_path):
    """At the solution too: FOMAML and Reptile learn from nothing else."""
    tiny = ["problem.num_tasks=2", "problem.problem.num_held_out=2", "problem.problem.width=2"]
    recipe = recipes.load(
        shipped()["sinusoid"], [*tiny, "upper.steps=2", "evaluate.every=0", "sinks=[]"]
    )
    (tmp_path / "own.yaml").write_text(recipe.dump())
    scene.make(tmp_path / "own.yaml", tmp_path / "scene")
    for label, made in variant(recipe, fomaml="fomaml", reptile="reptile", maml="maml").items():
        found = measure(tmp_path / "scene", made, tmp_path)
        assert found["status"] == "ok", (label, found["reason"])
        assert found["run"]["steps"] >= 1


def test_wrong_labels_are_refused(quadratic, tmp_path):
    with pytest.raises(RecipeError, match="Did you mean 'unroll'"):
        plan.make(quadratic, labels=["unrol"])
    with pytest.raises(RecipeError, match="is taken"):
        plan.make(quadratic, given={"implicit": "none"})
    (tmp_path / "labels.yaml").write_text("few: {solver: cg}\n")
    with pytest.raises(RecipeError, match="few: must be a name"):
        plan.read_labels(tmp_path / "labels.yaml")
    (tmp_path / "labels.yaml").write_text("mine: my.py:Mine\n")
    with pytest.raises(RecipeError, match="there is no file"):
        plan.read_labels(tmp_path / "labels.yaml")
    (tmp_path / "my.py").touch()
    read = plan.read_labels(tmp_path / "labels.yaml")
    assert read == {"mine": f"{(tmp_path / 'my.py').resolve()}:Mine"}


def test_a_cell_is_a_program_of_its_own():
    code = "import bilevel.comparing, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
