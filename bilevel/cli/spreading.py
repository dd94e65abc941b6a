"""Commands that several ranks compute together: started here, by torchrun, or one process alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bilevel.cli.answer import JSONAnswer
from bilevel.cli.boundary import announced, boundary, refuse_copies
from bilevel.cli.member import Member, ending_together, leaving_a_word, register
from bilevel.errors import RankError, RecipeError


@contextmanager
def spreading(
    as_json: bool, ranks: int | None, words: Sequence[str]
) -> Iterator[tuple[JSONAnswer | None, Member]]:
    """`boundary` of such a command, for which each rank yields what it is.

    With `ranks`, so many processes are started with the `words` of the command line, and this one ends
    with their code.
    """
    if os.environ.get("WORLD_SIZE"):
        # before torch is imported: what it logs of connections that close is said in fewer words
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    refusal = _refusal() if ranks is not None else None
    if ranks is not None and ranks > 1 and refusal is None:
        _start(as_json, ranks, words)
    elif ranks is None and _is_one_of_many():
        is_first = os.environ.get("RANK", "0") == "0"
        member = Member()
        with ending_together(is_first, member), boundary(as_json) as answer:
            _find_others(member)
            with member.begin(), leaving_a_word(member):
                yield answer, member
    else:
        with boundary(as_json) as answer:
            if refusal:
                raise refusal
            refuse_copies()
            announced()  # what is no number of ranks is refused
            yield answer, Member()


def _is_one_of_many() -> bool:
    try:
        return announced() > 1
    except RankError:
        return False  # which is said within the boundary


def _refusal() -> RecipeError | None:
    """Why no ranks can be started here."""
    try:
        refuse_copies()
    except RecipeError as error:
        return error
    if os.environ.get("WORLD_SIZE"):
        size = os.environ["WORLD_SIZE"]
        return RecipeError(
            f"--ranks starts ranks, and this process is one of WORLD_SIZE={size} already; leave it "
            "out under torchrun, or unset WORLD_SIZE"
        )
    return None


def _start(as_json: bool, ranks: int, words: Sequence[str]) -> None:
    import typer

    from bilevel.cli.launch import launch

    code, said = launch(ranks, words)
    if said:
        with boundary(as_json):
            error = RankError(said)
            error.exit_code = code
            raise error
    raise typer.Exit(code)


def _find_others(member: Member) -> None:
    from bilevel.ranks import find_others
    from bilevel.run.notices import Notices

    member.notices = Notices(*find_others(member.timeout))
    register(member.notices.rank)
