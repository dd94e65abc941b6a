"""Options of the problem that a formulation does not read: refused, as they would change nothing.

`contrast_batch` is not among them: recipes carry sizes from one formulation to another.
"""

from __future__ import annotations

from collections.abc import Collection

from bilevel.errors import ProblemError

from .formulations import FORMS, SCALARS, ContrastLoss, Form, Formulation, Learned

OF_HACL = frozenset({"negatives", "queue", "heads", "text_head"})
SOMETIMES = OF_HACL | {"contrast_loss", "contrast", "anchor", "learned", "clean"}
"""Options that some formulation does not read."""


def read(form: Form) -> frozenset[str]:
    """Those of `SOMETIMES` that change the lower loss or the variables of a form."""
    is_read = {
        **dict.fromkeys(OF_HACL, form.contrast and form.loss == "hacl"),
        "contrast_loss": form.contrast,
        "contrast": form.contrast and form.task,
        "anchor": form.anchored,
        "learned": len(learnable(form)) > 1,  # of one scalar there is nothing to choose
        "clean": form.task and not form.upper,
    }
    return frozenset(name for name, yes in is_read.items() if yes)


def learnable(form: Form) -> frozenset[Learned]:
    """Scalars that a form has at its upper level."""
    return frozenset(name for name, part in SCALARS.items() if part in form.upper)


def refuse_unread(
    formulation: Formulation,
    loss: ContrastLoss,
    given: Collection[str],
    learned: Collection[Learned],
    *,
    contrast_first: bool,
) -> None:
    """Raise `ProblemError` where an option in `given` changes nothing, naming where it would.

    `given` are those that differ from their defaults, `learned` the option of that name. Steps of
    the contrast before the first one read what L_C does, whatever the formulation.
    """
    form = FORMS[formulation].with_loss(loss)
    if contrast_first:
        own = OF_HACL if loss == "hacl" else frozenset[str]()
        given = [name for name in given if name not in own | {"contrast_loss"}]
    if "clean" in given and form.upper:
        raise ProblemError(
            f"clean with formulation {formulation}: its upper loss must be on data that the lower "
            "level does not see; use it with task_only or joint"
        )
    unread = [name for name in given if name in SOMETIMES - read(form)]
    if unread and loss != "hacl" and set(unread) <= OF_HACL & read(FORMS[formulation]):
        raise ProblemError(
            f"{' and '.join(unread)} with contrast_loss {loss}: a preference has none; leave it out, "
            "or use contrast_loss=hacl"
        )
    for name in unread:
        others = [other for other in FORMS if name in read(FORMS[other])]
        raise ProblemError(
            f"{name} with formulation {formulation}: nothing reads it; leave it out, or use "
            f"formulation {' or '.join(others)}"
        )
    absent = [name for name in learned if name not in learnable(form)]
    if "learned" in given and absent:
        raise ProblemError(
            f"learned names {', '.join(absent)}, which formulation {formulation} with contrast_loss "
            f"{loss} does not have; it has {', '.join(n for n in SCALARS if n in learnable(form))}"
        )
