"""A store or a grid file that somebody else has written: a clear error, and nothing outside.

Every test here is an attempt to make us read or write elsewhere, to run code, to fill the memory,
or to wait for ever.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grid.gridfile import load_grid
from tests.grids import write_grid_file
from victims.checkpoints import read_state
from victims.errors import GridError, UsageError
from victims.keys import content_key
from victims.manifests import MAX_BYTES
from victims.models import ModelSpec, fresh, load_weights
from victims.store import Damaged, Store

KEY = content_key("thing", "one")
DEEP = b"[" * 200_000
FULL = b'{"format": 1, "key": "%s", "attempt": "a", "meta": %s, "files": %s}'


def make(folder: Path) -> dict[str, Any]:
    (folder / "a.txt").write_text("alpha")
    return {}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Somebody's folder, with a file that has the size and the digest of ours."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "a.txt").write_text("alpha")
    return folder


def manifest_of(store: Store) -> Path:
    return Path(store.root, "manifests", "thing", f"{KEY}.json")


def is_untouched(outside: Path) -> bool:
    return [p.name for p in outside.iterdir()] == ["a.txt"] and (
        outside / "a.txt"
    ).read_text() == "alpha"


# --- manifests


def said(meta: bytes = b"{}", files: bytes = b"{}") -> bytes:
    return FULL % (KEY.encode(), meta, files)


def entry(name: str, size: object = 5, sha256: object = "0" * 64) -> bytes:
    return said(files=json.dumps({name: {"size": size, "sha256": sha256}}).encode())


MANIFESTS = {
    "deep": DEEP,
    "deep meta": said(meta=b'{"a":' * 100_000),
    "meta a list": said(meta=b"[]"),
    "meta nan": said(meta=b'{"a": NaN}'),
    "files a list": said(files=b"[]"),
    "files numbers": said(files=b'{"a.txt": 5}'),
    "size text": entry("a.txt", "5"),
    "size negative": entry("a.txt", -1),
    "size a claim": entry("a.txt", True),
    "size infinite": said(files=b'{"a.txt": {"size": 1e999, "sha256": "x"}}'),
    "size long": said(files=b'{"a.txt": {"size": ' + b"9" * 10_000 + b', "sha256": ""}}'),
    "digest short": entry("a.txt", sha256="00"),
    "digest none": entry("a.txt", sha256=None),
    "parent": entry("../a.txt"),
    "folder": entry("a/b"),
    "absolute": entry("/etc/passwd"),
    "backslash": entry("..\\a.txt"),
    "nul": entry("a\0.txt"),
    "newline": entry("a\n.txt"),
    "escape": entry("a\x1b[2J"),
    "hidden": entry(".a"),
    "empty name": entry(""),
    "long name": entry("a" * 300),
    "not text": b"\xff\xfe",
    "a pickle": b"\x80\x04\x95\x00.",
}


@pytest.mark.parametrize("text", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_is_none(store: Store, text: bytes) -> None:
    store.disk.write(str(manifest_of(store)), text)
    with pytest.raises(Damaged, match="unreadable manifest"):
        store.get(KEY)
    assert store.get_or_make(KEY, make).path("a.txt").read_text() == "alpha"


def test_a_manifest_beyond_all_bounds_is_not_read(store: Store) -> None:
    store.get_or_make(KEY, make)
    with manifest_of(store).open("r+b") as file:
        file.truncate(1 << 40)  # a hole: it takes no room on the disk
    with pytest.raises(Damaged, match="unreadable manifest"):
        Store(store.uri).get(KEY)
    assert MAX_BYTES < 1 << 30


@pytest.mark.parametrize("text", [DEEP, b'{"format": 1e999}', b'{"format": []}', b"\x80\x04."])
def test_a_description_of_the_store_that_is_none(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "store.json").write_bytes(text)
    with pytest.raises(UsageError, match="not a store of this tool"):
        Store(tmp_path)


def test_a_huge_description_of_the_store(tmp_path: Path) -> None:
    with (tmp_path / "store.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UsageError, match="larger than 65,536 bytes"):
        Store(tmp_path)


# --- links and pipes


def link_file(store: Store, outside: Path) -> None:
    path = store.need(KEY).folder / "a.txt"
    path.unlink()
    path.symlink_to(outside / "a.txt")


def link_attempt(store: Store, outside: Path) -> None:
    folder = store.need(KEY).folder
    (folder / "a.txt").unlink()
    folder.rmdir()
    folder.symlink_to(outside)


def link_key(store: Store, outside: Path) -> None:
    folder = store.need(KEY).folder
    (outside / folder.name).mkdir()
    (outside / folder.name / "a.txt").write_text("alpha")
    (folder / "a.txt").unlink()
    folder.rmdir()
    folder.parent.rmdir()
    folder.parent.symlink_to(outside)


def link_manifest(store: Store, outside: Path) -> None:
    (outside / "m.json").write_bytes(manifest_of(store).read_bytes())
    manifest_of(store).unlink()
    manifest_of(store).symlink_to(outside / "m.json")


def pipe_manifest(store: Store, outside: Path) -> None:
    manifest_of(store).unlink()
    os.mkfifo(manifest_of(store))


def pipe_file(store: Store, outside: Path) -> None:
    path = store.need(KEY).folder / "a.txt"
    path.unlink()
    os.mkfifo(path)


HARMS = [link_file, link_attempt, link_key, link_manifest, pipe_manifest, pipe_file]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_no_link_is_followed_and_no_pipe_waited_for(
    store: Store, outside: Path, harm: Callable[[Store, Path], None]
) -> None:
    store.get_or_make(KEY, make)
    harm(store, outside)
    before = {p: p.read_bytes() for p in outside.rglob("*") if p.is_file()}
    fresh_eyes = Store(store.uri)
    with pytest.raises(Damaged):
        fresh_eyes.get(KEY)
    assert fresh_eyes.get_or_make(KEY, make).path("a.txt").read_text() == "alpha"
    after = {p: p.read_bytes() for p in outside.rglob("*") if p.is_file()}
    assert before == after, "what a link leads to is neither written nor removed"
    assert not fresh_eyes.need(KEY).folder.is_symlink()


@pytest.mark.timeout(30)
def test_locks_and_checkpoints_that_lead_elsewhere(store: Store, outside: Path) -> None:
    for folder in ("locks", "partial", "data"):
        Path(store.root, folder).mkdir()
    Path(store.root, "locks", KEY).symlink_to(outside / "a.txt")
    Path(store.root, "partial", KEY).symlink_to(outside)
    Path(store.root, "data", KEY).symlink_to(outside)

    def make_with_checkpoint(folder: Path) -> dict[str, Any]:
        assert store.load_partial(KEY, "a.txt") is None
        store.save_partial(KEY, "fit", lambda path: path.touch())
        return make(folder)

    store.get_or_make(KEY, make_with_checkpoint)
    store.drop_partial(KEY)
    assert is_untouched(outside)
    # A checkpoint that is itself a link or a pipe is none.
    Path(store.root, "partial", KEY).mkdir()
    Path(store.root, "partial", KEY, "fit").symlink_to(outside / "a.txt")
    assert store.load_partial(KEY, "fit") is None
    Path(store.root, "partial", KEY, "fit").unlink()
    os.mkfifo(Path(store.root, "partial", KEY, "fit"))
    assert store.load_partial(KEY, "fit") is None
    Path(store.root, "locks", KEY).unlink()
    os.mkfifo(Path(store.root, "locks", KEY))
    with store.claim(KEY):
        assert is_untouched(outside)


# --- weights


def safetensors(header: dict[str, Any] | bytes, body: bytes = b"", length: int = -1) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length < 0 else length) + text + body


def tensor(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}}


WEIGHTS = {
    "a pickle": b"\x80\x04\x95\x17\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93.",
    "a .pt archive": b"PK\x03\x04" + bytes(200),
    "empty": b"",
    "a header of 2**62 bytes": safetensors({}, length=1 << 62),
    "a header past the end": safetensors({}, length=5000),
    "a header that is no JSON": safetensors(b"{" * 1000),
    "a header that is deep": safetensors(DEEP[:50_000]),
    "data past the end": safetensors(tensor([1024], 0, 4096), bytes(16)),
    "a shape that lies": safetensors(tensor([1 << 40], 0, 16), bytes(16)),
    "a shape that overflows": safetensors(tensor([1 << 62, 1 << 62], 0, 16), bytes(16)),
    "offsets turned round": safetensors(tensor([4], 16, 0), bytes(16)),
    "a hole": safetensors(tensor([4], 8, 24), bytes(24)),
    "an unknown type": safetensors(tensor([4], 0, 16, "PICKLE"), bytes(16)),
}


@pytest.mark.parametrize("body", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_are_none(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(body)
    with pytest.raises(GridError, match=r"model-x: .* is no safetensors file"):
        load_weights(MODEL, path, "model-x")
    assert read_state(path) is None, "as a mid-fit checkpoint it costs a fresh start"


MODEL = fresh(ModelSpec(), 0)


# --- grid files


GRIDS = {
    "billion laughs": ("a: &a [1,1]\n" + "".join(f"{c}: &{c} [*{p},*{p},*{p},*{p},*{p},*{p}]\n"
                       for p, c in zip("abcdefghij", "bcdefghijk", strict=True)), "20,000 values"),
    "a python object": ("name: !!python/object/apply:os.system [id]\n", "no tags"),
    "a merged object": ("<<: !!python/name:os.system\n", "no tags"),
    "deep lists": ("a: " + "[" * 100_000 + "\n", "nested more than 20 deep"),
    "deep mappings": ("".join(f"{' ' * i}a:\n" for i in range(300)), "nested more than 20 deep"),
    "a key twice": ("name: a\nname: b\n", "given twice"),
    "a number without end": (f"seeds: [{'9' * 5000}]\n", "more than 40 characters"),
    "a bare control character": ("name: a\x1b[2J\n", "not text"),
    "a pickle": ("\x80\x04\x95\n", "not"),
}  # fmt: skip


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("text", "says"), GRIDS.values(), ids=GRIDS)
def test_a_grid_file_that_means_harm(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    refused(path, says)
    assert [p.name for p in tmp_path.iterdir()] == ["x.yaml"]


VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "an infinite rate": ({"rates": [0, math.inf]}, "expected a share in 0..1"),
    "a rate that is none": ({"rates": [0, math.nan]}, "expected a share in 0..1"),
    "infinite epochs": ({"recipes": {"victim": {"epochs": math.inf}}}, "epochs"),
    "a seed beyond all numbers": ({"seeds": [10**30]}, "seeds"),
    "a name that leads out": ({"name": "../../x"}, "cannot name a run's folder"),
    "an absolute name": ({"name": "/etc/x"}, "cannot name a run's folder"),
    "a name with a backslash": ({"name": "a\\b"}, "cannot name a run's folder"),
    "a name with an escape": ({"name": "a\x1b[2Jb"}, "cannot name a run's folder"),
    "a name with a line end": ({"name": "a\nb"}, "cannot name a run's folder"),
    "a name with a NUL": ({"name": "a\0b"}, "cannot name a run's folder"),
    "a label that leads out": ({"defenses": [{"none": {"as": "../x"}}]}, "../x"),
    "a label with an escape": ({"defenses": [{"none": {"as": "a\x1b[2J"}}]}, "x1b"),
    "a corpus that is no folder": ({"data": {"folder": {"root": "a\0b"}}}, "folder"),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("changes", "says"), VALUES.values(), ids=VALUES)
def test_a_value_that_means_harm(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    refused(write_grid_file(tmp_path, **changes), says)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.yaml"]


def refused(path: Path, says: str) -> None:
    with pytest.raises(UsageError) as error:
        load_grid(str(path))
    assert says in str(error.value)
    # What is shown on a terminal cannot steer it.
    assert all(c.isprintable() or c == "\n" for c in str(error.value))
    assert len(str(error.value)) < 2000


def test_the_digest_of_the_file_outside_is_the_one_of_ours(outside: Path) -> None:
    """Else the tests of links would pass for another reason."""
    found = hashlib.sha256((outside / "a.txt").read_bytes()).hexdigest()
    assert found == hashlib.sha256(b"alpha").hexdigest()
