"""Content-addressed store: an artefact exists if and only if its manifest does, and is whole.

Layout under the root, a local folder or any file system that ``pyarrow.fs`` opens by URI:

    store.json                      the format of this store
    data/<key>/<attempt>/<file>     written first, under a name nobody else uses
    manifests/<kind>/<key>.json     written last, in one step; names the attempt, sizes and digests
    partial/<key>/                  mid-fit checkpoints of work in progress
    pins/                           what must be kept, whoever needs it
    locks/<key>                     who is making the artefact (local stores)

Two writers of one key write the same content under two attempts; the later manifest wins.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from victims.errors import GridError, UsageError
from victims.keys import PATTERN, Key, kind_of

log = logging.getLogger(__name__)

FORMAT = 1
# Files up to this size are checked against their digest when first opened in a process, larger
# ones (memory-mapped corpora) against their size.
VERIFY_BYTES = 32 << 20


class Damaged(GridError):
    """A published artefact is not what its manifest says. It has been taken out of the store."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return f"{self.key} in the store is damaged ({self.reason}); it will be made again"


class Busy(GridError):
    """Another process is making this artefact now."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return f"{self.key} is being made by another process"


@dataclass(frozen=True, slots=True)
class Artefact:
    """A whole artefact: what its manifest says, and local paths to its files."""

    key: Key
    meta: Mapping[str, Any]
    folder: Path
    files: Mapping[str, int]

    def path(self, name: str) -> Path:
        if name not in self.files:
            raise Damaged(self.key, f"no file {name!r} in it, only {sorted(self.files)}")
        return self.folder / name


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fault(folder: Path, files: Mapping[str, tuple[int, str]]) -> str:
    """What is wrong with the files of an artefact, if anything."""
    for name, (size, sha256) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (actual := path.stat().st_size) != size:
            return f"{name} has {actual} bytes of {size}"
        if size <= VERIFY_BYTES and _hash(path) != sha256:
            return f"{name} does not match its digest"
    return ""


class NoSpace(GridError):
    """The disk under the store is full."""


# What numpy and safetensors say, in their text alone, when a disk is full.
_FULL = re.compile(rf"os error ({errno.ENOSPC}|{errno.EDQUOT})\b|\d+ requested and \d+ written")


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return not isinstance(error, GridError) and _FULL.search(str(error)) is not None


def _out_of_space(error: BaseException, where: object) -> NoSpace:
    return NoSpace(
        f"{where}: no space left on the device. Nothing was half-written; free some space, or give"
        f" another --store, and run the same command again. ({error})"
    )


class StoredFile(NamedTuple):
    """A file of a store: its name below the root, its bytes, when it was written and last used.

    File systems note reads once a day at most, and object stores not at all.
    """

    name: str
    size: int
    written: float
    used: float


class Store:
    """Artefacts by content key."""

    def __init__(self, uri: str | Path, *, cache: Path | None = None) -> None:
        import pyarrow.fs as pafs

        self.uri = str(uri)
        if "://" in self.uri:
            self.fs, self.root = pafs.FileSystem.from_uri(self.uri)
            self.local = isinstance(self.fs, pafs.LocalFileSystem)
        else:
            self.fs, self.root = pafs.LocalFileSystem(), str(Path(self.uri).resolve())
            self.local = True
        self.root = self.root.rstrip("/")
        home = Path(os.environ.get("GRID_HOME", Path.home() / ".backdoor-grid"))
        self.cache = cache or home / "cache" / hashlib.sha256(self.uri.encode()).hexdigest()[:12]
        self._opened: dict[str, Artefact] = {}
        self._check_format()

    # --- what there is

    def _check_format(self) -> None:
        name = f"{self.root}/store.json"
        try:
            found = self._read(name)
            if found is None:
                self._write(name, json.dumps({"format": FORMAT}).encode())
                return
        except OSError as error:
            if _is_full(error):
                raise _out_of_space(error, self.uri) from error
            raise UsageError(f"--store {self.uri}: cannot be used ({error})") from error
        try:
            number = int(json.loads(found)["format"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{name} is not a store of this tool; give an empty folder with --store"
            ) from error
        if number > FORMAT:
            raise UsageError(
                f"{self.uri} was written by a newer version of this tool (store format {number},"
                f" this version reads up to {FORMAT}). Upgrade, or give another --store."
            )

    def __contains__(self, key: str) -> bool:
        return self._exists(self._manifest_name(key))

    def keys(self, kind: str) -> set[Key]:
        """Every finished key of a kind, by one listing; foreign names are passed over."""
        import pyarrow.fs as pafs

        folder = f"{self.root}/manifests/{kind}"
        if self.local:
            names = os.listdir(folder) if os.path.isdir(folder) else []  # noqa: PTH208, PTH112
        else:
            selector = pafs.FileSelector(folder, allow_not_found=True)
            names = [info.base_name for info in self.fs.get_file_info(selector)]
        stems = (name.removesuffix(".json") for name in names if name.endswith(".json"))
        return {Key(stem) for stem in stems if (m := PATTERN.fullmatch(stem)) and m[1] == kind}

    def get(self, key: str) -> Artefact | None:
        """The artefact, verified, or None. A damaged one is removed and raises `Damaged`."""
        opened = self._opened.get(key)
        # Another process may have found it damaged and made it again, in another folder.
        if opened is not None and opened.folder.is_dir():
            return opened
        text = self._read(self._manifest_name(key))
        if text is None:
            return None
        try:
            found = json.loads(text)
            files = {str(n): (int(f["size"]), str(f["sha256"])) for n, f in found["files"].items()}
            attempt, meta = str(found["attempt"]), dict(found["meta"])
            if any("/" in name or name.startswith(".") for name in [*files, attempt]):
                raise ValueError("a file name leaves the artefact's folder")
            if found["key"] != key:
                raise ValueError(f"it is the manifest of {found['key']}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.discard(key, f"unreadable manifest: {error}")
            raise Damaged(key, "unreadable manifest") from error
        folder = self._fetch(key, attempt, list(files))
        reason = _fault(folder, files)
        if reason and not self.local:
            # It may be our copy that is damaged, not what everybody else shares.
            shutil.rmtree(folder, ignore_errors=True)
            reason = _fault(self._fetch(key, attempt, list(files)), files)
        if reason:
            self.discard(key, reason)
            raise Damaged(key, reason)
        sizes = {name: size for name, (size, _) in files.items()}
        artefact = Artefact(Key(key), meta, folder, sizes)
        self._opened[key] = artefact
        return artefact

    def need(self, key: str) -> Artefact:
        """The artefact; one that is missing raises `Damaged`, so that the driver makes it again."""
        artefact = self.get(key)
        if artefact is None:
            raise Damaged(key, "it is not in the store")
        return artefact

    def discard(self, key: str, reason: str) -> None:
        """Take an artefact out of the store (its manifest first)."""
        log.warning("removing %s from the store: %s", key, reason)
        self.remove(key)

    # --- making

    def get_or_make(self, key: str, make: Callable[[Path], Mapping[str, Any]]) -> Artefact:
        """The artefact, made in a scratch folder by ``make`` (which returns its meta) if absent.

        Raises `Busy` at once when another process is making it.
        """
        with contextlib.suppress(Damaged):
            if (artefact := self.get(key)) is not None:
                return artefact
        with self.claim(key):
            if key in self and (artefact := self.get(key)) is not None:
                return artefact
            return self.make(key, make)

    def make(self, key: str, make: Callable[[Path], Mapping[str, Any]]) -> Artefact:
        """Run ``make`` on a scratch folder and publish it; the caller holds the claim."""
        attempt = uuid.uuid4().hex[:12]
        final = f"{self.root}/data/{key}/{attempt}"
        if self.local:
            # We hold the claim, so whatever lies here was left by a process that died.
            shutil.rmtree(Path(final).parent, ignore_errors=True)
        scratch = Path(final) if self.local else Path(tempfile.mkdtemp(prefix="grid-"))
        try:
            scratch.mkdir(parents=True, exist_ok=True)
            meta = make(scratch)
            files = {
                path.name: {"size": path.stat().st_size, "sha256": _hash(path)}
                for path in sorted(scratch.iterdir())
            }
            if not self.local:
                self._upload(scratch, final)
            manifest = {"format": FORMAT, "key": key, "attempt": attempt, "files": files}
            body = json.dumps({**manifest, "meta": meta}, sort_keys=True, allow_nan=False)
            self._write(self._manifest_name(key), body.encode())
        except BaseException as error:
            shutil.rmtree(scratch, ignore_errors=True)
            if _is_full(error):
                raise _out_of_space(error, self.uri) from error
            raise
        finally:
            if not self.local:
                shutil.rmtree(scratch, ignore_errors=True)
        artefact = self.get(key)
        assert artefact is not None
        return artefact

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[None]:
        """Hold the right to make ``key``, or raise `Busy`.

        On a local or shared folder an advisory lock that the kernel releases when its owner dies.
        Object stores have none: two makers may then race, which costs time and is otherwise safe.
        """
        if not self.local:
            yield
            return
        kind_of(key)
        path = Path(self.root, "locks", key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            opened = path.open("w")
        except OSError as error:
            if _is_full(error):
                raise _out_of_space(error, self.uri) from error
            raise
        with opened as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Busy(key) from error
            yield

    # --- mid-fit checkpoints

    def save_partial(self, key: str, name: str, write: Callable[[Path], None]) -> None:
        """Replace the file ``name`` among the checkpoints of ``key`` in one step."""
        kind_of(key)
        folder = Path(self.root, "partial", key) if self.local else self.cache / "partial" / key
        scratch = folder / f".{name}.{uuid.uuid4().hex[:8]}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write(scratch)
            scratch.replace(folder / name)
            if not self.local:
                target = f"{self.root}/partial/{key}/{name}"
                self._write(target, (folder / name).read_bytes())
        except BaseException as error:
            scratch.unlink(missing_ok=True)
            if _is_full(error):
                raise _out_of_space(error, self.uri) from error
            raise

    def load_partial(self, key: str, name: str) -> Path | None:
        """The checkpoint, or None."""
        kind_of(key)
        if self.local:
            path = Path(self.root, "partial", key, name)
            return path if path.exists() else None
        content = self._read(f"{self.root}/partial/{key}/{name}")
        if content is None:
            return None
        path = self.cache / "partial" / key / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def drop_partial(self, key: str) -> None:
        self._delete_folder(f"{self.root}/partial/{key}")
        if not self.local:
            shutil.rmtree(self.cache / "partial" / key, ignore_errors=True)

    # --- for who looks after the store

    def listing(self, folder: str) -> Iterator[StoredFile]:
        """Every file below a folder of the store, hidden ones left out."""
        import pyarrow.fs as pafs

        above = f"{self.root}/"
        if self.local:
            for path in Path(self.root, folder).rglob("[!.]*"):
                with contextlib.suppress(FileNotFoundError):
                    found = path.lstat()
                    if not path.is_dir():
                        name, written = str(path).removeprefix(above), found.st_mtime
                        used = max(found.st_atime, written)
                        yield StoredFile(name, found.st_size, written, used)
            return
        selector = pafs.FileSelector(f"{self.root}/{folder}", allow_not_found=True, recursive=True)
        for info in self.fs.get_file_info(selector):
            if info.type == pafs.FileType.File and not info.base_name.startswith("."):
                written = (info.mtime_ns or 0) / 1e9
                yield StoredFile(info.path.removeprefix(above), info.size, written, written)

    def read_note(self, name: str) -> bytes | None:
        """A small file of the store by its name below the root, or None."""
        return self._read(f"{self.root}/{name}")

    def write_note(self, name: str, content: bytes) -> None:
        """Replace such a file in one step."""
        self._write(f"{self.root}/{name}", content)

    def drop_note(self, name: str) -> None:
        self._delete(f"{self.root}/{name}")

    def remove(self, key: str) -> None:
        """Take an artefact out, its manifest first; the caller holds its claim."""
        self._opened.pop(key, None)
        self._delete(self._manifest_name(key))
        self._delete_folder(f"{self.root}/data/{key}")
        if not self.local:
            shutil.rmtree(self.cache / key, ignore_errors=True)

    def remove_attempt(self, key: str, attempt: str) -> None:
        """Delete what an attempt left that did not become the artefact."""
        kind_of(key)
        self._delete_folder(f"{self.root}/data/{key}/{attempt}")

    # --- the file system

    def _manifest_name(self, key: str) -> str:
        return f"{self.root}/manifests/{kind_of(key)}/{key}.json"

    def _exists(self, name: str) -> bool:
        import pyarrow.fs as pafs

        if self.local:
            return os.path.exists(name)  # noqa: PTH110
        return bool(self.fs.get_file_info(name).type == pafs.FileType.File)

    def _read(self, name: str) -> bytes | None:
        try:
            if self.local:
                return Path(name).read_bytes()
            with self.fs.open_input_stream(name) as file:
                return bytes(file.read())
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _write(self, name: str, content: bytes) -> None:
        """Replace a small file in one step: a rename, or a single PUT on object stores."""
        if not self.local:
            # Object stores know no folders; other file systems want them made first.
            self.fs.create_dir(name.rpartition("/")[0], recursive=True)
            with self.fs.open_output_stream(name) as file:
                file.write(content)
            return
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            with scratch.open("wb") as file:
                _write_and_sync(file, content)
            scratch.replace(path)
        except OSError:
            scratch.unlink(missing_ok=True)
            raise

    def _delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_file(name)

    def _delete_folder(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError, OSError):
            self.fs.delete_dir(name)

    def _upload(self, folder: Path, target: str) -> None:
        import pyarrow.fs as pafs

        self.fs.create_dir(target, recursive=True)
        local = pafs.LocalFileSystem()
        for path in folder.iterdir():
            pafs.copy_files(
                str(path),
                f"{target}/{path.name}",
                source_filesystem=local,
                destination_filesystem=self.fs,
            )

    def _fetch(self, key: str, attempt: str, names: list[str]) -> Path:
        """A local folder that holds the files; what is missing at the source stays missing."""
        source = f"{self.root}/data/{key}/{attempt}"
        if self.local:
            return Path(source)
        import pyarrow.fs as pafs

        folder = self.cache / key / attempt
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            if (folder / name).exists():
                continue
            scratch = folder / f".{name}.{uuid.uuid4().hex[:8]}"
            with contextlib.suppress(FileNotFoundError):
                pafs.copy_files(
                    f"{source}/{name}",
                    str(scratch),
                    source_filesystem=self.fs,
                    destination_filesystem=pafs.LocalFileSystem(),
                )
                scratch.replace(folder / name)
        return folder


def _write_and_sync(file: IO[bytes], content: bytes) -> None:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
