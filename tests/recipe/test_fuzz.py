"""Recipes and overrides that were altered anywhere: a checked recipe, or one error with its place."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bilevel import recipe as recipes
from bilevel.cli.names import shipped
from bilevel.errors import BilevelError, RecipeError

# those that need no data to be checked, so that an example takes milliseconds
TEXTS = {name: shipped()[name].read_text("utf-8") for name in ("quadratic", "sinusoid", "lasso")}
ODD = """{ } [ ] : , - & * ! | > ' " % @ ` # ~ null true .inf .nan 1e999 -1 0 1_0 0x1 0o7 1e-3 !!int !!omap
!!set << *a &a ? ... --- ² ½ name lr"""
PIECES = st.one_of(
    st.text(max_size=3),
    st.sampled_from([*ODD.split(), "\t", "\x00", "\x85", "\u2028", "\ufeff", "\U0001f600"]),
)
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@FEW
@given(data=st.data())
def test_a_mutated_recipe_is_a_recipe_or_one_error(data):
    text = TEXTS[data.draw(st.sampled_from(sorted(TEXTS)))]
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(begin, min(len(text), begin + 12)))
        text = text[:begin] + data.draw(PIECES) + text[end:]
    told(text, [])


@FEW
@given(data=st.data())
def test_a_mutated_override_is_one_too(data):
    name = data.draw(st.sampled_from(sorted(TEXTS)))
    content = recipes.loads(TEXTS[name]).content
    key = ".".join(
        data.draw(st.lists(st.sampled_from([*content, "name", "lr", "steps"]), max_size=3))
    )
    value = "".join(data.draw(st.lists(PIECES, max_size=3)))
    told(TEXTS[name], [data.draw(st.sampled_from([f"{key}={value}", f"{key}{value}", value]))])


def told(text: str, overrides: list[str]) -> None:
    made, said = tried(text, overrides)
    if made is not None:
        assert recipes.loads(made.dump()) == made
    else:
        assert said
        assert "Traceback" not in said


def tried(text: str, overrides: list[str]) -> tuple[recipes.Recipe | None, str]:
    try:
        return recipes.loads(text, overrides, title="r.yaml"), ""
    except RecipeError as error:
        is_placed = str(error).startswith(("r.yaml", "override"))
        return None, str(error) if is_placed else ""
    except BilevelError as error:
        return None, str(error)


def test_the_texts_are_recipes_as_they_are():
    """Negative control: what is altered is well before."""
    for text in TEXTS.values():
        assert recipes.loads(text)
