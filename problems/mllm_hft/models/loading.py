"""A model's folder read as it is: what it says is honoured, what it lacks is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilevel.errors import ProblemError, RequirementError

from .adapters import CONFIG, Adapter, load_adapter
from .families import Family, family_of
from .network import ATTENTION
from .template import PICTURE, PROMPT, Template, from_chat
from .tokenizer import PretrainedTokenizer

WHOLE = (
    "give a folder with config.json, weights, tokenizer and preprocessor_config.json (all that "
    "`save_pretrained` of the model and of its processor writes), or a hub id and a network"
)
CONVERT = (
    "these are names of the original LLaVA repository; convert the folder first with "
    "transformers' models/llava/convert_llava_weights_to_hf.py"
)
JOINT = ("processor_config.json", "video_preprocessor_config.json")
"""Files of a processor that say how pictures and text go together, such as how many tokens a patch is."""
NOT_HERE = "there is no folder {at}, and as an id of the hub it "
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_ORIGINAL = ("mm_projector", "mm_vision_tower", "vision_tower.vision_tower")


@dataclass(frozen=True)
class Folder:
    """What was read: the model with its adapter merged or in place, and how to speak to it."""

    mllm: Any
    family: Family
    tokenizer: PretrainedTokenizer
    template: Template
    processor: Any
    """Of pictures."""
    joint: Mapping[str, bytes]
    """`JOINT` by name, those that are there."""
    base: str | None
    """What the language model's weights are, by path; None where an adapter was merged into them."""
    adapter: Any
    """peft's config of the adapter that is continued, None where there is none."""
    notes: tuple[str, ...]
    """What a user should know of it."""

    def companions(self, to: Path) -> None:
        """Write tokenizer, with its chat template, picture processor, and what was said of both together."""
        self.tokenizer.tokenizer.save_pretrained(to)
        self.processor.save_pretrained(to)
        for name, content in self.joint.items():
            (to / name).write_bytes(content)


def read(path: str, *, template: str | None, adapter: Adapter, dtype: Any) -> Folder:
    """Load the model at `path`.

    Raises `RequirementError` for what is missing, cut short or of another shape, and `ProblemError`
    for what is there and is not supported.
    """
    with quiet() as transformers:
        _require_folder(path, path)
        return _read(transformers, path, template, adapter, dtype)


def _read(
    transformers: Any, path: str, template: str | None, adapter: Adapter, dtype: Any
) -> Folder:
    adapted, base = _adapter_of(path)
    if base != path:
        _require_folder(path, base, f"its {CONFIG} names the base {base!r}: ")
    config = _config(transformers, path, base)
    family = family_of(config.model_type)
    mllm, notes = _model(transformers, path, base, dtype)
    kept, frozen = None, base
    if adapted is not None:
        kept = load_adapter(mllm, adapted, adapter, family.language)
        notes.append(f"the folder's adapter (LoRA of rank {kept.r}): {adapter}")
        if adapter == "merge":
            kept, frozen = None, None
    home = path if adapted is None or (adapted / "tokenizer_config.json").is_file() else base
    raw = _part(transformers.AutoTokenizer, home or path, "tokenizer")
    processor = _part(transformers.AutoImageProcessor, base or path, "picture processor", "pil")
    joint = _joint(transformers, base or path)
    tokenizer = _tokenizer(mllm, family, raw)
    written = _template(transformers, raw, home or path, family, template, tokenizer)
    notes += _generation_notes(mllm)
    return Folder(mllm, family, tokenizer, written, processor, joint, frozen, kept, tuple(notes))


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise RequirementError(
            "model: checkpoint needs the package transformers, which is not installed; "
            "pip install 'bilevel[mllm]'"
        ) from error
    return transformers


@contextmanager
def quiet() -> Iterator[Any]:
    """transformers without bars and reports of its own: what they say is raised or told as a note."""
    transformers = _transformers()
    logging = transformers.utils.logging
    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _adapter_of(path: str) -> tuple[Path | None, str]:
    """The folder's adapter, if it has one, and where the model itself is."""
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        return None, path
    if (folder / "config.json").is_file():
        return folder, path
    said = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not said:
        raise _refused(
            path, f"{CONFIG} names no base_model_name_or_path and there is no config.json"
        )
    beside = folder / said
    return folder, str(beside) if beside.is_dir() else said


def _require_folder(path: str, base: str, part: str = "") -> None:
    """Refuse what is neither a folder nor can be an id of the hub."""
    folder = Path(base)
    if folder.is_dir() or (not folder.exists() and _HUB_ID.fullmatch(base)):
        return
    what = "is a file, not a folder" if folder.exists() else "there is no such folder"
    raise _refused(path, f"{part}{folder.absolute()}: {what}")


def _config(transformers: Any, path: str, base: str) -> Any:
    file = Path(base) / "config.json"
    if file.is_file():
        said = _json(path, file)
        if any(mark in key for key in said for mark in _ORIGINAL):
            raise _refused(path, "its config.json names an `mm_vision_tower`", CONVERT)
    elif Path(base).is_dir():
        raise _refused(path, f"{file} is missing")
    with _Refusing(path, "" if Path(base).is_dir() else NOT_HERE.format(at=Path(base).absolute())):
        known, _ = transformers.PreTrainedConfig.get_config_dict(base)
        family_of(known.get("model_type", "none"))
        return transformers.AutoConfig.from_pretrained(base)


def _json(path: str, file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _refused(path, f"{file.name} is cut short or altered: {error}") from error


def _model(transformers: Any, path: str, base: str, dtype: Any) -> tuple[Any, list[str]]:
    with _Refusing(path):
        mllm, found = transformers.AutoModelForImageTextToText.from_pretrained(
            base,
            attn_implementation=ATTENTION,
            dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,  # never a pickle
            # Else transformers loads the folder's adapter by itself, and says nothing of what it lacks.
            adapter_kwargs={"subfolder": "none"},
        )
    missing, unused = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing:
        more = f"; it holds {_some(unused)} instead" if unused else ""
        original = any(mark in key for key in unused for mark in _ORIGINAL)
        remedy = CONVERT if original else "download it again or save the whole model: " + WHOLE
        raise _refused(path, f"it lacks weights, {_some(missing)}{more}", remedy)
    notes = [f"weights that the model has no place for: {_some(unused)}"] if unused else []
    return mllm, notes


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more


def _part(kind: Any, path: str, what: str, backend: str | None = None) -> Any:
    given = {} if backend is None else {"backend": backend}  # "pil" needs no torchvision
    with _Refusing(path, f"its {what}: "):
        return kind.from_pretrained(path, **given)


def _joint(transformers: Any, path: str) -> dict[str, bytes]:
    """Kept byte for byte: a whole processor of some families needs torchvision, of which nothing is used."""
    found = {}
    for name in JOINT:
        try:
            found[name] = Path(transformers.utils.cached_file(path, name)).read_bytes()
        except OSError:  # many folders have none
            continue
    return found


def _tokenizer(mllm: Any, family: Family, raw: Any) -> PretrainedTokenizer:
    ends = mllm.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    # A family whose own template puts the start token behind the picture writes none before it.
    start = () if family.template else None
    opening = [raw.bos_token_id] if family.template and raw.bos_token_id is not None else []
    return PretrainedTokenizer(
        raw,
        rows=mllm.get_input_embeddings().weight.shape[0],
        ends=ends,
        picture=mllm.config.image_token_id,
        start=start,
        opening=opening,
    )


def _template(
    transformers: Any,
    raw: Any,
    path: str,
    family: Family,
    given: str | None,
    tokenizer: PretrainedTokenizer,
) -> Template:
    if given is not None:
        return Template(given)
    chat = _chat_template(transformers, raw, path)
    if chat is not None:
        raw.chat_template = chat

        def render(messages: list[dict[str, Any]], opens: bool) -> str:
            return raw.apply_chat_template(
                messages, chat_template=chat, tokenize=False, add_generation_prompt=opens
            )

        own = {*tokenizer.ends, *raw.all_special_ids} - {tokenizer.picture}
        closing = [
            raw.convert_ids_to_tokens(i) for i in sorted(own, key=lambda i: i not in tokenizer.ends)
        ]
        return from_chat(render, raw.convert_ids_to_tokens(tokenizer.picture), closing)
    if family.template is not None:
        return Template(family.template.replace("{start}", raw.bos_token or ""))
    raise _refused(
        path,
        "it has no chat template",
        f"give problem.model.template as the model was trained, for example "
        f"'USER: {PICTURE}\\n{PROMPT} ASSISTANT:'",
    )


def _chat_template(transformers: Any, raw: Any, path: str) -> str | None:
    """The processor's, else the tokenizer's; "default" where it has several."""
    try:
        found, _ = transformers.ProcessorMixin.get_processor_dict(path)
    except (OSError, ValueError):
        found = {}
    chat = found.get("chat_template") or raw.chat_template
    return chat.get("default") if isinstance(chat, dict) else chat


def _generation_notes(mllm: Any) -> list[str]:
    said = mllm.generation_config
    penalty = said.repetition_penalty
    greedy = "captions are greedy, without what generation_config.json says of "
    ignored = [] if penalty in (None, 1.0) else [f"repetition_penalty ({penalty})"]
    ignored += [
        f"{n} ({v})"
        for n in ("no_repeat_ngram_size", "num_beams")
        if (v := getattr(said, n)) not in (None, 0, 1)
    ]
    return [greedy + ", ".join(ignored)] if ignored else []


def _refused(path: str, what: str, remedy: str = WHOLE) -> RequirementError:
    return RequirementError(f"problem.model.path = {path!r}: {what}; {remedy}")


class _Refusing:
    """Turns whatever transformers raises over a folder into one error with the remedy."""

    def __init__(self, path: str, part: str = "") -> None:
        self.path, self.part = path, part

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or not isinstance(error, Exception):
            return
        if isinstance(error, (ProblemError, RequirementError)):
            return
        said = " ".join(str(error).split())
        short = said if len(said) < 300 else f"{said[:300]}…"
        raise _refused(
            self.path, f"{self.part}cannot be loaded ({type(error).__name__}: {short})"
        ) from error
