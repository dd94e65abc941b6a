"""The notebooks of the site do what they show: executed, they print what is kept."""

import copy

import nbformat
import pytest

from docs import execute


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kept():
    return [nbformat.read(path, 4) for path in execute.paths()]


def test_they_print_what_is_kept(tmp_path):
    before = kept()
    after = execute.executed(copy.deepcopy(before), tmp_path)
    found = {
        (path.name, number): list(execute.differences(*cells))
        for path, *pair in zip(execute.paths(), before, after, strict=True)
        for number, cells in enumerate(zip(*map(code_cells, pair), strict=True))
    }
    assert len(found) > 8
    assert {where: what for where, what in found.items() if what} == {}


def test_they_are_kept_executed_and_are_one_page_each():
    for notebook in kept():
        cells = code_cells(notebook)
        assert all(output.output_type != "error" for cell in cells for output in cell.outputs)
        assert any(cell.outputs for cell in cells)
        assert notebook.cells[0].source.startswith("# ")
        assert len(nbformat.writes(notebook)) < 200_000


def cell(text, tags=(), kind="text/plain"):
    output = nbformat.v4.new_output("execute_result", {kind: text, "text/plain": text})
    return nbformat.v4.new_code_cell(outputs=[output], metadata={"tags": list(tags)})


@pytest.mark.parametrize(
    ("old", "new", "tags", "agree"),
    [
        ("F 0.01585 done", "F 0.01586 done", (), True),
        ("F 0.01585 done", "F 0.02585 done", (), False),
        ("exact", "wrong", (), False),
        ("error 1.1e-12", "error 3.3e-14", (), True),  # rounding
        ("error 1.1e-12", "error 1.1e-02", (), False),
        ("9 gradients in 0.9s", "9 gradients in 1m03s", (), True),
        ("9 gradients in 0.9s", "8 gradients in 0.9s", (), False),
        ("a b", "a b c", (), False),
        ("# ms\n1 \x1b[32mcg\x1b[0m 2.4 2/5/1", "1 cg 99 2/5/1\nms left out", ("measured",), True),
        ("1 cg 2.4 2/5/1", "1 cg 2.4 2/6/1", ("measured",), False),
        ("1 cg 2.4 2/5/1", "1 gmres 2.4 2/5/1", ("measured",), False),
        ("1 cg 2/5/1\n2 gmres 3/5/1", "1 cg 2/5/1", ("measured",), False),
    ],
)
def test_what_a_cell_printed_is_compared(old, new, tags, agree):
    assert (not list(execute.differences(cell(old, tags), cell(new)))) is agree


def test_an_output_of_another_kind_is_found():
    assert list(execute.differences(cell("a", kind="text/html"), cell("a")))
    assert list(execute.differences(cell("a"), nbformat.v4.new_code_cell()))
