"""LoRA on every linear map of a language model, new or as a model's folder holds it; through peft.

Hu et al. (2021), arXiv:2106.09685.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bilevel.errors import ProblemError, RequirementError
from bilevel.types import Params

from .network import Network, parameters

Adapter = Literal["merge", "continue"]
CONFIG = "adapter_config.json"
NAME = "default"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Coverage:
    """Which maps of the language model take LoRA: how many of each name."""

    maps: Mapping[str, int]
    fused: Mapping[str, int]
    """Stacked experts, parameters of three axes."""

    def __str__(self) -> str:
        both = {**self.maps, **self.fused}
        named = ", ".join(f"{number} {name}" for name, number in both.items())
        return f"LoRA on {sum(both.values())} maps of the language model: {named}"


def coverage(network: Network) -> Coverage:
    """The linear maps of the decoder, by inspection; nothing is assumed about their names."""
    maps: Counter[str] = Counter()
    fused: Counter[str] = Counter()
    for name, module in network.language.named_modules():
        if isinstance(module, nn.Linear):
            maps[name.rpartition(".")[2]] += 1
        for own, value in module.named_parameters(recurse=False):
            if value.ndim == 3:
                fused[".".join([*name.split(".")[-2:], own])] += 1
    return Coverage(maps, fused)


def adapted(network: Network) -> Coverage:
    """The maps that have LoRA now."""
    places = (n.partition(".lora_A.") for n in parameters(network, "lora"))
    return Coverage(Counter(n.rpartition(".")[2] for n, mark, _ in places if mark), {})


def add_lora(network: Network, rank: int) -> Coverage:
    """Put LoRA on every linear map of the language model's layers; no dropout.

    Names gain `base_layer` and `lora_A.default`, `lora_B.default`; the function stays the same,
    because B starts at 0.
    """
    from peft import LoraConfig

    found = coverage(network)
    names = "|".join(map(re.escape, found.maps))
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=rf"{re.escape(network.family.language)}\..*\b({names})",
        target_parameters=list(found.fused) or None,
    )
    _inject(network.mllm, config)
    network.adapter = config
    network.requires_grad_(False).eval()
    return found


def start_lora(network: Network, generator: torch.Generator | None) -> Params:
    """LoRA to start from: A normal with variance 1 / inputs, B = 0; all 0 without a generator.

    An adapter that is continued starts as it is.
    """
    own = parameters(network, "lora")
    if network.continued:
        return {name: value.clone() for name, value in own.items()}
    return {
        name: torch.randn(value.shape, generator=generator) / value.shape[1] ** 0.5
        if generator is not None and ".lora_A." in name
        else torch.zeros(value.shape)
        for name, value in own.items()
    }


def load_adapter(mllm: Any, folder: Path, how: Adapter, language: str) -> Any:
    """Put the adapter of a folder into a model, and leave it there (continue) or merge it.

    Returns its peft config. Raises `ProblemError` for an adapter that is not LoRA, or that covers
    more than the language model and is to be continued; `RequirementError` where its weights are
    missing, cut short, or of another model.
    """
    from peft import PeftConfig
    from peft.utils.save_and_load import load_peft_weights

    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
        if not (folder / "adapter_model.safetensors").is_file():  # else peft reads a pickle
            raise FileNotFoundError("there is no adapter_model.safetensors")
        saved = load_peft_weights(str(folder), device="cpu")
    except Exception as error:
        raise RequirementError(
            f"{folder / CONFIG}: the adapter cannot be loaded ({_first_line(error)}); put its "
            "adapter_model.safetensors beside it, whole, or remove adapter_config.json"
        ) from error
    if config.peft_type != "LORA":
        raise ProblemError(
            f"{folder / CONFIG}: an adapter of type {config.peft_type}; LoRA alone can be merged "
            "or continued here: merge it with peft (`merge_and_unload`) and save the model"
        )
    weights = {n.removeprefix(PREFIX): value for n, value in saved.items() if ".lora_" in n}
    whole = {n.removeprefix(PREFIX): value for n, value in saved.items() if ".lora_" not in n}
    outside = sorted(n for n in weights if not n.startswith(f"{language}."))
    if how == "continue" and outside:
        raise ProblemError(
            f"{folder / CONFIG}: the adapter also covers {outside[0]} and {len(outside) - 1} more "
            "outside the language model, which stays frozen here; use problem.model.adapter=merge"
        )
    _copy(mllm.state_dict(), whole, folder)
    config.modules_to_save, config.inference_mode = None, False
    _inject(mllm, config)
    own = {n.replace(f".{NAME}", ""): p for n, p in mllm.state_dict().items() if ".lora_" in n}
    if missing := sorted(own.keys() - weights.keys()):
        raise RequirementError(
            f"{folder}: the adapter lacks weights for {len(missing)} places, first {missing[0]}; "
            "download it again, or save it from the model it was trained on"
        )
    _copy(own, weights, folder)
    if how == "merge":
        _merge(mllm)
    return config


def _inject(mllm: Any, config: Any) -> None:
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # peft draws A from the global generator; `start_lora` draws it again
        inject_adapter_in_model(config, mllm, adapter_name=NAME)


def _copy(into: Mapping[str, Tensor], values: Mapping[str, Tensor], folder: Path) -> None:
    for name, value in values.items():
        place = into.get(name)
        if place is None or place.shape != value.shape:
            found = "no place" if place is None else f"shape {tuple(place.shape)}"
            raise RequirementError(
                f"{folder}: the adapter has {name} of shape {tuple(value.shape)}, and the model "
                f"{found} for it: it belongs to another model; give the one it was trained on"
            )
        with torch.no_grad():
            place.copy_(value)


def _merge(mllm: Any) -> None:
    """W + scale · B A in the place of each adapted map."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(mllm.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            parent, _, own = name.rpartition(".")
            setattr(mllm.get_submodule(parent), own, module.get_base_layer())
    del mllm.peft_config  # else peft takes the next adapter for a second one


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
