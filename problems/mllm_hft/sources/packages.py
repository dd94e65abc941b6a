"""Packages of the extra `mllm`, imported where they are needed and not before."""

from __future__ import annotations

import importlib
from typing import Any

from bilevel.errors import RequirementError


def require(module: str, package: str, install: str = "pip install 'bilevel[mllm]'") -> Any:
    """The module. Raises `RequirementError` that names the package and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RequirementError(f"the package {package} is not installed; {install}") from error
