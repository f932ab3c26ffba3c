"""What a driver has done and has not put into its tables yet: ``unwritten.jsonl``.

Records gather for seconds before they become a file, and a stage that runs has none. What a driver
that was killed leaves here, the next one puts on record, so that no attempt is lost.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grid.quick import UNWRITTEN, files_in
from grid.schema.columns import KINDS
from grid.schema.whole import write_whole
from grid.schema.writing import write_table
from grid.work import Ended
from victims.keys import Key

DIED = "its driver died before it took the outcome"
# What a line raises that we did not write: a file that others touched must not stop a run.
MISSHAPEN = (KeyError, TypeError, AttributeError, ValueError)


class Logbook:
    """Lines of a file: a stage was handed over, has begun, has ended; records of attempts."""

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out / UNWRITTEN
        self._open: dict[Key, dict[str, Any]] = {}

    def submit(self, key: Key, attempt: int) -> None:
        """A stage is handed over. What its log says from here on is about this attempt."""
        try:
            size = self._log(key).stat().st_size
        except OSError:
            size = 0
        entry = {"handed_over": key, "attempt": attempt, "at": time.time(), "log_bytes": size}
        self._open[key] = entry
        self._write(entry)

    def begin(self, key: Key) -> None:
        if (entry := self._open.get(key)) is not None:
            entry["begun_at"] = time.time()
            self._write(entry)

    def end(self, key: Key) -> None:
        """A stage is in nobody's hands any more, be it that it ended or that it was taken back."""
        if self._open.pop(key, None) is not None:
            self._write({"ended": key})

    def record(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        """What will be in the tables, by their kinds, of one attempt, which has ended."""
        self._open.pop(Key(records["attempts"]["key"]), None)
        self._write({"records": records})

    def written(self) -> None:
        """All records are in the tables: what is left are the stages that are not at their end."""
        with contextlib.suppress(OSError):  # what is in both places is found to be so
            if self._open:
                write_whole(self.path, "".join(map(_line, self._open.values())))
            else:
                self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """The driver has stopped its stages and has written everything."""
        self._open.clear()
        self.written()

    def recover(self) -> int:
        """Put into the tables what a driver left that was killed; how many of its stages ran."""
        running: dict[str, dict[str, Any]] = {}
        found: dict[str, list[dict[str, Any]]] = {"attempts": [], "stages": []}
        lost: list[dict[str, Any]] = []
        for entry in self._read():
            with contextlib.suppress(*MISSHAPEN):
                running.pop(entry.get("ended", ""), None)
                if "handed_over" in entry:
                    running[entry["handed_over"]] = entry
                for kind, record in entry.get("records", {}).items():
                    found[kind].append(_from_plain(kind, record))
                    running.pop(record["key"], None)
        for entry in running.values():
            with contextlib.suppress(*MISSHAPEN):
                lost += self._lost(entry)
        found["attempts"] += lost
        for kind, records in found.items():
            there = self._there(kind) if records else set()
            fresh = [record for record in records if _identity(record) not in there]
            if fresh:
                write_table(self.out, kind, fresh)
        self.close()
        return len(lost)

    def _lost(self, entry: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The record of a stage that ran when its driver died; none where it had not begun."""
        log, host, pid, seconds = self._log(entry["handed_over"]), "", 0, 0.0
        at = entry.get("begun_at")
        with contextlib.suppress(OSError):
            with log.open("rb") as file:
                file.seek(entry["log_bytes"])
                begun = re.findall(
                    r", process (\d+) of (\S+)\n", file.read().decode("utf-8", "replace")
                )
            if begun:
                at = at or entry["at"]
                pid, host = int(begun[-1][0]), begun[-1][1]
                seconds = max(0.0, log.stat().st_mtime - at)
        if at is None:
            return []
        return [
            {
                "key": entry["handed_over"],
                "attempt": entry["attempt"],
                "outcome": Ended.INFRASTRUCTURE.value,
                "error": DIED,
                "seconds": seconds,
                "host": host,
                "pid": pid,
                "started_at": datetime.fromtimestamp(at, UTC),
            }
        ]

    def _there(self, kind: str) -> set[tuple[Any, ...]]:
        """The records that a table has: a driver may die between its table and this file."""
        names = ["key", "attempt", "started_at"]
        tables = [file.read(columns=names) for file in files_in(self.out, kind)]
        return {_identity(record) for table in tables for record in table.to_pylist()}

    def _read(self) -> list[dict[str, Any]]:
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):  # the last one may be cut off
                found.append(json.loads(line))
        return [entry for entry in found if isinstance(entry, dict)]

    def _log(self, key: str) -> Path:
        return self.out / "logs" / f"{key}.log"

    def _write(self, entry: Mapping[str, Any]) -> None:
        # A full disk stops the run elsewhere, with its reason.
        with contextlib.suppress(OSError), self.path.open("ab", buffering=0) as file:
            file.write(_line(entry).encode())


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, default=datetime.isoformat) + "\n"


def _identity(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return (record["key"], record["attempt"], record["started_at"])


def _from_plain(kind: str, record: Mapping[str, Any]) -> dict[str, Any]:
    times = {column.name for column in KINDS[kind] if column.type == "timestamp"}
    return {
        name: datetime.fromisoformat(value) if name in times and value else value
        for name, value in record.items()
    }
