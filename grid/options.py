"""Arguments and options that several commands take, and how all of them speak to who runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class ExecutorName(StrEnum):
    RAY = "ray"
    SERIAL = "serial"


GridArg = Annotated[str, typer.Argument(help="A preset's name or a YAML file.")]
OutOpt = Annotated[Path | None, typer.Option("--out", help="Results directory; default runs/NAME.")]
StoreOpt = Annotated[
    str | None, typer.Option("--store", help="Artefact store, a path or URI; default runs/store.")
]
OnlyOpt = Annotated[
    str | None, typer.Option("--only", help="Cells to take, e.g. 'defense=none rate<0.02'.")
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
OnOpt = Annotated[
    str | None,
    typer.Option(
        "--on",
        help="What stages ask for, in place of the file's execution: gpu, shared-gpu, four-gpus,"
        " cpu.",
    ),
]
ExecutorOpt = Annotated[
    ExecutorName, typer.Option("--executor", help="serial runs in this process, without Ray.")
]


def say(line: str) -> None:
    """Beside what is printed: on standard error."""
    typer.echo(line, err=True)


def print_found(found: Any, as_json: bool, words: Callable[[Any], str]) -> None:
    """Print what a command found: as JSON, or in words."""
    typer.echo(json.dumps(found, indent=1, sort_keys=True) if as_json else words(found))
