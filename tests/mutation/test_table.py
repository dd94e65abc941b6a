"""The table in docs/checking.md says what the sources and the list of no mistakes say."""

import ast
import re
from collections import Counter

import pytest

from tests.mutation.run import ROOM
from tests.mutation.sites import mutated, sample
from tests.mutation.table import EQUIVALENT, EVIDENCE

PAGE = (ROOM.parent / "docs" / "checking.md").read_text(encoding="utf-8")
ROWS = {
    file: [int(cell) for cell in cells.split("|")]
    for file, cells in re.findall(r"^\| `([\w/]+\.py)` \|([\d |]+)\|$", PAGE, re.MULTILINE)
}


def every_mutant(file):
    source = (ROOM / file).read_text(encoding="utf-8")
    return source, sample(file, source, 10_000)


@pytest.mark.parametrize("file", sorted({file for file, _ in EQUIVALENT}))
def test_what_is_no_mistake_is_a_mutant_that_there_is(file):
    _, mutants = every_mutant(file)
    listed = {reads for name, reads in EQUIVALENT if name == file}
    assert listed <= {mutant.reads for mutant in mutants}


def test_each_file_with_evidence_is_a_file_and_so_are_its_tests():
    for file, tests in EVIDENCE.items():
        assert (ROOM / file).is_file()
        assert all((ROOM.parent / test.split("::")[0]).exists() for test in tests)


def test_a_mutant_is_called_what_its_statement_then_reads():
    source, mutants = every_mutant("directions/spider.py")
    right = lines(ast.parse(source))
    assert len({mutant.reads for mutant in mutants}) > 5
    for mutant in mutants:
        now = lines(mutated(source, mutant))
        assert mutant.reads.split("  # ")[0] in now - right


def lines(source):
    return {line.strip() for line in ast.unparse(source).splitlines()}


def test_the_rows_add_up():
    assert ROWS
    assert set(ROWS) <= set(EVIDENCE)
    listed = Counter(file for file, _ in EQUIVALENT)
    for file, (mutants, killed, equivalent, left) in ROWS.items():
        assert mutants == killed + equivalent + left, file
        assert equivalent <= listed[file], file
    assert set(listed) <= set(ROWS)
