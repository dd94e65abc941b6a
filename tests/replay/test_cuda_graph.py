"""Regions captured as CUDA graphs: what they read and write. The device is a stand-in."""

import itertools
from dataclasses import replace

import pytest
import torch

from bilevel.estimators import Unroll
from bilevel.events import CAPTURED, Warned
from bilevel.replay import cuda_graph
from bilevel.replay.cuda_graph import by_cuda_graph, is_on_device
from bilevel.replay.program import Departed, Feed, record
from bilevel.replay.recorder import Recorder
from bilevel.replay.regions import Compiler, is_tensor
from bilevel.run import engine
from bilevel_problems.logistic import Logistic
from tests.replay.steps import X, long
from tests.run.replays import SETUPS, ended, require_same
from tests.run.setups import setup

DATA = torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(3, 3)


def stand_in(function, device):
    """A capture as a device has it: a replay writes into the results that it had at first."""
    results = function()

    def replay():
        for result, one in zip(results, function(), strict=True):
            result.copy_(one)

    return results, replay


def graphs(region, given):
    return by_cuda_graph(region, given, stand_in)


GRAPHS = Compiler("cuda graph", "on CUDA", graphs, CAPTURED, is_exact=True)


def captured(step, *, by=GRAPHS, draws=None):
    found, program = record(step, X, Feed(draws or {}).iterators())
    program.compile(by)
    return found, program


def test_replays_are_the_step_on_what_each_is_given():
    def step(x, _):
        y = DATA @ long(x) + x
        return [long(y) * y.sum().item(), y]

    found, program = captured(step)
    for x, expected in ((X, found), (X.flip(0), step(X.flip(0), None)), (X, found)):
        assert all(map(torch.equal, program(x, Feed({})), expected))


def test_results_stay_when_the_next_replay_writes_over_the_graphs():
    def step(x, _):
        return long(DATA @ x)

    found, program = captured(step)
    first = program(X, Feed({}))
    program(X + 1, Feed({}))
    assert torch.equal(first, found)


def test_what_is_given_is_not_written_into_and_may_change_places():
    x = X.clone()
    _, program = captured(lambda x, _: long(DATA @ x))
    for _ in range(2):
        program(x, Feed({}))
    assert torch.equal(x, X)
    assert torch.equal(program(x.clone(), Feed({})), long(DATA @ X))


def test_constants_are_read_where_they_are(monkeypatch):
    """No copy of the data; what is written into them between two replays is seen, as by the step."""
    data, read = DATA.clone(), []

    def by(region, given):
        read.extend(one.data_ptr() for one in given)
        return graphs(region, given)

    _, program = captured(lambda x, _: long(data @ x), by=replace(GRAPHS, compile=by))
    assert data.data_ptr() in read
    data.mul_(2)
    assert torch.equal(program(X, Feed({})), long(data @ X))


def test_a_slice_is_laid_out_as_the_step_has_it():
    def step(x, _):
        return long(DATA * x)[:, :2]

    found, program = captured(step)
    again = program(X, Feed({}))
    assert torch.equal(again, found)
    assert again.stride() == found.stride() == (3, 1)


def test_a_decision_is_still_looked_at():
    def step(x, _):
        y = long(x) + x
        return long(y) if y.sum().item() < 50 else y

    _, program = captured(step)
    with pytest.raises(Departed):
        program(X + 40, Feed({}))


def test_operations_with_a_number_on_the_cpu_are_in_no_region():
    """Which a graph would freeze: the count of steps of Adam is one."""
    devices = {"here": torch.device("cuda"), "there": torch.device("cpu")}

    def step(given, _):
        return long(given["here"]) * (given["there"] + 1).sqrt() + long(given["here"])

    recorder = Recorder()
    given = {"here": X, "there": torch.tensor(2.0, dtype=torch.float64)}
    leaves = {name: recorder.input(one, name) for name, one in given.items()}
    with recorder:
        out = step(leaves, None)
    recorder.graph.output((recorder.node_of(out),))
    from bilevel.replay.graph import shorten

    constants = shorten(recorder.graph, recorder.written)
    for node in recorder.graph.nodes:  # as they would be, with the one entry on a device
        if node.op == "placeholder":
            node.meta["device"] = devices.get(node.name, torch.device("cuda"))
        elif "device" in node.meta:
            alone = node.meta["form"][0] == ()
            node.meta["device"] = torch.device("cpu" if alone else "cuda")
    taken = [node.target.__name__ for node in recorder.graph.nodes if is_on_device(node)]
    others = [
        node.target.__name__
        for node in recorder.graph.nodes
        if is_tensor(node) and not is_on_device(node)
    ]
    assert others == ["add", "sqrt", "mul"]
    assert taken == ["sin", "add", "exp", "sub", "cos", "add"]
    assert constants == []


def test_a_region_is_cut_where_an_operation_is_not_taken():
    regions = []

    def by(region, given):
        names = [n.target.__name__ for n in region.graph.nodes if n.op == "call_function"]
        regions.append(names)
        return graphs(region, given)

    def takes(node):
        return is_tensor(node) and node.target.__name__ != "sinh"

    found, program = captured(
        lambda x, _: long(long(x).sinh()), by=replace(GRAPHS, compile=by, takes=takes)
    )
    assert [len(names) for names in regions] == [5, 5]
    assert torch.equal(program(X, Feed({})), found)


PLAIN = setup(Logistic(data="synthetic", num_features=6), Unroll(memory="store"), steps=9)


@pytest.mark.parametrize("name", SETUPS)
def test_a_run_by_graphs_is_the_run(name, monkeypatch):
    """Also where a step adds up in place, as CG does: while it is recorded, its small tensors are new ones."""
    monkeypatch.setattr(engine, "compiler_of", lambda s: GRAPHS)
    plain, found = ended(SETUPS[name]), ended(replace(SETUPS[name], compile="step"))
    require_same(plain, found)
    assert [trace.why for trace in found[2]] == ["", CAPTURED]


def test_a_capture_that_fails_or_is_wrong_leaves_the_replay_as_it_is(monkeypatch):
    calls = itertools.count()

    def fails(function, device):
        raise RuntimeError("operation not permitted when stream is capturing\n…")

    def wrong(function, device):
        results, replay = stand_in(function, device)

        def off():
            replay()
            if next(calls) % 2:
                results[0].add_(1e-15)

        return results, off

    for capture, said in (
        (fails, "not permitted when stream is capturing"),
        (wrong, "other numbers"),
    ):
        by = replace(GRAPHS, compile=lambda r, g, c=capture: by_cuda_graph(r, g, c))
        monkeypatch.setattr(engine, "compiler_of", lambda s, by=by: by)
        plain, found = ended(PLAIN), ended(replace(PLAIN, compile="step"))
        assert found[0].warned.pop("cuda graph") == 0
        require_same(plain, found)
        s = replace(PLAIN, compile="step")
        warned = [e.message for e in engine.run(s, engine.start(s)) if isinstance(e, Warned)]
        assert said in warned[0]


def test_graphs_are_of_cuda_and_of_records():
    def of(compile, device):
        s = replace(PLAIN, compile=compile)
        object.__setattr__(s, "device", torch.device(device))
        return engine.compiler_of(s)

    assert of("step", "cpu") is of("off", "cuda") is None
    assert of("step", "cuda").compile is cuda_graph.by_cuda_graph
    assert of("step", "cuda").is_exact
    assert of("inductor", "cuda").kind == "inductor"
