"""`schema`: recipes as an editor checks them."""

import json

import pytest

from bilevel.cli.names import SCHEMA_KEY, schema_path, shipped
from bilevel.recipe.yaml_source import parse
from tests.cli.commands import invoke


def test_the_schema_lies_beside_the_recipes_and_they_name_it():
    """Made by `bilevel schema > recipes/recipe.schema.json`; completions of an editor depend on it."""
    assert json.loads(schema_path().read_text()) == json.loads(invoke("schema").output)
    for path in shipped().values():
        (line,) = (line for line in path.read_text().splitlines() if line.startswith(SCHEMA_KEY))
        assert path.parent / line.removeprefix(SCHEMA_KEY) == schema_path()


def test_the_schema_takes_shipped_recipes_and_refuses_wrong_ones():
    schema = json.loads(invoke("schema").output)
    draft = pytest.importorskip("jsonschema").Draft202012Validator
    draft.check_schema(schema)
    validator = draft(schema)
    for path in shipped().values():
        validator.validate(parse(path.read_text(), path.name).data)
    for wrong in (
        "upper: {steps: 3}",
        "problem: quadratic\nupper: {stpes: 3}",
        "problem: quadratic\nupper: {steps: 0}",
        "problem: quadratic\nestimator: {name: implicit, damping: -1}",
        "problem: quadratic\nestimator: {name: implicit, solver: {name: cg, itrations: 3}}",
        "problem: quadratc",
    ):
        assert not validator.is_valid(parse(wrong, "w").data), wrong
