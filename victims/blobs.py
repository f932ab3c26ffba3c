"""The few things a store asks of a file system, for local folders and through ``pyarrow.fs``.

What is read may have been put there by anybody: no link is followed, nothing but regular files is
opened (a pipe would never answer), and reading ends at a limit.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import uuid
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from victims.keys import file_sha256

CHUNK_BYTES = 16 << 20


class TooLarge(ValueError):
    """More bytes than what is read can have."""


class NotRegular(ValueError):
    """A link, a pipe or a folder where a file belongs."""


class StoredFile(NamedTuple):
    """A file of a store: its name below the root, its bytes, when it was written and last used.

    File systems note reads once a day at most, and object stores not at all.
    """

    name: str
    size: int
    written: float
    used: float


class Blobs(Protocol):
    """Files by absolute name. What is missing is None or empty, never an error."""

    def read(self, name: str, limit: int) -> bytes | None: ...

    def write(self, name: str, content: bytes) -> None:
        """Replace a small file in one step."""

    def exists(self, name: str) -> bool: ...

    def names(self, folder: str) -> list[str]: ...

    def listing(self, folder: str) -> list[StoredFile]:
        """Every file below a folder, hidden ones left out."""

    def delete(self, name: str) -> None: ...

    def delete_folder(self, name: str) -> None: ...

    def size(self, name: str) -> int | None:
        """Of a regular file, which is not reached through a link of its own."""

    def sha256(self, name: str) -> str: ...


def _not_regular(name: str) -> NotRegular:
    return NotRegular(f"{name} is a link, a pipe or a folder, not a file")


class LocalBlobs:
    """Local and shared folders."""

    def read(self, name: str, limit: int) -> bytes | None:
        try:
            # Without waiting: a pipe that nobody writes to would hold us for ever.
            handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise _not_regular(name) from error
            raise
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise _not_regular(name)
        with os.fdopen(handle, "rb") as file:
            return _bounded(file, name, limit)

    def write(self, name: str, content: bytes) -> None:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            with scratch.open("xb") as file:
                write_and_sync(file, content)
            scratch.replace(path)
        except OSError:
            scratch.unlink(missing_ok=True)
            raise

    def exists(self, name: str) -> bool:
        try:
            Path(name).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def names(self, folder: str) -> list[str]:
        try:
            return os.listdir(folder)  # noqa: PTH208
        except (FileNotFoundError, NotADirectoryError):
            return []

    def listing(self, folder: str) -> list[StoredFile]:
        found = []
        for path in Path(folder).rglob("[!.]*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.lstat()
                if not stat.S_ISDIR(status.st_mode):
                    used = max(status.st_atime, status.st_mtime)
                    found.append(StoredFile(str(path), status.st_size, status.st_mtime, used))
        return found

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            Path(name).unlink()

    def delete_folder(self, name: str) -> None:
        """Remove what is there; of a link, the link alone."""
        path = Path(name)
        with contextlib.suppress(OSError):
            if path.is_symlink() or not path.is_dir():
                path.unlink()
                return
        shutil.rmtree(path, ignore_errors=True)

    def size(self, name: str) -> int | None:
        try:
            found = Path(name).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISREG(found.st_mode):
            raise _not_regular(name)
        return found.st_size

    def sha256(self, name: str) -> str:
        return file_sha256(Path(name))


def write_and_sync(file: IO[bytes], content: bytes) -> None:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def _bounded(file: Any, name: str, limit: int) -> bytes:
    content = bytes(file.read(limit + 1))
    if len(content) > limit:
        raise TooLarge(f"{name} is larger than {limit:,} bytes")
    return content


class RemoteBlobs:
    """An object store, or any other file system that ``pyarrow.fs`` opens."""

    def __init__(self, fs: Any) -> None:
        self.fs = fs
        # Object stores know no folders: to make one costs requests and leaves empty objects.
        self._has_folders = fs.type_name not in ("s3", "gcs", "abfs")

    def read(self, name: str, limit: int) -> bytes | None:
        try:
            with self.fs.open_input_stream(name) as file:
                return _bounded(file, name, limit)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, content: bytes) -> None:
        self._make_parent(name)
        with self.fs.open_output_stream(name) as file:
            file.write(content)

    def exists(self, name: str) -> bool:
        try:
            # One request; to ask what a name is takes a listing as well where it is nothing.
            self.fs.open_input_stream(name).close()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def names(self, folder: str) -> list[str]:
        import pyarrow.fs as pafs

        selector = pafs.FileSelector(folder, allow_not_found=True)
        return [str(info.base_name) for info in self.fs.get_file_info(selector)]

    def listing(self, folder: str) -> list[StoredFile]:
        import pyarrow.fs as pafs

        selector = pafs.FileSelector(folder, allow_not_found=True, recursive=True)
        found = []
        for info in self.fs.get_file_info(selector):
            if info.type == pafs.FileType.File and not info.base_name.startswith("."):
                written = (info.mtime_ns or 0) / 1e9
                found.append(StoredFile(str(info.path), int(info.size), written, written))
        return found

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_file(name)

    def delete_folder(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_dir(name)

    def upload(self, path: Path, name: str) -> None:
        self._make_parent(name)
        with path.open("rb") as source, self.fs.open_output_stream(name) as target:
            shutil.copyfileobj(source, target, CHUNK_BYTES)

    def download(self, name: str, path: Path) -> bool:
        """Whether there is such a file; ``path`` then is a whole copy of it."""
        scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            # Every read is a request, so there are few large ones.
            with self.fs.open_input_stream(name) as source, scratch.open("xb") as target:
                while chunk := source.read(CHUNK_BYTES):
                    target.write(chunk)
            scratch.replace(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        finally:
            scratch.unlink(missing_ok=True)
        return True

    def _make_parent(self, name: str) -> None:
        if self._has_folders:
            self.fs.create_dir(name.rpartition("/")[0], recursive=True)
