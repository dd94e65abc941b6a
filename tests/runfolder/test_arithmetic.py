"""What the CPU computes with: asked for before torch is imported, said of what was computed, and refused where it is another."""

import os
import subprocess
import sys

import pytest
import torch

from bilevel.errors import RequirementError
from bilevel.runfolder import arithmetic

HERE = torch.backends.cpu.get_cpu_capability()
SCRIPT = """
import sys
from bilevel.runfolder import arithmetic
from bilevel.studying.before_torch import choose_arithmetic
from pathlib import Path
choose_arithmetic(Path(sys.argv[1]))
assert "torch" not in sys.modules
import torch
torch.set_num_threads(1)
print(arithmetic.here())
"""


def said_by(study, tmp_path):
    """What a process of its own computes with that was given this study's file."""
    path = tmp_path / "study.yaml"
    path.write_text(study, encoding="utf-8")
    clean = {k: v for k, v in os.environ.items() if k not in arithmetic._READ_BY}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)],
        env=clean,
        capture_output=True,
        text=True,
        check=True,
    )
    return ran.stdout.strip()


@pytest.mark.skipif(HERE in ("DEFAULT", "NO AVX"), reason=f"the CPU has no other than {HERE}")
def test_a_study_has_its_cells_computed_with_other_instructions(tmp_path):
    usual = said_by("arithmetic: {}\n", tmp_path)
    asked = said_by("arithmetic: {instructions: default}\n", tmp_path)
    assert asked.startswith("DEFAULT, 1 thread, ")
    assert not usual.startswith("DEFAULT")
    assert asked.rpartition(", ")[2] != usual.rpartition(", ")[2]  # the bits are others


def test_what_is_said_is_the_same_each_time_and_tells_threads(monkeypatch):
    assert arithmetic.here() == arithmetic.here()
    number = torch.get_num_threads()
    try:
        torch.set_num_threads(number + 1)
        assert f"{number + 1} threads" in arithmetic.here()
    finally:
        torch.set_num_threads(number)


def test_another_digit_is_another_arithmetic(monkeypatch):
    """Control: an operation that is off in the last digit of one entry is told."""
    usual, right = arithmetic.here(), torch.bmm

    def off(one, other):
        found = right(one, other)
        found[0, 0, 0] = torch.nextafter(found[0, 0, 0], torch.tensor(torch.inf))
        return found

    monkeypatch.setattr(torch, "bmm", off)
    assert arithmetic.here() != usual


def test_what_is_required_sets_threads_and_is_known_to_others(monkeypatch):
    monkeypatch.setenv(arithmetic.NAMED, "none yet")
    number = torch.get_num_threads()
    try:
        arithmetic.require(HERE.lower(), number + 1)
        assert torch.get_num_threads() == number + 1
        assert arithmetic.required() == f"{HERE.lower()}, {number + 1} threads"
    finally:
        torch.set_num_threads(number)


def test_other_instructions_are_refused_with_the_remedy(monkeypatch):
    monkeypatch.setenv(arithmetic.NAMED, "none yet")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    with pytest.raises(RequirementError, match="ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2"):
        arithmetic.require("avx2", 1)
    assert arithmetic.required() == "none yet"
