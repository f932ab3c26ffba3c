"""Which results directory is meant: a path, or the name of what ran."""

from __future__ import annotations

import os
from pathlib import Path

from grid.schema.errors import AskedError
from victims.errors import near

MARKS = ("grid.json", "campaign.yaml", "rows", "trials")
"""What a results directory holds, a run's or a campaign's."""


def home() -> Path:
    """Where results go by default. A Ray job's working directory is temporary: not there."""
    if "GRID_HOME" in os.environ:
        return Path(os.environ["GRID_HOME"])
    inside_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return Path.home() / ".backdoor-grid" / "runs" if inside_job else Path("runs")


def results_directory(named: str | Path) -> Path:
    """A results directory by its path, or by the name of what ran."""
    path = Path(named)
    if not str(named).strip():
        raise AskedError("no results were named: give a directory such as runs/demo, or a name.")
    if path.is_dir():
        return path
    if path.is_file():
        raise AskedError(f"{path} is a file: give the directory of the results, such as runs/demo.")
    if (home() / path).is_dir():
        return home() / path
    there = sorted(home().glob("*")) if home().is_dir() else []
    names = [p.name for p in there if any((p / mark).exists() for mark in MARKS)]
    told = f" In {home()}: {', '.join(names)}." if names else f" Nothing has run in {home()} yet."
    where = path if len(path.parts) > 1 else home() / path  # a path, or the name of what ran
    raise AskedError(
        f"No results at {where}: there is no such directory.{near(path.name, names)}{told}"
    )
