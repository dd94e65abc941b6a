"""A recipe and the points of its run, once a file."""

from pathlib import Path

import pytest

from bilevel import recipe as recipes
from bilevel.cli.names import shipped
from bilevel.comparing import scene
from tests.comparing.cells import SHORT


@pytest.fixture(scope="module")
def quadratic():
    return recipes.load(shipped()["quadratic"], SHORT)


@pytest.fixture(scope="module")
def points(quadratic, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("points")
    (folder / "own.yaml").write_text(quadratic.dump())
    scene.make(folder / "own.yaml", folder / "scene")
    return folder / "scene"
