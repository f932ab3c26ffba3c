"""The state of an optimizer and of a fit in mid-flight, as safetensors."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from victims.errors import GridError
from victims.models import Clip

log = logging.getLogger(__name__)


class Checkpoints(Protocol):
    """Where a fit puts its mid-fit state and finds it again."""

    def load(self) -> Path | None: ...

    def save(self, write: Callable[[Path], None]) -> None: ...


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, by the position of each parameter in the groups."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"moment.{index}.{name}": value
        for index, parameter in enumerate(parameters)
        for name, value in optimizer.state.get(parameter, {}).items()
        if value is not None  # SGD's momentum, where it has none
    }


def set_moments(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in part(tensors, "moment.").items():
        index, field_name = name.split(".")
        parameter = parameters[int(index)]
        # AdamW's fused form walks weights and moments by address: a moment that was stored in
        # another memory layout than its parameter has would meet the wrong weights. Its step count
        # is a scalar on the same device.
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
        optimizer.state[parameter][field_name] = value.to(parameter.device)


def write_state(path: Path, position: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """A fit in mid-flight in one file: where it is, and its tensors."""
    from safetensors.torch import save_file

    whole = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    save_file(whole, path, {"position": json.dumps(position)})


def read_state(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """What `write_state` wrote, read whole before any of it is used.

    A file that cannot be read costs the steps since the start and nothing else: None, and a line
    in the log.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            position = json.loads(file.metadata()["position"])
            return position, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is no mid-fit checkpoint (%s); the fit starts over", path, error)
        return None


def save_moments(optimizer: torch.optim.Optimizer, path: Path) -> None:
    from safetensors.torch import save_file

    save_file({n: t.detach().cpu().contiguous() for n, t in moments(optimizer).items()}, path)


def load_moments(optimizer: torch.optim.Optimizer, model: Clip, path: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(path)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = {int(name.split(".")[1]) for name in tensors}
    if indices and max(indices) >= len(parameters):
        raise GridError(
            "optimizer_state: carry needs a fit over the same parameters as the stored state has;"
            f" stored {max(indices) + 1}, this fit trains {len(parameters)} of {model.spec.arch}"
        )
    set_moments(optimizer, tensors)
