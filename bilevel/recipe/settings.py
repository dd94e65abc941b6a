"""The settings of a recipe that the numbers of a run depend on, to tell whether a state was made with them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from bilevel import registry
from bilevel.errors import RecipeError

NUMERIC = ("seed", "problem", "lower", "upper", "estimator", "runtime")
"""Those of a run; an ensemble has `seeds` in the place of `seed`."""
_NOT_NUMERIC = (
    "upper.steps",
    "runtime.compile",
    "runtime.keep",
    "runtime.mesh.",
    "runtime.timeout",
)
_DIGEST = re.compile(r"^(.+:\w+):([0-9a-f]{64})$")
SHOWN = 5
"""Differences between two recipes that a message has room for."""


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the settings with the number of steps.

    Equal for two recipes that give the same numbers, whatever they are called, measure, save or write.
    """
    made = settings_of_run(content)
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()


def settings_of_run(content: Mapping[str, Any]) -> dict[str, str]:
    """The settings with the number of steps: all that the numbers of a whole run depend on."""
    return settings(content) | {"upper.steps": json.dumps(content["upper"]["steps"])}


def settings(content: Mapping[str, Any]) -> dict[str, str]:
    """What the numbers of a run depend on, flat: `lower.optimizer.lr` is "0.1".

    How many steps it has, what it writes and where, how its ranks share it and whether
    its steps are replayed is not among it.
    """
    flat = flattened({key: content[key] for key in (*NUMERIC, "seeds") if key in content})
    return {key: value for key, value in flat.items() if not key.startswith(_NOT_NUMERIC)}


def flattened(content: Mapping[str, Any]) -> dict[str, str]:
    """Every value below its dotted key, as JSON; a `file.py:Class` with what is in the file."""
    return dict(_flat(canonical(content), ""))


def added_since(content: Mapping[str, Any], written: Mapping[str, Any]) -> set[str]:
    """Settings that a resolved recipe lacks as it was `written`: options that are newer than it.

    `content` has them at their defaults, which are what the release that wrote it did.
    """
    return settings_of_run(content).keys() - dict(_flat(written, "")).keys()


def refuse_other(
    made: Mapping[str, str] | None,
    here: Mapping[str, str],
    state: Path,
    added: Collection[str] = (),
) -> None:
    """Raise `RecipeError` where a state was `made` with settings other than `here`; None is not known.

    Those that were `added` since are compared only where the state has them too.
    """
    differ = differences(made, here, added)
    if differ:
        raise RecipeError(
            f"{state}: is the state of another recipe: {differ}. Take the "
            "recipe that it was made with, or start a new run with this one"
        )


def differences(
    made: Mapping[str, str] | None, here: Mapping[str, str], added: Collection[str] = ()
) -> str:
    """How settings differ, the first few in words; "" where they do not, or `made` is not known."""
    made = here if made is None else made
    here = {key: value for key, value in here.items() if key in made or key not in added}
    differ = [
        f"{key} is {made.get(key, 'not set')} there and {here.get(key, 'not set')} here"
        for key in dict.fromkeys([*here, *made])
        if made.get(key) != here.get(key)
    ]
    more = [f"and {len(differ) - SHOWN} more"] if len(differ) > SHOWN else []
    return "; ".join(differ[:SHOWN] + more)


def shown(value: str, with_digest: bool = False) -> str:
    """A value of flat settings as a recipe has it; what is in a file as the first letters of its hash."""
    plain = json.loads(value)
    if not isinstance(plain, str):
        return value
    match = _DIGEST.match(plain)
    if not match:
        return plain
    return f"{match[1]} ({match[2][:6]})" if with_digest else match[1]


def _flat(value: Any, where: str) -> Iterator[tuple[str, str]]:
    parts: Any = ()
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list):
        parts = enumerate(value)
    if not parts:
        yield where, json.dumps(value, ensure_ascii=False)
    for key, part in parts:
        yield from _flat(part, f"{where}.{key}" if where else str(key))


def code(content: Any) -> dict[str, str]:
    """The files of the user's own that a recipe runs, with the SHA-256 of what is written in each."""
    found: dict[str, str] = {}
    for text in (json.loads(value) for _, value in _flat(content, "")):
        if named := _named_file(text):
            path, _, digest = named
            found[str(path)] = digest
    return found


def canonical(value: Any) -> Any:
    """Content with the paths of files replaced by what is in them, the same on every machine."""
    if isinstance(value, Mapping):
        return {key: canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [canonical(item) for item in value]
    if named := _named_file(value):
        path, name, digest = named
        return f"{path.name}:{name}:{digest}"
    return value


def _named_file(value: Any) -> tuple[Path, str, str] | None:
    """(file, class, SHA-256 of what is written in the file) of a `file.py:Class` that is there."""
    match = registry.FILE.match(value) if isinstance(value, str) else None
    if not match or not (path := Path(match["file"])).is_file():
        return None
    return path, match["name"], hashlib.sha256(path.read_bytes()).hexdigest()
