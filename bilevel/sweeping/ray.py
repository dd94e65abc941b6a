"""Trials as tasks of a Ray cluster, whose machines see the folder of the sweep at the same path.

Ray finds each trial a machine and a place on it. What is tried next, the journal, pruning and going on are as
without it (`drive`, `study`): a sweep may go on with Ray that was begun without, and the other way round.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from bilevel.errors import RecipeError, RequirementError, reason_of

ADDRESS = "RAY_ADDRESS"
"""Where Ray itself looks for the address of a cluster."""


def require(address: str | None) -> str:
    """The address of the cluster.

    Raises `RequirementError` without the extra `ray`, `RecipeError` where no address is given.
    """
    if find_spec("ray") is None:
        raise RequirementError("--engine ray needs ray: pip install 'bilevel[ray]'")
    address = address or os.environ.get(ADDRESS)
    if not address:
        raise RecipeError(
            f"--engine ray needs a cluster: --ray-address HOST:PORT (auto: that of this machine), or ${ADDRESS}. "
            "`ray start --head` begins one"
        )
    return address


def starter(
    address: str, run: Callable[[Mapping[str, Any]], object], threads: int, device: str
) -> Callable[[Mapping[str, Any]], Task]:
    """Starts `run(spec)` on the cluster. Raises `RequirementError` where nobody answers at `address`."""
    ray = import_module("ray")  # which a type checker need not find: `make` installs none
    try:
        ray.init(
            address=address, ignore_reinit_error=True, log_to_driver=False, logging_level="ERROR"
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RequirementError(f"no Ray cluster at {address}: {reason_of(error)}") from error
    asked = resources(threads, device, ray.cluster_resources())
    # a task whose process dies costs its trial alone, and is not tried again
    task = ray.remote(max_retries=0, **asked)(run)
    return lambda spec: Task(ray, task.remote(dict(spec)))


def resources(threads: int, device: str, cluster: Mapping[str, float]) -> dict[str, int]:
    """What a trial asks for: its threads, and a GPU where there are any and its device may be one."""
    return {"num_cpus": threads, "num_gpus": int(device != "cpu" and cluster.get("GPU", 0) >= 1)}


class Task:
    """A trial that a cluster runs; see `drive.Handle`."""

    def __init__(self, ray: Any, reference: Any) -> None:
        self._ray, self._reference = ray, reference

    def ended(self) -> str | None:
        done, _ = self._ray.wait([self._reference], timeout=0)
        if not done:
            return None
        try:
            self._ray.get(self._reference)
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return ""

    def stop(self) -> None:
        self._ray.cancel(self._reference)  # as Ctrl-C in its process

    def wait(self) -> None:
        self._ray.wait([self._reference])
