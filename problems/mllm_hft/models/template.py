"""How a turn is written around a picture: by a template string, or by a model's own chat template.

White space belongs to the template. What stands before the user's mark ("USER:", "<|im_start|>user")
is said once, before the first turn; the picture and the white space after it come in the first turn
alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bilevel.errors import ProblemError

PICTURE, PROMPT = "<image>", "{prompt}"
_USER_MARK = re.compile(r"(?:<\|[^|<>]*\|>|#+ )?[^\s<>]*\s*$")
"""The last word before the picture, with the `<|…|>` or `###` that opens it."""

Message = dict[str, Any]
Render = Callable[[list[Message], bool], str]
"""Text of messages; True also writes what opens an answer."""


@dataclass(frozen=True)
class Template:
    """A turn: `"USER: <image>\\n{prompt} ASSISTANT:"`, with the model's own marks and white space.

    Raises `ProblemError` unless the picture and the prompt are there once each, in this order.
    """

    turn: str = "<image> {prompt}"
    later: str | None = None
    """A turn after the first; None: the user's mark and what follows the picture's white space."""
    lead: str | None = None
    """What stands between prompt and answer; None: a space, unless `turn` ends with white space."""
    close: str | None = None
    """What ends an answer, up to the token that does; None: the tokenizer's end token."""

    def __post_init__(self) -> None:
        places = [self.turn.count(PICTURE), self.turn.count(PROMPT)]
        if places != [1, 1] or self.turn.index(PICTURE) > self.turn.index(PROMPT):
            raise ProblemError(
                f"template = {self.turn!r}; must hold {PICTURE!r} and then {PROMPT!r}, once each, "
                "for example 'USER: <image>\\n{prompt} ASSISTANT:'"
            )

    @property
    def before(self) -> str:
        """What stands in front of the picture."""
        return self.turn.partition(PICTURE)[0]

    def prompt(self, prompt: str, *, first: bool) -> str:
        """A prompt as it stands after the picture (first) or after an answer (later)."""
        form = self.turn.partition(PICTURE)[2] if first else self._later
        return form.replace(PROMPT, prompt)

    def answer(self, answer: str) -> str:
        """An answer as it stands after its prompt, and what closes it where the template says so."""
        lead = self.lead
        if lead is None:
            lead = "" if self.turn[-1:].isspace() else " "
        return f"{lead}{answer}{self.close or ''}"

    @property
    def _later(self) -> str:
        if self.later is not None:
            return self.later
        mark = _USER_MARK.search(self.before)
        return (mark[0] if mark else "") + self.turn.partition(PICTURE)[2].lstrip()


def from_chat(render: Render, token: str, closing: Iterable[str]) -> Template:
    """The template that a chat template comes to, read off three conversations that it renders.

    `token` is how the model writes a picture, `closing` the tokens that can end an answer.
    Raises `ProblemError` where a chat template writes turns that cannot be told apart.
    """
    for content in (_parts, lambda text, seen: f"{token}\n{text}" if seen else text):
        try:
            found = _read(render, content, token, tuple(closing))
        except Exception as error:  # whatever Jinja raises for contents of the other form
            reason = error
            continue
        if found is not None:
            return found
        reason = None
    raise ProblemError(
        "the model's chat template cannot be read: it must write the picture "
        f"({token!r}) once, then the prompt, and an answer right after what opens one"
        + (f" ({reason})" if reason else "")
        + "; give problem.model.template, for example 'USER: <image>\\n{prompt} ASSISTANT:'"
    )


def _parts(text: str, seen: bool) -> list[dict[str, str]]:
    picture = [{"type": "image"}] if seen else []
    return [*picture, {"type": "text", "text": text}]


def _read(
    render: Render, content: Callable[[str, bool], Any], token: str, closing: Sequence[str]
) -> Template | None:
    # Words that no chat template holds, trims or changes.
    asked, said, again = "\ue000asked\ue000", "\ue000said\ue000", "\ue000again\ue000"
    messages = [
        {"role": "user", "content": content(asked, True)},
        {"role": "assistant", "content": content(said, False)},
        {"role": "user", "content": content(again, False)},
    ]
    first, whole = render(messages[:1], True), render(messages, True)
    once = [(first, token), (first, asked), (whole, token), (whole, said), (whole, again)]
    if any(text.count(word) != 1 for text, word in once) or "'type':" in whole:
        return None
    lead, _, rest = whole.removeprefix(first).partition(said)
    turn = first.replace(token, PICTURE).replace(asked, PROMPT)
    if not whole.startswith(first) or turn.index(PICTURE) > turn.index(PROMPT):
        return None
    close = next((c for c in closing if rest.lstrip().startswith(c)), None)
    if close is not None:
        end = rest.index(close) + len(close)
        close, rest = rest[:end], rest[end:]
    return Template(turn, rest.replace(again, PROMPT), lead, close)
