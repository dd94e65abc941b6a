"""A trained model written so that plain transformers and peft load it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bilevel.errors import CheckpointError
from bilevel.types import Params

from .adapters import NAME, PREFIX
from .loading import quiet
from .network import LoadedModel, Network, parameters

ADAPTER, HEADS = "adapter_model.safetensors", "heads.safetensors"


def export(loaded: LoadedModel, values: Params, to: Path, *, merged: bool) -> None:
    """Write the model at `values` into a new or empty folder, with tokenizer and processor.

    Not merged: LoRA and projector as one peft adapter, `PeftModel.from_pretrained(base, to)`; where
    the base is in no folder (it was made here, or an adapter was merged into it) it is written to
    `to/base`. Merged: one model, `from_pretrained(to)`, in the precision of the frozen weights.
    The heads, which no other program reads, are beside it. Raises `CheckpointError` where `to`
    holds anything already, or cannot be written.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise CheckpointError(
            f"{to}: is not an empty folder; name a new one, nothing is overwritten"
        )
    network = loaded.network
    try:
        to.mkdir(parents=True, exist_ok=True)
        with quiet():
            if merged:
                with _at(network, values):
                    network.mllm.save_pretrained(to, state_dict=_plain(network, merged=True))
            else:
                _write_adapter(loaded, values, to)
            loaded.companions(to)
        at = parameters(network, "heads") | values
        heads = {n: _own(at[n]) for n in parameters(network, "heads")}
        save_file(heads, to / HEADS, metadata={"format": "pt"})
    except OSError as error:
        raise CheckpointError(f"{to}: the model cannot be written: {error}") from error


def _write_adapter(loaded: LoadedModel, values: Params, to: Path) -> None:
    network, base = loaded.network, loaded.base
    if base is None:
        network.mllm.save_pretrained(to / "base", state_dict=_plain(network, merged=False))
        loaded.companions(to / "base")
        base = str(to / "base")
    config = copy.copy(network.adapter)
    is_folder = Path(base).is_dir()  # an id of the hub stays as it is
    config.base_model_name_or_path = str(Path(base).absolute()) if is_folder else base
    config.modules_to_save, config.inference_mode = [network.family.projector], True
    config.save_pretrained(str(to))
    at = {**parameters(network, "lora"), **parameters(network, "projector"), **values}
    named = {
        f"{PREFIX}{name.removeprefix('mllm.').replace(f'.{NAME}', '')}": _own(at[name])
        for group in ("lora", "projector")
        for name in parameters(network, group)
    }
    save_file(named, to / ADAPTER, metadata={"format": "pt"})


def _plain(network: Network, *, merged: bool) -> dict[str, Tensor]:
    """The model's weights by the names of a model without LoRA; merged: W + scale · B A."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    kept = network.mllm.state_dict()
    dtypes = {v.dtype for n, v in network.mllm.named_parameters() if ".base_layer." in n}
    plain = {n.replace(".base_layer", ""): _own(v) for n, v in kept.items() if ".lora_" not in n}
    if len(dtypes) == 1:  # the projector may have been trained in a wider one than the rest is in
        plain = {n: v.to(*dtypes) if v.is_floating_point() else v for n, v in plain.items()}
    if merged:
        layers: list[tuple[str, Any]] = list(network.mllm.named_modules())
        for name, module in layers:
            if not isinstance(module, BaseTunerLayer):
                continue
            layer: Any = module
            own = getattr(layer, "parameter_name", "weight")
            place = plain[f"{name.replace('.base_layer', '')}.{own}"]
            place += layer.get_delta_weight(NAME).cpu().to(place.dtype)
    return plain


@contextmanager
def _at(network: Network, values: Params) -> Iterator[None]:
    """The network with `values` in its own parameters, put back afterwards."""
    own: dict[str, Any] = dict(network.named_parameters())
    there = {name: value for name, value in values.items() if name in own}
    before = {name: own[name].detach().clone() for name in there}
    try:
        with torch.no_grad():
            for name, value in there.items():
                own[name].copy_(value)
            yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                own[name].copy_(value)


def _own(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous().clone()
