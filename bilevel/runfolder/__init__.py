"""A run on disk. At package level nothing here imports torch: `bilevel runs` answers at once.

`folder` makes and finds run folders, `record` is events.jsonl, `checkpoint` the state of a run,
`files` the one way in which a file is put in place. It takes names, hashes and text, and knows no recipe.
"""

from bilevel.runfolder.folder import (
    RunFolder,
    Summary,
    create,
    environment,
    find,
    find_all,
    other_arithmetic,
    summaries,
)

__all__ = [
    "RunFolder",
    "Summary",
    "create",
    "environment",
    "find",
    "find_all",
    "other_arithmetic",
    "summaries",
]
