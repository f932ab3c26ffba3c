"""The store's promise: an artefact that exists is whole, whatever was killed, cut or copied."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import pytest

from victims.blobs import RemoteBlobs
from victims.errors import UsageError
from victims.keys import content_key
from victims.manifests import FORMAT
from victims.store import Busy, Damaged, NoSpace, Store

KEY = content_key("thing", "one")
OTHER = content_key("thing", "other")


def make(folder: Path) -> dict[str, Any]:
    (folder / "a.txt").write_text("alpha")
    (folder / "b.bin").write_bytes(bytes(1000))
    return {"rows": 3}


def never(folder: Path) -> dict[str, Any]:
    raise AssertionError("it was made although it was there")


def manifest_of(store: Store, key: str = KEY) -> Path:
    return Path(store.root, "manifests", "thing", f"{key}.json")


def rewrite(store: Store, **changes: Any) -> None:
    body = json.loads(manifest_of(store).read_text())
    manifest_of(store).write_text(json.dumps(body | changes))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def reopened(store: Store) -> Store:
    """What another process sees: nothing remembered."""
    return Store(store.uri)


def remote(folder: Path, cache: Path) -> Store:
    """A store on a file system that is not the local one, as an object store would be."""
    store = Store(folder, cache=cache)
    store.remote = RemoteBlobs(pafs.SubTreeFileSystem(str(folder), pafs.LocalFileSystem()))
    store.root = ""
    return store


@pytest.fixture(params=["local", "uri", "remote"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "remote":
        return remote(tmp_path / "bucket", tmp_path / "cache")
    folder = tmp_path / "store"
    folder.mkdir()
    return Store(folder if request.param == "local" else f"file://{folder}")


# --- making and finding


def test_an_artefact_is_made_once_and_read_whole(any_store: Store) -> None:
    assert KEY not in any_store
    assert any_store.get(KEY) is None
    made = any_store.get_or_make(KEY, make)
    again = any_store.get_or_make(KEY, never)
    assert made == again
    assert made.meta == {"rows": 3}
    assert dict(made.files) == {"a.txt": 5, "b.bin": 1000}
    assert made.path("a.txt").read_text() == "alpha"
    assert KEY in any_store
    with pytest.raises(Damaged, match=r"no file 'c' in it, only \['a.txt', 'b.bin'\]"):
        made.path("c")


def test_a_file_uri_is_the_folder_it_names(tmp_path: Path) -> None:
    Store(tmp_path).get_or_make(KEY, make)
    by_uri = Store(f"file://{tmp_path}")
    assert by_uri.local
    assert by_uri.need(KEY).path("a.txt").read_text() == "alpha"


def test_keys_lists_what_is_finished_and_passes_over_the_rest(any_store: Store) -> None:
    assert any_store.keys("thing") == set()
    any_store.get_or_make(KEY, make)
    any_store.get_or_make(content_key("other", 1), make)
    if any_store.local:
        folder = manifest_of(any_store).parent
        for name in ("README.md", f".{KEY}.json.1234", f"{KEY}.json.bak", "thing-12.json"):
            (folder / name).write_text("{}")
        (folder / f"{content_key('other', 2)}.json").write_text("{}")
    assert any_store.keys("thing") == {KEY}


def test_need_of_what_is_missing_asks_for_it_to_be_made(any_store: Store) -> None:
    with pytest.raises(Damaged, match="not in the store") as error:
        any_store.need(KEY)
    assert error.value.key == KEY


# --- manifest last


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_a_failure_while_making_leaves_nothing(any_store: Store, error: BaseException) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        make(folder)
        raise error

    with pytest.raises(type(error)):
        any_store.get_or_make(KEY, fail)
    assert KEY not in any_store
    assert any_store.keys("thing") == set()
    assert not list(Path(any_store.root or any_store.uri, "data").rglob("*.txt"))
    assert any_store.get_or_make(KEY, make).files


def test_without_its_manifest_whole_data_is_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(name: str, content: bytes) -> None:
        raise InterruptedError(name)

    monkeypatch.setattr(store.disk, "write", die)
    with pytest.raises(InterruptedError):
        store.get_or_make(KEY, make)
    fresh = reopened(store)
    assert KEY not in fresh
    assert fresh.get(KEY) is None


def _wait_with_claim(root: str, ready: Any) -> None:
    def stop(folder: Path) -> dict[str, Any]:
        make(folder)
        ready.set()
        signal.pause()
        return {}

    Store(root).get_or_make(KEY, stop)


def test_a_killed_maker_leaves_nothing_visible_and_no_lock(store: Store) -> None:
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    child = spawn.Process(target=_wait_with_claim, args=(store.uri, ready))
    child.start()
    assert ready.wait(20)
    assert KEY not in store
    with pytest.raises(Busy, match="being made by another process"):
        store.get_or_make(KEY, make)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join(20)
    left = list(Path(store.root, "data", KEY).iterdir())
    assert len(left) == 1
    assert store.get_or_make(KEY, make).path("a.txt").read_text() == "alpha"
    assert not left[0].exists(), "what the dead process left is swept away"


def _race(root: str, barrier: Any, answers: Any) -> None:
    store = Store(root)
    barrier.wait(20)
    try:
        store.get_or_make(KEY, lambda folder: slow(folder, barrier))
        answers.put("made")
    except Busy:
        answers.put("busy")
        barrier.wait(20)


def slow(folder: Path, barrier: Any) -> dict[str, Any]:
    made = make(folder)
    barrier.wait(20)  # until the other has met the lock
    return made


def test_of_two_processes_one_makes_and_the_other_is_told(store: Store) -> None:
    spawn = multiprocessing.get_context("spawn")
    barrier, answers = spawn.Barrier(2), spawn.Queue()
    children = [spawn.Process(target=_race, args=(store.uri, barrier, answers)) for _ in "ab"]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert sorted(answers.get(timeout=5) for _ in "ab") == ["busy", "made"]
    assert store.need(KEY) == reopened(store).need(KEY)
    assert len(list(Path(store.root, "data", KEY).iterdir())) == 1


def test_two_stores_of_one_process_exclude_each_other(store: Store) -> None:
    other = reopened(store)
    with store.claim(KEY):
        with pytest.raises(Busy), other.claim(KEY):
            pass
        with other.claim(OTHER):
            pass
    with other.claim(KEY):
        pass


# --- damage: found, taken out, made again


def truncate(store: Store) -> None:
    path = store.need(KEY).path("b.bin")
    path.write_bytes(path.read_bytes()[:-1])


def flip(store: Store) -> None:
    path = store.need(KEY).path("b.bin")
    body = bytearray(path.read_bytes())
    body[500] ^= 1
    path.write_bytes(body)


def lose(store: Store) -> None:
    store.need(KEY).path("b.bin").unlink()


def cut_manifest(store: Store) -> None:
    text = manifest_of(store).read_text()
    manifest_of(store).write_text(text[: len(text) // 2])


def binary_manifest(store: Store) -> None:
    manifest_of(store).write_bytes(b"\xff\xfe\x00")


def list_manifest(store: Store) -> None:
    manifest_of(store).write_text("[]")


def foreign_manifest(store: Store) -> None:
    store.get_or_make(OTHER, make)
    manifest_of(store).write_text(manifest_of(store, OTHER).read_text())


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (truncate, "b.bin has 999 bytes of 1000"),
        (flip, "b.bin does not match its digest"),
        (lose, "b.bin is missing"),
        (cut_manifest, "unreadable manifest"),
        (binary_manifest, "unreadable manifest"),
        (list_manifest, "unreadable manifest"),
        (foreign_manifest, "unreadable manifest"),
    ],
)
def test_damage_is_found_named_and_mended(
    store: Store, harm: Callable[[Store], None], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    store.get_or_make(KEY, make)
    harm(store)
    fresh = reopened(store)
    with caplog.at_level(logging.WARNING), pytest.raises(Damaged, match=says):
        fresh.get(KEY)
    assert f"removing {KEY}" in caplog.text
    assert KEY not in fresh
    assert fresh.get_or_make(KEY, make).path("b.bin").read_bytes() == bytes(1000)
    harm(fresh)
    # Asking for it to be there is enough: what is damaged is made again.
    assert reopened(store).get_or_make(KEY, make).path("b.bin").read_bytes() == bytes(1000)


@pytest.mark.parametrize("name", ["../x", "ABSOLUTE", ".hidden", "a/../../x", "a/x", "\0"])
def test_a_manifest_never_leads_out_of_its_folder(store: Store, tmp_path: Path, name: str) -> None:
    """Everything else about the entry is right: the file is there, with its size and digest."""
    name = str(tmp_path / "secret") if name == "ABSOLUTE" else name
    folder = store.get_or_make(KEY, make).folder
    (folder / "a").mkdir()
    if name != "\0":
        (folder / name).write_text("alpha")
    entry = {"size": 5, "sha256": hashlib.sha256(b"alpha").hexdigest()}
    rewrite(store, files={name: entry})
    with pytest.raises(Damaged):
        reopened(store).get(KEY)


@pytest.mark.parametrize("name", ["../x", "ABSOLUTE", ".hidden", "a/x", "\0"])
def test_a_manifest_never_leads_to_another_folder(store: Store, tmp_path: Path, name: str) -> None:
    name = str(tmp_path / "secret") if name == "ABSOLUTE" else name
    folder = store.get_or_make(KEY, make).folder
    if name != "\0":
        shutil.copytree(folder, folder.parent / name)
    rewrite(store, attempt=name)
    with pytest.raises(Damaged):
        reopened(store).get(KEY)


@pytest.mark.parametrize("key", ["../x", "thing", "/etc/passwd", "thing-0123456789abcdef/../x"])
def test_a_malformed_key_touches_nothing(store: Store, key: str) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: store.get(key),
        lambda: store.get_or_make(key, make),
        lambda: store.load_partial(key, "x"),
        lambda: store.save_partial(key, "x", lambda path: path.touch()),
        lambda: store.discard(key, "no"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="not a content key"):
            call()


def test_an_artefact_made_again_elsewhere_is_found_again(store: Store) -> None:
    """A long-lived worker remembers the folder of an artefact; another process replaces it."""
    first = store.get_or_make(KEY, make)
    other = reopened(store)
    other.discard(KEY, "for the test")
    second = other.get_or_make(KEY, make)
    assert second.folder != first.folder
    assert store.need(KEY).path("a.txt").read_text() == "alpha"


def test_foreign_files_in_the_store_harm_nothing(store: Store) -> None:
    store.get_or_make(KEY, make)
    for place in (".", "data", f"data/{KEY}", "manifests", "manifests/thing", "locks"):
        (Path(store.root) / place / "notes.txt").write_text("by somebody")
    (store.need(KEY).folder / "stray.txt").write_text("beside the files of the artefact")
    fresh = reopened(store)
    assert set(fresh.need(KEY).files) == {"a.txt", "b.bin"}
    assert fresh.keys("thing") == {KEY}


# --- the store itself


def test_a_newer_store_is_refused_and_left_alone(store: Store) -> None:
    path = Path(store.root, "store.json")
    path.write_text(json.dumps({"format": FORMAT + 1}))
    with pytest.raises(UsageError, match=rf"format {FORMAT + 1}.*up to {FORMAT}.*Upgrade"):
        Store(store.uri)
    assert json.loads(path.read_text()) == {"format": FORMAT + 1}


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": "x"}', "null", "not json"])
def test_what_is_no_store_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "store.json").write_text(text)
    with pytest.raises(UsageError, match="not a store of this tool"):
        Store(tmp_path)
    assert (tmp_path / "store.json").read_text() == text


def test_a_place_that_cannot_hold_a_store_is_explained(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "odd" / "store.json").mkdir(parents=True)
    for place in (file, file / "below", tmp_path / "odd"):
        with pytest.raises(UsageError, match=r"--store .* cannot be used"):
            Store(place)


# --- checkpoints


def put(text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(text)

    return write


def test_a_checkpoint_is_replaced_in_one_step(any_store: Store) -> None:
    assert any_store.load_partial(KEY, "fit") is None
    any_store.save_partial(KEY, "fit", put("one"))
    any_store.save_partial(KEY, "fit", put("two"))

    def fail(path: Path) -> None:
        path.write_text("thr")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        any_store.save_partial(KEY, "fit", fail)
    found = any_store.load_partial(KEY, "fit")
    assert found is not None
    assert found.read_text() == "two"
    assert [path.name for path in found.parent.iterdir()] == ["fit"], "scratch files stayed"
    any_store.drop_partial(KEY)
    assert any_store.load_partial(KEY, "fit") is None


# --- a full disk


def raises(error: BaseException) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        if not path.is_dir():
            path.write_text("half")
        raise error

    return write


NO_SPACE = {
    "errno": OSError(errno.ENOSPC, "No space left on device"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "numpy": OSError("100000 requested and 8176 written"),
    "safetensors": RuntimeError("I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize("error", NO_SPACE.values(), ids=NO_SPACE)
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(
    any_store: Store, error: BaseException
) -> None:
    with pytest.raises(NoSpace, match="free some space, or give another --store"):
        any_store.get_or_make(KEY, lambda folder: raises(error)(folder) or {})
    assert KEY not in any_store
    with pytest.raises(NoSpace):
        any_store.save_partial(KEY, "fit", raises(error))
    assert any_store.load_partial(KEY, "fit") is None
    assert not list(Path(any_store.uri.removeprefix("file://")).rglob(".fit*"))


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), ValueError("28")])
def test_other_errors_are_not_taken_for_a_full_disk(store: Store, error: Exception) -> None:
    with pytest.raises(type(error)):
        store.get_or_make(KEY, lambda folder: raises(error)(folder) or {})


def test_numpys_own_words_for_a_full_disk_are_known(store: Store) -> None:
    full = Path("/dev/full")
    if not full.is_char_device():
        pytest.skip("no /dev/full here")

    def save(folder: Path) -> dict[str, Any]:
        with full.open("wb", buffering=0) as file:
            np.zeros(100_000).tofile(file)
        return {}

    with pytest.raises(NoSpace):
        store.get_or_make(KEY, save)


def test_a_manifest_that_does_not_fit_makes_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Any, content: bytes) -> None:
        file.write(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("victims.blobs.write_and_sync", full)
        with pytest.raises(NoSpace):
            store.get_or_make(KEY, make)
        with pytest.raises(NoSpace):
            Store(f"{store.uri}2")
    names = [path.name for path in Path(store.root).rglob("*") if path.is_file()]
    assert set(names) == {KEY, "store.json"}, "only the lock stays"
    assert store.get_or_make(KEY, make).files


# --- object stores


@pytest.fixture
def bucket(tmp_path: Path) -> tuple[Store, Store]:
    """Two machines, each with its own cache, and one store."""
    place = tmp_path / "bucket"
    return remote(place, tmp_path / "here"), remote(place, tmp_path / "there")


def test_another_machine_fetches_once(bucket: tuple[Store, Store]) -> None:
    here, there = bucket
    here.get_or_make(KEY, make)
    found = there.get_or_make(KEY, never)
    assert found.path("a.txt").read_text() == "alpha"
    assert found.folder.is_relative_to(there.cache)
    for path in Path(here.uri, "data", KEY).rglob("a.txt"):
        path.unlink()
    assert there.need(KEY).path("a.txt").read_text() == "alpha"


def test_a_damaged_copy_is_fetched_again_and_the_original_kept(
    bucket: tuple[Store, Store],
) -> None:
    here, there = bucket
    here.get_or_make(KEY, make)
    flip(there)
    assert remote(Path(there.uri), there.cache).need(KEY).path("b.bin").read_bytes() == bytes(1000)
    assert KEY in here


def test_a_damaged_original_is_taken_out(bucket: tuple[Store, Store]) -> None:
    here, there = bucket
    here.get_or_make(KEY, make)
    (path,) = Path(here.uri, "data").rglob("b.bin")
    path.write_bytes(b"short")
    with pytest.raises(Damaged, match="5 bytes of 1000"):
        there.need(KEY).path("b.bin")
    assert KEY not in there
    assert there.get_or_make(KEY, make).path("b.bin").read_bytes() == bytes(1000)


def test_a_checkpoint_travels(bucket: tuple[Store, Store]) -> None:
    here, there = bucket
    here.save_partial(KEY, "fit", put("one"))
    found = there.load_partial(KEY, "fit")
    assert found is not None
    assert found.read_text() == "one"
    there.drop_partial(KEY)
    assert here.load_partial(KEY, "fit") is None


def test_two_makers_of_one_key_do_no_harm(bucket: tuple[Store, Store]) -> None:
    here, there = bucket

    def overtaken(folder: Path) -> dict[str, Any]:
        there.get_or_make(KEY, make)
        return make(folder)

    first = here.get_or_make(KEY, overtaken)
    assert first.path("a.txt").read_text() == there.need(KEY).path("a.txt").read_text()
