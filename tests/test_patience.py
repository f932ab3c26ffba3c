"""Storage that fails for a moment is asked again, and what lasts is said at once."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from victims.blobs import LocalBlobs
from victims.errors import UsageError
from victims.keys import content_key
from victims.patience import Patience, Unreachable, is_momentary
from victims.store import NoSpace, Store

KEY = content_key("thing", "one")
S3 = "When reading information for key 'k' in bucket 'b': AWS Error "

MOMENTARY = [
    OSError(errno.ESTALE, "Stale file handle"),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.EAGAIN, "Resource temporarily unavailable"),
    OSError(errno.ETIMEDOUT, "Connection timed out"),
    OSError(f"{S3}UNKNOWN (HTTP status 503) during HeadObject operation: No response body."),
    OSError(f"{S3}SLOW_DOWN during PutObject operation: Please reduce your request rate."),
    OSError(f"{S3}NETWORK_CONNECTION during HeadObject operation: curlCode: 7, Could not connect"),
    OSError(f"{S3}UNKNOWN (HTTP status 429) during HeadObject operation: No response body."),
]
LASTING = [
    OSError(errno.ENOENT, "No such file or directory"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EACCES, "Permission denied"),
    OSError(errno.EROFS, "Read-only file system"),
    OSError(f"{S3}ACCESS_DENIED during HeadObject operation: No response body."),
    OSError(f"{S3}NO_SUCH_BUCKET during PutObject operation: no such bucket 'slow-503'"),
    Unreachable("the store does not answer (HTTP status 503)"),
    ValueError("HTTP status 503"),
]


@pytest.mark.parametrize("error", MOMENTARY, ids=str)
def test_what_is_tried_again(error: OSError) -> None:
    waits: list[float] = []
    answers: list[Exception | str] = [error, error, "there"]

    def ask() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert is_momentary(error)
    assert Patience("x", sleep=waits.append)(ask) == "there"
    assert len(waits) == 2
    assert 0.1 <= waits[0] <= 0.2 <= waits[1] <= 0.4, "it waits longer each time"


@pytest.mark.parametrize("error", LASTING, ids=str)
def test_what_is_not_tried_again(error: Exception) -> None:
    tries: list[int] = []

    def ask() -> None:
        tries.append(1)
        raise error

    assert not is_momentary(error)
    with pytest.raises(type(error)):
        Patience("x", sleep=lambda seconds: None)(ask)
    assert len(tries) == 1


def test_a_storage_that_stays_away_is_the_machines_fault() -> None:
    waits: list[float] = []

    def ask() -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with pytest.raises(Unreachable, match=r"store at x does not answer, after 4 tries") as error:
        Patience("x", sleep=waits.append)(ask)
    assert isinstance(error.value, OSError), "so a stage that meets it is tried again"
    assert len(waits) == 3


class Shaky(LocalBlobs):
    """A file system of which every third call fails at first, half done if it writes."""

    def __init__(self, number: int, every: int = 3) -> None:
        self.number, self.every = number, every
        self.calls = self.failed = 0

    def _slip(self) -> None:
        self.calls += 1
        if self.calls % self.every == 0:
            self.failed += 1
            raise OSError(self.number, os.strerror(self.number))

    def read(self, name: str, limit: int) -> bytes | None:
        self._slip()
        return super().read(name, limit)

    def write(self, name: str, content: bytes) -> None:
        super().write(name, content)
        self._slip()

    def exists(self, name: str) -> bool:
        self._slip()
        return super().exists(name)

    def names(self, folder: str) -> list[str]:
        self._slip()
        return super().names(folder)

    def size(self, name: str) -> int | None:
        self._slip()
        return super().size(name)

    def sha256(self, name: str) -> str:
        self._slip()
        return super().sha256(name)


def make(folder: Path) -> dict[str, Any]:
    for index in range(4):
        (folder / f"{index}.bin").write_bytes(os.urandom(8) + bytes([index]) * 100)
    return {"rows": 3}


def _put(path: Path) -> None:
    path.write_text("half a fit")


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EAGAIN, errno.ETIMEDOUT])
def test_a_shaky_folder_keeps_the_stores_promises(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shaky = Shaky(number, every=3 if number != errno.EIO else 2)
    monkeypatch.setattr("victims.patience.FIRST_WAIT", 0.0)
    store = Store(tmp_path, blobs=shaky)
    store.patience.sleep = lambda seconds: None
    made = store.get_or_make(KEY, make)
    store.save_partial(KEY, "fit", _put)
    assert store.load_partial(KEY, "fit") is not None
    assert KEY in store
    assert store.keys("thing") == {KEY}
    calm = Store(tmp_path).need(KEY)
    again = Store(tmp_path).need(KEY)
    assert (made.meta, made.files, made.folder) == (calm.meta, calm.files, again.folder)
    assert shaky.failed >= 4
    assert store.patience.waited == shaky.failed


def test_a_folder_that_is_gone_for_good_names_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("victims.patience.FIRST_WAIT", 0.0)
    store = Store(tmp_path, blobs=Shaky(errno.ESTALE, every=10**9))
    store.patience.sleep = lambda seconds: None
    store.disk = Shaky(errno.ESTALE, every=1)
    with pytest.raises(Unreachable, match="does not answer, after 4 tries"):
        store.get(KEY)
    away = Shaky(errno.ESTALE, every=1)
    with pytest.raises(UsageError, match=r"--store .*: cannot be used \(the store at"):
        Store(tmp_path, blobs=away)
    assert away.calls == 4


def test_a_full_disk_is_not_waited_for(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.disk = Shaky(errno.ENOSPC, every=1)
    with pytest.raises(NoSpace):
        store.make(KEY, make)
    assert store.patience.waited == 0
