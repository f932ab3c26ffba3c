"""Paths that a grid file names: beside the file, and below variables of the environment."""

from __future__ import annotations

import os
import re
from pathlib import Path

from grid.nodes import Raw

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def own_path(text: str, at: Raw) -> Path:
    """An absolute path. ``$NAME`` and ``${NAME}`` are taken from the environment, and what is
    relative lies beside the grid file; of a preset, which is no file of the user's, below the
    working directory."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not os.environ.get(name):
            raise at.error(
                f"{text!r} needs the environment variable {name}, which is not set."
                f" Say export {name}=FOLDER first, or write the path."
            )
        return os.environ[name]

    path = Path(_VARIABLE.sub(value, text)).expanduser()
    file = Path(at.where.file)
    beside = file.parent / path if file.is_file() else path
    # Not resolved: what a link points at may have another name, without a suffix.
    return Path(os.path.abspath(beside))  # noqa: PTH100
