"""Options given before the command."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Settings:
    """What holds for every command."""

    debug: bool = False
    """Whether errors are shown as Python has them."""
    is_whole_process: bool = False
    """Whether the process ends with the command; not so where a program calls it within itself."""


settings = Settings()
