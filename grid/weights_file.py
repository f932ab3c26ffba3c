"""The file that ``pretrained`` names, and what lies beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from grid.nodes import Raw
from grid.own_paths import own_path
from victims.architectures import Colour, tag_names
from victims.errors import near
from victims.models import EMBEDDED
from victims.pretrained import KINDS


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
    """What open_clip's own file beside a checkpoint says of it, if there is one."""

    quick_gelu: bool | None = None
    colours: tuple[Colour, Colour] | None = None


def read_beside(path: Path) -> Beside:
    """`open_clip_config.json`, as published and exported checkpoints have it."""
    try:
        found = json.loads((path.parent / "open_clip_config.json").read_text(encoding="utf-8"))
        pictures = found.get("preprocess_cfg", {})
        mean, std = (tuple(map(float, pictures.get(name, ()))) for name in ("mean", "std"))
        quick_gelu = bool(found["model_cfg"].get("quick_gelu", False))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Beside()
    if len(mean) != 3 or len(std) != 3:
        return Beside(quick_gelu)
    return Beside(quick_gelu, ((mean[0], mean[1], mean[2]), (std[0], std[1], std[2])))
