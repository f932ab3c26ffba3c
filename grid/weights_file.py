"""The file that ``pretrained`` names, and what lies beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from grid.nodes import Raw
from grid.own_paths import own_path
from victims.architectures import RESAMPLED, Colour, config_of, resampling_doubts, tag_names
from victims.errors import near
from victims.models import EMBEDDED, ModelSpec, model_config
from victims.pretrained import KINDS

CONFIG: Final = "open_clip_config.json"
# Fields of a tower that make its tensors what they are, and the size that it was trained at.
_SHAPE: Final = (
    *("layers", "width", "heads", "head_width", "patch_size", "image_size", "timm_model_name"),
    *("context_length", "vocab_size"),
)


def weights_file(text: str, arch: str, at: Raw) -> Path:
    """The file that a text names, beside the grid file if it is no absolute path."""
    if text.startswith(("hf-hub:", "local-dir:")):
        raise at.error(
            f"{text!r}: names of the hub are not read. Download the file and give its path, or a"
            " tag of open_clip's registry."
        )
    looks_like_a_file = text.endswith(KINDS) or "/" in text or text.startswith(("$", "~", "."))
    if not looks_like_a_file:
        known = [] if arch in EMBEDDED else tag_names(arch)
        has = f"Known: {', '.join(known)}" if known else f"{arch} has no tags"
        raise at.error(
            f"no weights called {text!r} of {arch}.{near(text, known)} {has}; or the path of a"
            f" {', '.join(KINDS)} file, beside this file or below $VARIABLE."
        )
    path = own_path(text, at)
    if path.suffix not in KINDS:
        raise at.error(f"{path}: weights are read from {', '.join(KINDS)} files")
    if not path.is_file():
        raise at.error(
            f"there is no file {path}. Paths are relative to the grid file; $NAME/... takes a"
            " variable of the environment."
        )
    return path


class Beside(NamedTuple):
    """What open_clip's own file beside a checkpoint says of it, if there is one; ``doubt`` says why
    it is not believed."""

    quick_gelu: bool | None = None
    colours: tuple[Colour, Colour] | None = None
    resampling: tuple[str, str] = RESAMPLED
    doubt: str = ""


def read_beside(path: Path, spec: ModelSpec) -> Beside:
    """`open_clip_config.json`, as published and exported checkpoints have it; one of another
    architecture is another checkpoint's, and nothing is taken from it."""
    try:
        found = json.loads((path.parent / CONFIG).read_text(encoding="utf-8"))
        pictures = found.get("preprocess_cfg", {})
        mean, std = (tuple(map(float, pictures.get(name, ()))) for name in ("mean", "std"))
        model = found["model_cfg"]
        quick_gelu = bool(model.get("quick_gelu", False))
        strange = _strange(model, spec)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Beside()
    if strange:
        return Beside(
            doubt=f"model: {CONFIG} beside {path.name} is not heeded: it is not of {spec.arch}"
            f" ({strange}). If it is the file's, `arch` is another; else write quick_gelu, mean and"
            " std as the weights want them."
        )
    own = zip(("interpolation", "resize_mode"), RESAMPLED, strict=True)
    interpolation, resize_mode = (str(pictures.get(name, usual)) for name, usual in own)
    resampling = (interpolation, resize_mode)
    if len(mean) != 3 or len(std) != 3:
        return Beside(quick_gelu, None, resampling)
    colours = ((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))
    return Beside(quick_gelu, colours, resampling)


def _strange(said: Mapping[str, Any], spec: ModelSpec) -> str:
    """Where a configuration differs in shape from the architecture's, if it does."""
    own = model_config(spec)
    if "embed_dim" not in said:
        return "it does not say embed_dim"
    pairs = [("embed_dim", said["embed_dim"], own["embed_dim"])]
    for tower in ("vision_cfg", "text_cfg"):
        theirs, ours = said.get(tower, {}), own.get(tower, {})
        pairs += [
            (f"{tower}.{name}", theirs[name], ours[name])
            for name in _SHAPE
            if name in theirs and name in ours
        ]
    sizes = {spec.size} if spec.arch in EMBEDDED else {spec.size, own_size(spec.arch)}
    for name, there, here in pairs:
        is_size = name.endswith("image_size")
        if there not in sizes if is_size else _plain(there) != _plain(here):
            return f"{name} is {there} there and {here} here"
    return ""


def own_size(arch: str) -> int:
    """The pictures that an architecture is described for."""
    return int(config_of(arch)["vision_cfg"].get("image_size", 224))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def notes_of(path: Path, beside: Beside, *, activation: bool, colours: bool) -> list[str]:
    """What was taken from the file beside the weights, or why nothing was."""
    if beside.doubt:
        return [beside.doubt]
    doubts = resampling_doubts(f"the weights of {path.name}", *beside.resampling)
    taken = []
    if activation and beside.quick_gelu is not None:
        taken.append("QuickGELU" if beside.quick_gelu else "GELU")
    if colours and beside.colours is not None:
        mean, std = beside.colours
        taken.append(f"mean {list(mean)} and std {list(std)}")
    if not taken:
        return doubts
    return [*doubts, f"model: {CONFIG} beside {path.name} says {', '.join(taken)}: taken from it"]
