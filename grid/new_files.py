"""Where a command is to write: looked at before the work is done, and told in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from victims.errors import UsageError

PICTURES = (".png", ".svg", ".pdf", ".jpg")


def folder_for(option: str, folder: Path) -> Path:
    """A folder to put several files into; it is made."""
    if folder.is_file() or folder.suffix in PICTURES:
        raise UsageError(
            f"{option} {folder}: every figure becomes files of its own, so give a folder, such as"
            f" {folder.parent if folder.parent.name else 'figures'}"
        )
    with writing(option, folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def file_for(option: str, path: Path) -> Path:
    """A file to write; the folder that it lies in is made."""
    if path.is_dir():
        raise UsageError(
            f"{option} {path}: is a folder; give a file in it, such as {path / 'NAME'}"
        )
    with writing(option, path):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Say in one line that something cannot be written at or below a path."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            at, wanted = Path(error.filename).absolute(), path.absolute()
            if not at.is_relative_to(wanted.parent) and not wanted.is_relative_to(at):
                raise  # of something else, which was read
        raise UsageError(
            f"{option} {path}: cannot be written ({error.strerror or error}); give another place"
        ) from error
