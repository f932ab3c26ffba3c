"""What a driver leaves that was killed at any moment, and what the next one makes of it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from grid.logbook import DIED, Logbook
from grid.quick import UNWRITTEN
from grid.schema.writing import write_table
from tests.finished import Finished
from tests.grids import records, run_serial
from victims.keys import Key, content_key

NAMES = ("waiting", "running", "ended", "recalled")
WAITING, RUNNING, ENDED, RECALLED = (content_key("corpus", [name]) for name in NAMES)


def attempt(key: Key, number: int = 1, outcome: str = "ok") -> dict[str, Any]:
    started = datetime(2026, 1, 2, 3, 4, 5, 678, UTC)
    where = {"seconds": 1.5, "host": "here", "pid": 7, "started_at": started}
    return {"key": key, "attempt": number, "outcome": outcome, "error": None, **where}


def leave(out: Path) -> Logbook:
    """What a driver does until it is killed: one stage waits, one runs, one ended."""
    logbook = Logbook(out)
    for key in (WAITING, RUNNING, ENDED, RECALLED):
        logbook.submit(key, 1)
    for key in (RUNNING, ENDED):
        logbook.begin(key)
    logbook.end(RECALLED)
    logbook.record({"attempts": attempt(ENDED)})
    return logbook


def tried(out: Path) -> dict[str, Any]:
    found = records(out, "attempts")
    assert len({a["key"] for a in found}) == len(found), "an attempt is there twice"
    return {a["key"]: (a["outcome"], a["error"]) for a in found}


LEFT = {ENDED: ("ok", None), RUNNING: ("failed_infrastructure", DIED)}


def test_what_ran_and_what_ended_is_put_on_record(tmp_path: Path) -> None:
    leave(tmp_path)
    assert Logbook(tmp_path).recover() == 1
    assert tried(tmp_path) == LEFT
    (record,) = [a for a in records(tmp_path, "attempts") if a["key"] == ENDED]
    assert {name: record[name] for name in attempt(ENDED)} == attempt(ENDED)
    assert Logbook(tmp_path).recover() == 0
    assert tried(tmp_path) == LEFT


def test_a_table_that_was_written_before_the_end_came_is_not_written_twice(tmp_path: Path) -> None:
    logbook = leave(tmp_path)
    write_table(tmp_path, "attempts", [attempt(ENDED)])
    assert Logbook(tmp_path).recover() == 1
    assert tried(tmp_path) == LEFT
    logbook.close()
    leave(tmp_path).written()  # its records would be in the tables; its stages still run
    assert Logbook(tmp_path).recover() == 1


def test_a_last_line_that_is_cut_off_costs_itself_alone(tmp_path: Path) -> None:
    leave(tmp_path)
    whole = (tmp_path / UNWRITTEN).read_bytes()
    (tmp_path / UNWRITTEN).write_bytes(whole[:-20])
    Logbook(tmp_path).recover()
    assert tried(tmp_path) == dict.fromkeys((RUNNING, ENDED), ("failed_infrastructure", DIED))


@pytest.mark.parametrize("is_older", [True, False])
def test_a_log_tells_of_a_stage_that_the_driver_did_not_see_begin(
    tmp_path: Path, *, is_older: bool
) -> None:
    """What an earlier attempt wrote there says nothing of this one."""
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / f"{WAITING}.log"
    line = f"2026-01-02T03:04:05 {WAITING} (corpus) on cpu, process 4711 of there\n"
    log.write_text(line if is_older else "")
    leave(tmp_path)
    if not is_older:
        log.write_text(line)
    assert Logbook(tmp_path).recover() == (1 if is_older else 2)
    if not is_older:
        (record,) = [a for a in records(tmp_path, "attempts") if a["key"] == WAITING]
        assert (record["pid"], record["host"], record["error"]) == (4711, "there", DIED)


def test_the_next_run_reads_it_and_a_run_that_ends_leaves_none(
    finished: Finished, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path)
    assert not (run.out / UNWRITTEN).exists()
    leave(run.out)
    run_serial(run.grid, run.out, run.store)
    assert not (run.out / UNWRITTEN).exists()
    assert {k: v for k, v in tried(run.out).items() if k in LEFT} == LEFT


@pytest.mark.parametrize(
    "line",
    [
        '{"records": {"rows": {"key": "a"}}}',
        '{"records": []}',
        '{"handed_over": "model-1", "attempt": 1, "at": 1, "log_bytes": 0, "begun_at": "x"}',
        '{"ended": []}',
    ],
)
def test_a_line_of_another_shape_stops_nothing(line: str, tmp_path: Path) -> None:
    (tmp_path / "unwritten.jsonl").write_text(line + "\n")
    assert Logbook(tmp_path).recover() == 0
    assert not (tmp_path / "unwritten.jsonl").exists()
