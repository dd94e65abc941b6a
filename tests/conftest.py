"""One thread, no network, float64 where truth is compared."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("COLUMNS", "80")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# shared machines are slow at times, which is no failure; and a run is repeatable
settings.register_profile("bilevel", deadline=None, derandomize=True)
settings.load_profile("bilevel")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Warnings are errors; `untrusted` lets `UntrustedWarning` pass in a test that says why."""
    for item in items:
        mark = item.get_closest_marker("untrusted")
        if mark:
            (why,) = mark.args
            assert isinstance(why, str), f"{item.nodeid}: @pytest.mark.untrusted says why"
            item.add_marker(pytest.mark.filterwarnings("ignore::bilevel.errors.UntrustedWarning"))
