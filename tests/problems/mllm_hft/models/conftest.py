"""Tiny models on disk, each built once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.problems.mllm_hft.models.folders import BUILDERS


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family; not to be written to."""
    built: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in built:
            built[family] = BUILDERS[family](tmp_path_factory.mktemp(family))
        return built[family]

    return get
