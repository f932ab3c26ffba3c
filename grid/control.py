"""Requests to a run, as files in its results directory: anybody asks, the driver does and answers.

    control/<time>-<id>.json    a request, whole from the moment it has its name
    control/paused.json         there while the run is paused
    control/answered.jsonl      what was done, one line per request

A request is deleted once what it asks for is on disk, so that a driver killed at any moment leaves
either the request or its effect; doing one twice changes nothing. Nothing heavy is imported here.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from grid.schema.whole import write_whole
from victims.errors import GridError, UsageError

FOLDER = "control"
# A listing of the folder is trusted once its time of change lies so far behind: two changes
# within one tick of the file system's clock look like one.
SETTLED_SECONDS = 1.0


class Verb(StrEnum):
    """What can be asked of a run."""

    PAUSE = "pause"
    PAUSE_NOW = "pause-now"
    RESUME = "resume"
    CANCEL = "cancel"
    REQUEUE = "requeue"


@dataclass(frozen=True, slots=True)
class Request:
    """One request; ``only`` is a filter of cells, for verbs that act on cells."""

    name: str
    verb: Verb
    only: str
    asked_at: float


class Control:
    """The requests of one results directory."""

    def __init__(self, out: Path) -> None:
        self.folder = out / FOLDER
        self._seen: int | None = None

    # --- who asks

    def ask(self, verb: Verb, only: str = "") -> Request:
        """Leave a request; names sort by the time of asking."""
        now = time.time()
        name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        request = Request(name, verb, only, now)
        try:
            self.folder.mkdir(exist_ok=True)
            write_whole(self.folder / f"{name}.json", json.dumps(asdict(request)))
        except OSError as error:
            raise UsageError(
                f"{self.folder}: cannot leave the request there ({error.strerror or error})."
                " Nothing was asked for."
            ) from error
        return request

    def answer_to(self, request: Request) -> str | None:
        """What the driver did about a request, or None so far."""
        with contextlib.suppress(OSError):
            for line in (self.folder / "answered.jsonl").read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    found = json.loads(line)
                    if found["name"] == request.name:
                        return str(found["did"])
        return None

    # --- who does

    def changed(self) -> bool:
        """Whether there may be requests that `pending` has not shown; one look at the folder."""
        try:
            moment = self.folder.stat().st_mtime_ns
        except OSError:
            return False
        if moment == self._seen:
            return False
        self._seen = moment if time.time() - moment / 1e9 > SETTLED_SECONDS else None
        return True

    def pending(self) -> list[Request]:
        """The open requests, oldest first. A file that is none is put aside and raises."""
        found = []
        for path in sorted(self.folder.glob("[0-9]*-*.json")):
            try:
                body = json.loads(path.read_text(encoding="utf-8"))
                verb, only = Verb(body["verb"]), str(body["only"])
                found.append(Request(path.stem, verb, only, float(body["asked_at"])))
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                with contextlib.suppress(OSError):
                    path.rename(path.with_suffix(".bad"))
                raise GridError(
                    f"{path}: not a request ({error!r}); it is renamed to .bad and passed over."
                    " `grid pause|resume|cancel|requeue` write requests."
                ) from error
        return found

    def answer(self, request: Request, did: str) -> None:
        """Say what was done, then delete the request: its effect is on disk."""
        body = {**asdict(request), "did": did, "answered_at": time.time()}
        with (self.folder / "answered.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(body) + "\n")
            file.flush()
            os.fsync(file.fileno())
        (self.folder / f"{request.name}.json").unlink(missing_ok=True)

    # --- paused or not

    @property
    def is_paused(self) -> bool:
        return (self.folder / "paused.json").exists()

    def turn(self, request: Request) -> str:
        """Pause or resume, on disk; what was done, in words."""
        mark = self.folder / "paused.json"
        if request.verb in (Verb.PAUSE, Verb.PAUSE_NOW):
            write_whole(mark, json.dumps({"since": request.asked_at}))
            return "paused: nothing new starts until `grid resume`"
        mark.unlink(missing_ok=True)
        return "resumed"
