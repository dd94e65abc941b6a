"""Fixtures of this folder."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture(autouse=True)
def _hang_ups() -> Iterator[None]:
    """A hang-up is one, also where the tests themselves are run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
