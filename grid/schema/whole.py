"""Files that appear whole or not at all: written under a scratch name, then renamed."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from grid.schema.errors import ResultsError


def write_whole(path: Path, text: str) -> None:
    """Replace a small file in one step."""
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def fresh_path(folder: Path) -> Path:
    """A name no other writer takes; names sort by time for the people who list them."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:16]}.parquet"


@contextmanager
def renamed_when_done(target: Path) -> Iterator[Path]:
    """A hidden scratch path beside ``target``, which takes its name once it is on the disk."""
    scratch = target.with_name(f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        scratch.replace(target)
    except OSError as error:
        raise ResultsError(
            f"Cannot write {target}: {error.strerror or error}. Nothing was changed; "
            "make room or choose another results directory, then run the same command again."
        ) from error
    finally:
        scratch.unlink(missing_ok=True)
