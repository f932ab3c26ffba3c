"""One driver per results directory: a lock that the kernel gives back when its owner dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from victims.errors import GridError, UsageError

LOCK = ".lock"
# Who asks whether a run is alive holds the lock for less than a millisecond.
TRIES, PAUSE_SECONDS = 4, 0.05


@contextlib.contextmanager
def only_driver(out: Path) -> Iterator[None]:
    """Hold the results directory; a second driver on it is told so."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        opened = (out / LOCK).open("a+")
    except OSError as error:
        raise UsageError(
            f"--out {out}: cannot write there ({error.strerror or error}); give another folder"
        ) from error
    with opened as file:
        _take(file, out)
        file.truncate(0)
        with contextlib.suppress(OSError):  # a full disk: it is the lock that counts
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def _take(file: IO[str], out: Path) -> None:
    for left in reversed(range(TRIES)):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if left:
                time.sleep(PAUSE_SECONDS)
                continue
            file.seek(0)
            raise GridError(
                f"another run writes to {out} ({file.read().strip() or 'unknown process'})."
                " Wait for it, stop it, or give another --out; they may share one --store."
            ) from error
        return


def is_held(out: Path) -> bool:
    """Whether a driver works on a results directory now."""
    try:
        opened = (out / LOCK).open("r")
    except OSError:
        return False
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False
