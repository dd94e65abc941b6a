"""An environment of its own for each peer, kept in a folder that git ignores.

Torch and numpy are those of the environment that runs the benchmark: all are measured on one
build, and no peer draws in another.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Peer:
    """A library on the package index, and the module of `peers/` that calls it."""

    module: str
    requirements: tuple[str, ...]


PEERS = {
    "betty-ml": Peer("with_betty", ("betty-ml==0.2.1",)),
    "boat-torch": Peer("with_boat", ("boat-torch==1.1.1", "higher==0.2.1")),
    "torchopt": Peer("with_torchopt", ("torchopt==0.7.3", "optree==0.17.0", "graphviz==0.21")),
    "higher": Peer("with_higher", ("higher==0.2.1",)),
    "jax": Peer(
        "with_jax",
        (
            "jax==0.10.2",
            "jaxlib==0.10.2",
            "jaxopt==0.8.5",
            "ml_dtypes==0.6.0",
            "opt_einsum==3.4.0",
        ),
    ),
}


def python_of(name: str, cache: Path) -> Path:
    """The interpreter of a peer's environment, made at the first call."""
    folder = cache / name
    python, done = folder / "bin" / "python", folder / ".installed"
    wanted = "\n".join(PEERS[name].requirements)
    if done.exists() and done.read_text() == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    borrowed = sysconfig.get_path("purelib")
    site = next((folder / "lib").glob("python*")) / "site-packages"
    (site / "borrowed.pth").write_text(f"import site; site.addsitedir({borrowed!r})\n")
    # betty-ml declares Python < 3.11, boat-torch numpy < 1.26.5: both run on newer ones
    options = ["-q", "--no-deps", "--ignore-requires-python", "--disable-pip-version-check"]
    subprocess.run(
        [python, "-m", "pip", "install", *options, *PEERS[name].requirements], check=True
    )
    done.write_text(wanted)
    return python
