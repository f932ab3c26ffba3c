"""Where results and artefacts lie, and which results directory a word on the command line means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from grid.registry import SOURCE_FILE, TEXT_FILE, Source, grid_source, presets
from grid.schema.directory import home as home
from victims.errors import UsageError, near

GRID_FILE, CAMPAIGN_FILE, BEGAN_FILE = "grid.json", "campaign.yaml", "began.txt"


def places(name: str, out: Path | None, store: str | None) -> tuple[Path, str]:
    """The results directory and the store of a grid of that name."""
    return out or home() / name, store or str(home() / "store")


class Meant(NamedTuple):
    """A grid, its results directory and its store."""

    source: Source
    out: Path
    store: str


def meant(word: str, out: Path | None, store: str | None) -> Meant:
    """What a word on the command line means: of a results directory that one itself, whatever
    its grid is called."""
    source = grid_source(word)
    where = out or results_meant(word)
    if where is None and source.source == f"preset {word}":
        _require_its_own(home() / word, word)
    where, uri = places(source.name, where, store)
    return Meant(source, where, uri)


def _require_its_own(folder: Path, preset: str) -> None:
    """Refuse a preset whose results would go where another file's are."""
    try:
        made = str(json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))["path"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    if made != f"preset {preset}":
        raise UsageError(
            f"{preset} is a preset, and {folder} holds the run of {made}: name that file or that"
            " folder, or give the preset's results a place with --out"
        )


def results_meant(word: str) -> Path | None:
    """The results directory that a word names by its path, or by its name at home where neither a
    file nor a preset is called so."""
    if not word.strip():
        raise UsageError("no grid was named: give a preset, a grid file or a results directory")
    if (Path(word) / TEXT_FILE).is_file():
        return Path(word)
    if Path(word).is_file() or word in presets():
        return None
    at_home = home() / word
    return at_home if (at_home / TEXT_FILE).is_file() else None


def run_folders(folder: Path) -> list[Path]:
    """The results directories in a folder and in its campaigns, by name."""
    found = [path for path in _below(folder) if (path / GRID_FILE).is_file()]
    for campaign in campaign_folders(folder):
        found += [path for path in _below(campaign) if (path / GRID_FILE).is_file()]
    return sorted(found)


def campaign_folders(folder: Path) -> list[Path]:
    """The results directories of campaigns in a folder."""
    return [path for path in _below(folder) if (path / CAMPAIGN_FILE).is_file()]


def folders_with_needs(folder: Path) -> list[Path]:
    """The results directories in a folder that say what they rest on: runs and campaigns."""
    return sorted([*run_folders(folder), *campaign_folders(folder)])


def _below(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def run_folder(grid: str | None, out: Path | None, *, campaigns: bool = False) -> Path:
    """The results directory that is meant: given, or of a grid, or the one written to last; of a
    campaign where they are asked for too."""
    known = folders_with_needs(home()) if campaigns else run_folders(home())
    if grid is None and out is None:
        if not known:
            raise UsageError(f"no run in {home()}. Name a grid, or its results with --out.")
        return max(known, key=_written)
    where = out if out is not None else _named(str(grid))
    marks = (GRID_FILE, CAMPAIGN_FILE) if campaigns else (GRID_FILE,)
    if not any((where / mark).is_file() for mark in marks):
        names = [path.name for path in known]
        told = f" Runs in {home()}: {', '.join(names)}." if names else ""
        raise UsageError(
            f"{where}: no run of a grid is there (no {GRID_FILE}).{near(where.name, names)}{told}"
            " `grid run GRID` starts one; --out names results that lie elsewhere."
        )
    return where


def _named(grid: str) -> Path:
    """A word that names a results directory itself, else the run or the grid of that name."""
    if (Path(grid) / GRID_FILE).is_file() or (Path(grid) / CAMPAIGN_FILE).is_file():
        return Path(grid)
    if grid in presets() or Path(grid).is_file():
        return home() / grid_source(grid).name
    is_path = Path(grid).is_dir() or len(Path(grid).parts) > 1
    return Path(grid) if is_path and not (home() / grid).is_dir() else home() / grid


def _written(folder: Path) -> float:
    """When a run last said what it does, or else what it plans."""
    said = [folder / name for name in ("progress.json", GRID_FILE, CAMPAIGN_FILE)]
    return max(path.stat().st_mtime for path in said if path.exists())
