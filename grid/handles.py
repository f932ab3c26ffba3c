"""A submitted run's handle: a small file beside its results that says where it runs. No secrets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from victims.errors import UsageError, near

FILE = "job.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Handle:
    """What is needed to find a run again. ``out`` and ``store`` are places on the cluster; where
    they are empty, its own default holds. ``hash`` is empty for a grid that names files which only
    the cluster has."""

    job: str
    address: str
    grid: str
    hash: str
    out: str
    store: str
    submitted: str

    def write(self, folder: Path) -> Path:
        """Replace the folder's handle."""
        from grid.schema.whole import write_whole

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        write_whole(path, json.dumps(asdict(self), indent=1) + "\n")
        return path


def read_handle(path: Path) -> Handle:
    """A handle from its file."""
    names = [field.name for field in fields(Handle)]
    try:
        found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Handle(**{name: str(found[name]) for name in names})
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}: not a handle of `grid submit`; one is JSON with {', '.join(names)}"
        ) from error


def find_handle(named: str, home: Path) -> Path:
    """The handle of a run: the file itself, its results folder, a grid file or a grid's name."""
    path = Path(named)
    if path.is_dir():
        return path / FILE
    if path.suffix == ".json":
        return path
    found = home / path.stem / FILE
    if found.is_file():
        return found
    known = sorted(file.parent.name for file in home.glob(f"*/{FILE}"))
    table = ", ".join(known) or "none"
    raise UsageError(
        f"no run of {named!r} was submitted from here: there is no {found}.{near(path.stem, known)}"
        f" Submitted: {table}. With --out on the cluster, give the handle file that `grid submit`"
        " named."
    )
