"""Options given before the command."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Settings:
    """What holds for every command."""

    debug: bool = False
    """Whether errors are shown as Python has them."""


settings = Settings()
