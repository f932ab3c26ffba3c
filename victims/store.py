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
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from victims.blobs import Blobs, LocalBlobs, NotRegular, RemoteBlobs, StoredFile, TooLarge
from victims.errors import GridError, UsageError
from victims.keys import PATTERN, Key, file_sha256, kind_of
from victims.manifests import (
    FORMAT,
    MAX_BYTES,
    BadManifest,
    Entry,
    Manifest,
    decode,
    plain_json,
)
from victims.patience import Patience, Unreachable
from victims.places import open_place

log = logging.getLogger(__name__)

# Files up to this size are checked against their digest when first opened in a process, larger
# ones (memory-mapped corpora) against their size.
VERIFY_BYTES = 32 << 20
FORMAT_BYTES = 1 << 16


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


class CannotOpen(UsageError, Unreachable):
    """A place that cannot hold a store, or does not let us in."""


@dataclass(frozen=True, slots=True)
class Artefact:
    """A whole artefact: what its manifest says, and local paths to its files.

    From an object store a file is fetched, and checked, when its path is asked for.
    """

    key: Key
    meta: Mapping[str, Any]
    folder: Path
    files: Mapping[str, int]
    fetch: Callable[[str], None] | None = field(default=None, compare=False, repr=False)

    def path(self, name: str) -> Path:
        if name not in self.files:
            raise Damaged(self.key, f"no file {name!r} in it, only {sorted(self.files)}")
        if self.fetch is not None:
            self.fetch(name)
        return self.folder / name


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


class Store:
    """Artefacts by content key."""

    def __init__(
        self, uri: str | Path, *, cache: Path | None = None, blobs: Blobs | None = None
    ) -> None:
        self.uri = str(uri)
        place = open_place(self.uri)
        self.root, self.shown = place.root, place.shown
        self.disk: Blobs = blobs or LocalBlobs()
        self.remote = RemoteBlobs(place.remote) if place.remote is not None else None
        self.patience = Patience(self.shown)
        home = Path(os.environ.get("GRID_HOME", Path.home() / ".backdoor-grid"))
        name = hashlib.sha256(place.identity.encode()).hexdigest()[:12]
        self.cache = cache or home / "cache" / name
        self._opened: dict[str, Artefact] = {}
        # What this process has fetched and checked, and whose checkpoints it has seen.
        self._checked: set[tuple[str, str, str]] = set()
        self._begun: set[str] = set()
        self._check_format()

    @property
    def local(self) -> bool:
        return self.remote is None

    @property
    def _blobs(self) -> Blobs | RemoteBlobs:
        return self.disk if self.remote is None else self.remote

    # --- what there is

    def _check_format(self) -> None:
        name = f"{self.root}/store.json"
        try:
            # A wrong endpoint fails like a server that is away: one try, and Arrow's own three.
            tries = None if self.local else 1
            found = self.patience(lambda: self._blobs.read(name, FORMAT_BYTES), tries)
            if found is None:
                body = f'{{"format": {FORMAT}}}'.encode()
                self.patience(lambda: self._blobs.write(name, body), tries)
                return
            number = int(plain_json(found)["format"])
        except (OSError, NotRegular) as error:
            if _is_full(error):
                raise _out_of_space(error, self.shown) from error
            raise CannotOpen(f"--store {self.shown}: cannot be used ({_reason(error)})") from error
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise UsageError(
                f"{self.shown}/store.json is not a store of this tool"
                f" ({_reason(error)}); give an empty folder with --store"
            ) from error
        if number > FORMAT:
            raise UsageError(
                f"{self.shown} was written by a newer version of this tool (store format {number},"
                f" this version reads up to {FORMAT}). Upgrade, or give another --store."
            )

    def __contains__(self, key: str) -> bool:
        name = self._manifest_name(key)
        return self.patience(lambda: self._blobs.exists(name))

    def keys(self, kind: str) -> set[Key]:
        """Every finished key of a kind, by one listing; foreign names are passed over."""
        names = self.patience(lambda: self._blobs.names(f"{self.root}/manifests/{kind}"))
        stems = (name.removesuffix(".json") for name in names if name.endswith(".json"))
        return {Key(stem) for stem in stems if (m := PATTERN.fullmatch(stem)) and m[1] == kind}

    def get(self, key: str) -> Artefact | None:
        """The artefact, verified, or None. A damaged one is removed and raises `Damaged`."""
        opened = self._remembered(key)
        # Of an object store what we remember is our copy, which others may have found damaged.
        if opened is not None and (self.local or key in self):
            return opened
        name = self._manifest_name(key)
        try:
            text = self.patience(lambda: self._blobs.read(name, MAX_BYTES))
            if text is None:
                return None
            manifest = decode(text, key)
        except (BadManifest, TooLarge, NotRegular) as error:
            self.discard(key, f"unreadable manifest: {error}")
            raise Damaged(key, "unreadable manifest") from error
        if self.local and (reason := self._fault(manifest, list(manifest.files))):
            self.discard(key, reason)
            raise Damaged(key, reason)
        return self._open(manifest)

    def _remembered(self, key: str) -> Artefact | None:
        opened = self._opened.get(key)
        # Another process may have found it damaged and made it again, in another folder.
        return opened if opened is not None and opened.folder.is_dir() else None

    def _open(self, manifest: Manifest) -> Artefact:
        folder = self._folder(manifest)
        fetch = None
        if not self.local:
            folder.mkdir(parents=True, exist_ok=True)

            def fetch(name: str) -> None:
                self._fetch(manifest, name)

        sizes = {name: entry.size for name, entry in manifest.files.items()}
        artefact = Artefact(Key(manifest.key), manifest.meta, folder, sizes, fetch)
        self._opened[manifest.key] = artefact
        return artefact

    def _folder(self, manifest: Manifest) -> Path:
        base = Path(self.root, "data") if self.local else self.cache
        return base / manifest.key / manifest.attempt

    def _fault(self, manifest: Manifest, names: list[str]) -> str:
        """What is wrong with the local files of an artefact, if anything."""
        folder = self._folder(manifest)
        if folder.is_symlink() or folder.parent.is_symlink():
            return "its folder is a link"
        try:
            for name in names:
                entry = manifest.files[name]
                path = str(folder / name)
                size = self.patience(lambda path=path: self.disk.size(path))  # type: ignore[misc]
                if size is None:
                    return f"{name} is missing"
                if size != entry.size:
                    return f"{name} has {size} bytes of {entry.size}"
                if size <= VERIFY_BYTES and self._digest(path) != entry.sha256:
                    return f"{name} does not match its digest"
        except NotRegular:
            return f"{name} is a link, not a file"
        return ""

    def _digest(self, path: str) -> str:
        return self.patience(lambda: self.disk.sha256(path))

    def _fetch(self, manifest: Manifest, name: str) -> None:
        """See to it that a whole copy of a file is in the cache."""
        folder = self._folder(manifest)
        path, mark = folder / name, (manifest.key, manifest.attempt, name)
        if mark in self._checked and path.exists():
            return
        reason = self._fault(manifest, [name])
        if reason:
            # It may be our copy that is absent or damaged, not what everybody else shares.
            if folder.is_symlink() or folder.parent.is_symlink():
                self.disk.delete_folder(str(folder.parent))
            folder.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            self._download(f"{self.root}/data/{manifest.key}/{manifest.attempt}/{name}", path)
            reason = self._fault(manifest, [name])
        if reason:
            self.discard(manifest.key, reason)
            raise Damaged(manifest.key, reason)
        self._checked.add(mark)

    def _download(self, name: str, path: Path) -> bool:
        remote = self.remote
        assert remote is not None
        try:
            return self.patience(lambda: remote.download(name, path))
        except OSError as error:
            if _is_full(error):
                raise _out_of_space(error, self.cache) from error
            raise

    def need(self, key: str) -> Artefact:
        """The artefact; one that is missing raises `Damaged`, so that the driver makes it again."""
        artefact = self._remembered(key) or self.get(key)
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
            if self.made_meanwhile(key) and (artefact := self.get(key)) is not None:
                return artefact
            return self.make(key, make)

    def made_meanwhile(self, key: str) -> bool:
        """Whether another made ``key`` before we had the claim; where none is held, nobody asks."""
        return self.local and key in self

    def make(self, key: str, make: Callable[[Path], Mapping[str, Any]]) -> Artefact:
        """Run ``make`` on a scratch folder and publish it; the caller holds the claim."""
        attempt = uuid.uuid4().hex[:12]
        # Of an object store this is where a copy of the artefact would lie once fetched.
        scratch = self._folder(Manifest(key, attempt, {}, {}))
        name = self._manifest_name(key)
        if self.local:
            # We hold the claim, so whatever lies here was left by a process that died.
            self._delete_folder(str(scratch.parent))
        try:
            scratch.mkdir(parents=True, exist_ok=True)
            meta = make(scratch)
            files = {
                path.name: Entry(path.stat().st_size, file_sha256(path))
                for path in sorted(scratch.iterdir())
            }
            manifest = Manifest(key, attempt, files, meta)
            self._upload(manifest)
            body = manifest.encode()
            self.patience(lambda: self._blobs.write(name, body))
        except BaseException as error:
            shutil.rmtree(scratch, ignore_errors=True)
            if _is_full(error):
                raise _out_of_space(error, self.shown) from error
            raise
        if not self.local:
            self._checked |= {(key, attempt, file) for file in files}
            # As a reader finds it, whose lists were tuples.
            return self._open(decode(body, key))
        artefact = self.get(key)
        assert artefact is not None
        return artefact

    def _upload(self, manifest: Manifest) -> None:
        remote = self.remote
        if remote is None:
            return
        folder = self._folder(manifest)
        for file in manifest.files:
            path, target = folder / file, f"{self.root}/data/{manifest.key}/{manifest.attempt}"
            self.patience(
                lambda path=path, target=target: remote.upload(path, f"{target}/{path.name}")  # type: ignore[misc]
            )

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[None]:
        """Hold the right to make ``key``, or raise `Busy`.

        On a local or shared folder an advisory lock that the kernel releases when its owner dies.
        Object stores have none: two makers may then race, which costs time and is otherwise safe.
        """
        kind_of(key)
        if not self.local:
            yield
            return
        path = Path(self.root, "locks", key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = _open_lock(path)
        except OSError as error:
            if _is_full(error):
                raise _out_of_space(error, self.shown) from error
            raise
        with os.fdopen(handle, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Busy(key) from error
            yield

    # --- mid-fit checkpoints

    def save_partial(self, key: str, name: str, write: Callable[[Path], None]) -> None:
        """Replace the file ``name`` among the checkpoints of ``key`` in one step."""
        kind_of(key)
        remote, folder = self.remote, self._partial(key)
        scratch = folder / f".{name}.{uuid.uuid4().hex[:8]}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write(scratch)
            scratch.replace(folder / name)
            if remote is not None:
                self._begun.add(key)
                target = f"{self.root}/partial/{key}/{name}"
                self.patience(lambda: remote.upload(folder / name, target))
        except BaseException as error:
            scratch.unlink(missing_ok=True)
            if _is_full(error):
                raise _out_of_space(error, self.shown) from error
            raise

    def load_partial(self, key: str, name: str) -> Path | None:
        """The checkpoint, or None."""
        kind_of(key)
        path = self._partial(key) / name
        if not self.local:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self._download(f"{self.root}/partial/{key}/{name}", path):
                return None
            self._begun.add(key)
        try:
            found = self.patience(lambda: self.disk.size(str(path)))
        except NotRegular as error:
            log.warning("%s; the fit starts over", error)
            return None
        return path if found is not None else None

    def drop_partial(self, key: str) -> None:
        kind_of(key)
        if self.local:
            self._delete_folder(f"{self.root}/partial/{key}")
        elif key in self._begun:  # a fit looks for checkpoints first, so these are all there are
            self._begun.discard(key)
            self._delete_folder(f"{self.root}/partial/{key}")
            shutil.rmtree(self.cache / "partial" / key, ignore_errors=True)

    def _partial(self, key: str) -> Path:
        base = Path(self.root, "partial") if self.local else self.cache / "partial"
        folder = base / key
        if folder.is_symlink():
            folder.unlink()
        return folder

    # --- for who looks after the store

    def listing(self, folder: str) -> Iterator[StoredFile]:
        """Every file below a folder of the store, hidden ones left out; names are from the root."""
        above = f"{self.root}/"
        for found in self.patience(lambda: self._blobs.listing(f"{self.root}/{folder}")):
            yield found._replace(name=found.name.removeprefix(above))

    def read_note(self, name: str) -> bytes | None:
        """A small file of the store by its name below the root, or None."""
        return self.patience(lambda: self._blobs.read(f"{self.root}/{name}", MAX_BYTES))

    def write_note(self, name: str, content: bytes) -> None:
        """Replace such a file in one step."""
        self.patience(lambda: self._blobs.write(f"{self.root}/{name}", content))

    def drop_note(self, name: str) -> None:
        self.patience(lambda: self._blobs.delete(f"{self.root}/{name}"))

    def drop_notes(self, folder: str) -> None:
        """All small files of a folder of their own."""
        self._delete_folder(f"{self.root}/{folder}")

    def remove(self, key: str) -> None:
        """Take an artefact out, its manifest first; the caller holds its claim."""
        self._opened.pop(key, None)
        name = self._manifest_name(key)
        self.patience(lambda: self._blobs.delete(name))
        self._delete_folder(f"{self.root}/data/{key}")
        if not self.local:
            shutil.rmtree(self.cache / key, ignore_errors=True)

    def remove_partial(self, key: str) -> None:
        """Delete the checkpoints of a key, whoever saved them."""
        kind_of(key)
        self._begun.add(key)
        self.drop_partial(key)

    def remove_attempt(self, key: str, attempt: str) -> None:
        """Delete what an attempt left that did not become the artefact."""
        kind_of(key)
        self._delete_folder(f"{self.root}/data/{key}/{attempt}")

    # --- the file system

    def _manifest_name(self, key: str) -> str:
        return f"{self.root}/manifests/{kind_of(key)}/{key}.json"

    def _delete_folder(self, name: str) -> None:
        with contextlib.suppress(OSError):
            self.patience(lambda: self._blobs.delete_folder(name))


def _open_lock(path: Path) -> int:
    """The lock file, created if absent; a link that was put there is replaced."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
    path.unlink()
    return os.open(path, flags | os.O_EXCL, 0o666)


def _reason(error: BaseException) -> str:
    """What went wrong at opening, and what to do about the usual causes."""
    said = str(error).strip()
    if "NO_SUCH_BUCKET" in said:
        return f"there is no such bucket; make it, or correct the name. {said}"
    if re.search(r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE|HTTP status 40[13]", said):
        return (
            "access denied: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a profile, or a"
            f" role) that may read and write there. {said}"
        )
    return said
