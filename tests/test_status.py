"""`grid status`: what a run does, told from its results directory alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grid.chains import read_chains
from grid.control import Control, Verb
from grid.execution import Execution
from grid.history import History
from grid.journal import Journal, read_progress
from grid.lock import is_held, only_driver
from grid.logbook import Logbook
from grid.plan import Plan, chain
from grid.planning import make_plan
from grid.quick import outcomes_in
from grid.room import on_lanes
from grid.run import Driver
from grid.schema.writing import write_rows
from grid.status import status_of
from grid.status_words import status_words
from tests.finished import Finished
from tests.grids import call, environment, records
from victims.errors import GridError
from victims.store import Store


def test_a_finished_run_tells_what_it_made(finished: Finished) -> None:
    found = status_of(finished.out)
    assert (found["state"], found["cells"], found["planned"]) == ("ended", {"ok": 4}, 4)
    stages = found["stages"]
    assert (
        stages["planned"]
        == stages["done"]
        == stages["made"]
        == len(make_plan(finished.grid).stages)
    )
    assert (stages["found"], stages["found_share"]) == (0, 0)
    assert found["seconds"]["left"] == 0
    used = sum(record["seconds"] for record in records(finished.out, "stages"))
    assert found["seconds"]["used"] == pytest.approx(used)
    slowest = [cell["seconds"] for cell in found["slowest"]]
    assert len(slowest) == 4
    assert slowest == sorted(slowest, reverse=True)


def test_reuse_is_counted(finished: Finished, tmp_path: Path) -> None:
    """A second results directory finds everything in the store and makes nothing."""
    driver = Driver(
        finished.grid, tmp_path / "out", Store(finished.store), executor="serial", say=_quiet
    )
    driver.run()
    stages = status_of(tmp_path / "out")["stages"]
    assert (stages["made"], stages["found_share"]) == (0, 1)
    assert stages["found"] == len(make_plan(finished.grid).stages)


def test_a_run_that_was_cut_short_counts_what_it_had_to_make(
    finished: Finished, tmp_path: Path
) -> None:
    """It told of "0 of 100 done; 122 found (100% reuse)", and a restart of the run before it."""
    run = finished.copy(tmp_path)
    plan = make_plan(run.grid)
    for cell in plan.cells:
        Store(run.store).discard(cell.measure.key, "to be made again")
    for path in (run.out / "rows").iterdir():
        path.unlink()
    driver = Driver(run.grid, run.out, Store(run.store), executor="serial", say=_quiet)
    seen: list[str] = []

    def cut_short(executor: object, number: int) -> None:
        seen.extend(status_words(status_of(run.out)).splitlines())
        raise KeyboardInterrupt

    driver.work = cut_short  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        driver.run()
    left, found = len(plan.cells), len(plan.stages) - len(plan.cells)
    share = found / len(plan.stages)
    said = (
        f"stages: 0 of {left} to make are done; {found} more found in the store ({share:.0%} reuse)"
    )
    assert said in seen, "at a start, too"
    assert said in status_words(status_of(run.out))


def _quiet(line: str) -> None:
    pass


def test_chains_say_what_the_plan_says(finished: Finished) -> None:
    """Whoever asks what a cell rests on reads the file instead of planning."""
    plan, chains = make_plan(finished.grid), read_chains(finished.out)
    for planned, cell in zip(plan.cells, chains.cells, strict=True):
        assert (cell.key, cell.label) == (planned.key, planned.cell.label)
        assert chains.of(cell) == set(chain(plan, planned)) | {planned.victim.key}
        assert planned.measure.key in chains.own(cell)
        assert planned.measure.defended.key in chains.own(cell)
        assert planned.victim.key not in chains.own(cell)


# A run that is alive.


class Live:
    """A driver's results directory, held as a driver holds it, and its journal."""

    def __init__(self, finished: Finished, folder: Path) -> None:
        self.run = finished.copy(folder)
        for file in (self.run.out / "rows").iterdir():
            file.unlink()
        self.plan: Plan = make_plan(self.run.grid)
        history = History(None)
        history.rates = {"measure": 10.0, "defended:finetune": 100.0}
        self.journal = Journal(self.run.out, history, Logbook(self.run.out))
        self.journal.lanes, self.journal.room = 2, on_lanes(Execution(), 2)

    def say(self, **changes: Any) -> None:
        stages = self.plan.stages
        left = {k: s for k, s in stages.items() if s.kind in ("defended", "measure")}
        self.journal.expect(
            left, {}, {key: self.journal.history.seconds(s) for key, s in left.items()}
        )
        finetune = self.finetune
        common: dict[str, Any] = {
            "cells_open": 4,
            "cells_asked": 4,
            "planned": set(stages),
            "done": set(stages) - set(left),
            "running": {finetune: stages[finetune]},
            "begun": [stages[finetune]],
            "waiting": 0,
        }
        self.journal.update("running", **{**common, **changes})

    @property
    def finetune(self) -> Any:
        cell = next(c for c in self.plan.cells if c.cell.label == "badnet/0.1/finetune/s0")
        return cell.measure.defended.key


@pytest.fixture
def live(finished: Finished, tmp_path: Path) -> Iterator[Live]:
    made = Live(finished, tmp_path)
    with only_driver(made.run.out):
        yield made


def test_a_live_run_tells_who_runs_who_waits_and_how_long(live: Live) -> None:
    live.journal.begun[live.finetune] = time.time() - 1
    live.say()
    found = status_of(live.run.out)
    assert found["state"] == "running"
    # Its own cell runs; the three others wait, though they rest on the same victims.
    assert found["cells"] == {"running": 1, "missing": 3}
    (stage,) = found["running"]
    assert stage["cells"] == ["badnet/0.1/finetune/s0"]
    assert stage["seconds"] == pytest.approx(1, abs=0.9)
    assert stage["expected_seconds"] == pytest.approx(100 * 32 / 1000)
    # Nothing can end before the longest of what is left, nor before all of it on two lanes.
    assert found["seconds"]["eta"] >= max(3.2 - 1.9, found["seconds"]["left"] / 2)
    assert not stage["is_stalled"]


def test_a_cancelled_cell_does_not_run(live: Live, finished: Finished) -> None:
    """Another cell may need the same stage, which goes on."""
    rows = records(finished.out, "rows")
    own = next(r for r in rows if r["metric"] == "cell" and r["label"] == "badnet/0.1/finetune/s0")
    del own["written_at"]
    write_rows(live.run.out, [{**own, "status": "cancelled"}])
    live.say()
    assert status_of(live.run.out)["cells"] == {"cancelled": 1, "missing": 3}


def test_a_stage_without_a_log_line_is_stalled(live: Live) -> None:
    log = live.run.out / "logs" / f"{live.finetune}.log"
    live.journal.begun[live.finetune] = time.time() - 1000
    live.say()
    os.utime(log, (time.time() - 400,) * 2)
    (stage,) = status_of(live.run.out)["running"]
    assert stage["is_stalled"]
    assert 399 < stage["quiet_seconds"] < 500
    assert "STALLED: no line in its log for 7 min" in status_words(status_of(live.run.out))
    (stage,) = status_of(live.run.out, stalled_after=500)["running"]
    assert not stage["is_stalled"]
    # An old log of an earlier attempt is no sign of this one.
    live.journal.begun[live.finetune] = time.time() - 5
    live.say(at_once=True)
    (stage,) = status_of(live.run.out)["running"]
    assert stage["quiet_seconds"] < 60


def test_the_file_is_written_every_two_seconds_at_most(live: Live) -> None:
    live.say()
    before = live.journal.path.stat().st_mtime_ns
    for _ in range(50):
        live.say(cells_open=3)
    assert live.journal.path.stat().st_mtime_ns == before
    live.say(cells_open=3, at_once=True)
    said = read_progress(live.run.out)
    assert said is not None
    assert said["cells"]["open"] == 3


def test_a_run_that_died_is_told_from_one_that_lives(finished: Finished, tmp_path: Path) -> None:
    """The kernel gives the lock back, whatever the last word was."""
    made = Live(finished, tmp_path)
    with only_driver(made.run.out):
        made.say()
        assert is_held(made.run.out)
        assert status_of(made.run.out)["state"] == "running"
    found = status_of(made.run.out)
    assert (found["state"], found["running"]) == ("died", [])
    assert "died without a word" in status_words(found)


def test_requests_that_wait_are_shown(finished: Finished, tmp_path: Path) -> None:
    run = finished.copy(tmp_path)
    Control(run.out).ask(Verb.CANCEL, "rate=0.1")
    assert "asked for, not done yet: cancel rate=0.1" in status_words(status_of(run.out))


def test_an_error_is_the_last_word(finished: Finished, tmp_path: Path) -> None:
    class Stops(Driver):
        def _todo(self) -> Any:
            raise GridError("no tea left")

    with pytest.raises(GridError):
        Stops(finished.grid, tmp_path / "out", Store(finished.store), say=_quiet).run()
    found = status_of(tmp_path / "out")
    assert (found["state"], found["why"]) == ("stopped", "no tea left")
    assert outcomes_in(tmp_path / "out") == {}


# The command.


def test_the_command_finds_the_newest_run(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("GRID_HOME", str(tmp_path))
    nothing = call(capsys, "status")
    assert nothing.code == 2
    assert "no run in" in nothing.err
    for name in ("older", "newer"):
        finished.copy(tmp_path / name)
        (tmp_path / name / "out").rename(tmp_path / f"{name}-run")
    past = (time.time() - 9000,) * 2
    for name in ("progress.json", "grid.json"):
        os.utime(tmp_path / "older-run" / name, past)
    found = json.loads(call(capsys, "status", "--json").out)
    assert found["results"] == str(tmp_path / "newer-run")
    named = call(capsys, "status", "older-run")
    assert named.out.startswith("tiny (")
    wrong = call(capsys, "status", "older-rnu")
    assert (wrong.code, "Did you mean 'older-run'?" in wrong.err) == (2, True)


def test_looking_imports_nothing_heavy(finished: Finished) -> None:
    """Whoever watches a run must not wait for torch, nor hold its memory."""
    probe = (
        "import sys; from grid.cli import main\n"
        "for words in (['status', sys.argv[1]], ['cache', 'ls', '--store', sys.argv[2]],\n"
        "              ['cache', 'gc', '--store', sys.argv[2], '--out', sys.argv[1]]):\n"
        "    try: main(words)\n"
        "    except SystemExit as ended: print('code', ended.code or 0)\n"
        "print('heavy', {'torch', 'ray', 'open_clip'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe, str(finished.out), str(finished.store)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(GRID_HOME=str(finished.out.parent / "none")),
        check=False,
    )
    assert done.stdout.count("code 0\n") == 3, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy set()"
