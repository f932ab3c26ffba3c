"""Weights out of a file: safetensors, or a PyTorch checkpoint that holds tensors and nothing else.

What open_clip does to a checkpoint is done here by its own functions: names of other projects,
text towers that moved, positions of another picture size. What could run code is never unpickled.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from victims.architectures import cached, fetched, is_torchscript, tag_of
from victims.errors import GridError
from victims.models import Clip

State = dict[str, Tensor]

PICKLED = (".pt", ".pth", ".bin")
KINDS = (".safetensors", *PICKLED)
# What OpenAI's state dicts hold besides weights.
_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A file of weights by its contents. Where it lies, and which tag of open_clip's registry
    names it, is not what it is."""

    name: ClassVar[str] = "weights"
    version: ClassVar[int] = 1

    sha256: str
    path: str = field(default="", metadata={"keyed": False})
    tag: str = field(default="", metadata={"keyed": False})
    # What a person should know about how the name was read.
    notes: tuple[str, ...] = field(default=(), metadata={"keyed": False})


def located(weights: Weights, arch: str) -> Path:
    """The file on this machine: at its path, or where this machine keeps the tag's."""
    path = Path(weights.path)
    if path.is_file() or not weights.tag:
        return path
    tag = tag_of(arch, weights.tag)
    return fetched(tag) if tag else path


def is_here(weights: Weights, arch: str) -> bool:
    """Whether this machine can read the file, without fetching anything."""
    tag = tag_of(arch, weights.tag) if weights.tag else None
    return os.access(weights.path, os.R_OK) or (tag is not None and cached(tag) is not None)


def load_pretrained(model: Clip, path: Path) -> Clip:
    """Fill a model from a file, under any of the names that open_clip understands."""
    state = converted(model.net, read_state(path))
    own: Mapping[str, Tensor] = model.net.state_dict()
    wrong = [n for n in own if n not in state or state[n].shape != own[n].shape]
    extra = [name for name in state if name not in own]
    if wrong or extra:
        # Where another architecture is meant, its positions say the least of it.
        positions = [n for n in wrong if n.endswith("positional_embedding") and n in state]
        first = next((n for n in (*wrong, *extra) if n not in positions), (wrong or extra)[0])
        has = tuple(state[first].shape) if first in state else "nothing"
        wants = tuple(own[first].shape) if first in own else "nothing"
        hint = ""
        if first in positions:
            hint = " They were trained at another picture size, which this tower cannot change."
        raise GridError(
            f"{path}: these weights belong to another model than {model.spec.arch}"
            f" ({len(wrong)} tensors missing or of another shape, {len(extra)} unknown; the first:"
            f" {first} is {has}, the model has {wants}).{hint} Check `model` in the grid file."
        )
    model.net.load_state_dict(state)
    return model


def read_state(path: Path) -> State:
    """The tensors of a checkpoint by name, without the wrappers of whoever trained it."""
    if path.suffix == ".safetensors":
        found: Any = _safetensors(path)
    elif path.suffix in PICKLED:
        found = _tensors_alone(path)
    else:
        raise GridError(f"{path}: weights are read from {', '.join(KINDS)} files")
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]  # beside the optimizer, as open_clip's training leaves it
    state = {
        re.sub(r"^(module\.|net\.)+", "", str(name)): tensor
        for name, tensor in (found.items() if isinstance(found, Mapping) else ())
        if isinstance(tensor, Tensor)
    }
    if not state:
        kind = type(found).__name__
        keys = f" with {', '.join(map(str, list(found)[:5]))}" if isinstance(found, Mapping) else ""
        raise GridError(
            f"{path}: holds a {kind}{keys}, and no weights by name. A state dict is expected, or a"
            " mapping with one under state_dict."
        )
    return {name: tensor for name, tensor in state.items() if name not in _NO_WEIGHTS}


def _safetensors(path: Path) -> State:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: State = load_file(path)
    except (SafetensorError, ValueError) as error:
        raise GridError(f"{path}: is no safetensors file ({error})") from error
    return found


def _tensors_alone(path: Path) -> Any:
    """Unpickled with what tensors need and nothing else allowed."""
    if is_torchscript(path):
        raise GridError(
            f"{path}: is a program of torch.jit, as OpenAI published its weights, and no program is"
            " loaded here. Write the tag in place of the path (`pretrained: openai`), for which"
            " open_clip has the same weights as safetensors; or, where you trust the file, save"
            " torch.jit.load(...).state_dict() as safetensors and give that."
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged archive raises is anything
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise GridError(
            f"{path}: cannot be read as tensors alone ({lines[0][:200]}). A pickle that holds more"
            " can run code, so nothing else is tried: where you trust it, save its state_dict as"
            " safetensors (safetensors.torch.save_file) and give that."
        ) from error


def converted(net: Any, state: State) -> State:
    """The state dict as this network names it, by open_clip's own rules."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import (
        convert_to_custom_text_state_dict,
        resize_pos_embed,
        resize_text_pos_embed,
    )

    state = dict(convert_state_dict(net, dict(state)))
    if "positional_embedding" in state and not hasattr(net, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):
        own = getattr(net, name, None)
        if name in state and own is not None and own.ndim != state[name].ndim:
            state[name] = state[name].reshape(own.shape)
    if getattr(net, "logit_bias", None) is not None and "logit_scale" in state:
        state.setdefault("logit_bias", torch.zeros_like(state["logit_scale"]))
    try:
        resize_pos_embed(state, net)
        resize_text_pos_embed(state, net)
    except (AssertionError, RuntimeError, AttributeError):
        pass  # of another width: the shapes are told by name below
    return state
