"""`show`: a component or a recipe."""

import re

from bilevel import recipe as recipes
from bilevel.cli.names import shipped
from tests.cli.commands import invoke


def test_show_tells_the_options_of_a_component():
    text = invoke("show", "implicit").output
    assert re.search(r"damping +0.0 +NonNegativeFloat", text)
    assert "bilevel ls linear" in text
    assert "arXiv:1602.02355" in text
    assert "Literal['cold', 'warm', 'linear', 'galerkin']" in text
    assert re.search(
        r"^preconditioner +None +one of: bilevel ls preconditioners \| None", text, re.M
    )
    raised = text.partition("Raises:\n")[2].partition("\n\n")[0].splitlines()
    assert {len(line) - len(line.lstrip()) for line in raised} == {4, 8}
    assert "bilevel show quadratic.yaml" in invoke("show", "quadratic").output
    assert "Did you mean 'implicit'" in invoke("show", "implict", code=2).stderr
    assert invoke("show", "linear/cg").output != invoke("show", "optimizers/sgd").output


def test_show_a_recipe_as_written_and_resolved():
    assert invoke("show", "ridge.yaml").output.startswith("# One ridge penalty")
    resolved = invoke("show", "ridge.yaml", "--resolved").output
    assert recipes.loads(resolved) == recipes.load(shipped()["ridge"])
