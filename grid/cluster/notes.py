"""What a call leaves in the cluster's key-value table: that it was given a place, and that its
stage has begun, both with its process and host, of which a process that died says no more; and
while it works, how many signs of work there have been.

Every process of the cluster reaches the table; log files need not be shared.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

from victims.pulse import beats

PLACED, BEGUN, PULSE = "placed", "begun", "pulse"
PULSE_SECONDS = 2.0

# --- the process that works


def _note(call: str, what: str, value: str = "") -> None:
    from ray.experimental.internal_kv import _internal_kv_put

    with contextlib.suppress(Exception):  # a stage must not fail for want of a note
        _internal_kv_put(f"{call}/{what}", value.encode(), overwrite=True)


@contextlib.contextmanager
def pulse(call: str) -> Iterator[None]:
    """Note now and then that the work goes on, as long as it does."""
    ended = threading.Event()

    def tell() -> None:
        seen = -1
        while not ended.wait(PULSE_SECONDS):
            if (now := beats()) != seen:
                seen = now
                _note(call, PULSE, str(now))

    _note(call, BEGUN, f"{os.getpid()} {socket.gethostname()}")
    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


# --- the driver


def notes(prefix: str) -> set[str]:
    """The names of all notes whose calls begin like this."""
    from ray.experimental.internal_kv import _internal_kv_list

    return {note.decode() for note in _internal_kv_list(f"{prefix}/")}


def last_pulse(call: str) -> bytes:
    """What the last sign of work said; empty if there was none."""
    from ray.experimental.internal_kv import _internal_kv_get

    return _internal_kv_get(f"{call}/{PULSE}") or b""


def place(call: str) -> dict[str, Any]:
    """The process and the host that a call was given, as far as it came to say so."""
    from ray.experimental.internal_kv import _internal_kv_get

    with contextlib.suppress(Exception):  # a cluster that is gone keeps no notes
        for what in (BEGUN, PLACED):
            if noted := _internal_kv_get(f"{call}/{what}"):
                pid, _, host = noted.decode().partition(" ")
                return {"pid": int(pid), "host": host}
    return {"pid": 0, "host": ""}


def forget(call: str) -> None:
    """Drop every note of a call."""
    from ray.experimental.internal_kv import _internal_kv_del

    with contextlib.suppress(Exception):  # a cluster that is gone keeps no notes
        _internal_kv_del(f"{call}/", del_by_prefix=True)
