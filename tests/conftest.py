"""One thread, no network, float64 where truth is compared."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("COLUMNS", "80")

import torch
from hypothesis import settings

torch.set_num_threads(1)

# shared machines are slow at times, which is no failure; and a run is repeatable
settings.register_profile("bilevel", deadline=None, derandomize=True)
settings.load_profile("bilevel")
