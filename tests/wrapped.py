"""An estimator around another: it passes everything on, and what wraps it changes one thing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any


class Wrapped:
    """For a dataclass with a field `inner`, the estimator that answers."""

    inner: Any

    @property
    def needs(self):
        return self.inner.needs

    @property
    def claim(self):
        return self.inner.claim

    def tight(self, dim):
        tighten = getattr(self.inner, "tight", None)
        return replace(self, inner=tighten(dim) if tighten else self.inner)

    def init(self, at):
        return self.inner.init(at)

    def objective(self, losses, at):
        return self.inner.objective(losses, at)

    def estimate(self, losses, at, state):
        return self.inner.estimate(losses, at, state)
