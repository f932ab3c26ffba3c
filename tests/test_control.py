"""Requests to a run: pause, resume, cancel, requeue, alive or not, and whatever is killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from grid.control import Control, Request, Verb
from grid.execution import Execution
from grid.executors import SerialExecutor
from grid.planning import make_plan
from grid.quick import outcomes_in
from grid.run import Driver
from grid.status import status_of
from grid.steering import Steering, settle
from tests.finished import Finished
from tests.grids import (
    RECIPE,
    TINY,
    call,
    numbers,
    outcomes,
    records,
    run_serial,
    tiny_grid,
    write_grid_file,
)
from tests.processes import command, wait_for
from tests.stages import Note
from victims.errors import GridError
from victims.recipe import Runtime
from victims.store import Store


def _quiet(line: str) -> None:
    pass


def ask(out: Path, verb: Verb, only: str = "") -> Request:
    return Control(out).ask(verb, only)


def statuses(out: Path) -> dict[str, str]:
    return {name: row["status"] for name, row in outcomes(out).items()}


# The files.


def test_requests_come_in_order_and_go_when_answered(tmp_path: Path) -> None:
    control = Control(tmp_path)
    assert not control.changed()
    first, second = ask(tmp_path, Verb.PAUSE), ask(tmp_path, Verb.CANCEL, "rate=0")
    assert control.changed()
    assert control.pending() == [first, second]
    control.answer(first, "paused")
    assert control.pending() == [second]
    assert (control.answer_to(first), control.answer_to(second)) == ("paused", None)


def test_a_request_within_one_tick_of_the_clock_is_seen(tmp_path: Path) -> None:
    """The folder's time of change is the same for two changes within a few milliseconds."""
    control = Control(tmp_path)
    ask(tmp_path, Verb.PAUSE)
    moment = control.folder.stat().st_mtime_ns
    assert control.changed()
    ask(tmp_path, Verb.RESUME)
    os.utime(control.folder, ns=(moment, moment))
    assert control.changed()
    # Later on one look at the folder is enough.
    os.utime(control.folder, ns=(moment - 10**10,) * 2)
    assert [control.changed() for _ in range(3)] == [True, False, False]


def test_what_is_no_request_is_put_aside_and_told(finished: Finished, tmp_path: Path) -> None:
    run = finished.copy(tmp_path)
    ask(run.out, Verb.CANCEL, "rate=0.1")
    bad = run.out / "control" / f"{0:020d}-0.json"
    bad.write_text('{"verb": "explode"}')
    said: list[str] = []
    driver = Driver(run.grid, run.out, Store(run.store), executor="serial", say=said.append)
    driver.settle()
    assert "not a request" in said[0]
    assert not bad.exists()
    driver.settle()
    assert Control(run.out).pending() == []


# A run that is not alive.


def test_cells_of_a_stopped_run_are_cancelled_and_opened_again(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, store = tmp_path / "out", tmp_path / "store"
    only = ("--only", "rate=0 defense=none")
    where = ("--out", out, "--store", finished.store)
    assert call(capsys, "run", finished.file, "--executor", "serial", *only, *where).code == 0
    done = call(capsys, "cancel", out, "--only", "rate=0.1")
    assert (done.code, done.out.split(";")[0]) == (0, "2 cells cancelled")
    # What has an outcome keeps it.
    assert call(capsys, "cancel", out, "--only", "rate=0").out.startswith("1 cell cancelled")
    checked = call(capsys, "check", finished.file, "--json", *where)
    assert checked.code == 3
    found = json.loads(checked.out)
    assert found["counts"] == {"ok": 1, "cancelled": 3}
    assert not found["complete"]
    assert "3 cancelled" in call(capsys, "leaderboard", out).out
    # A run leaves them alone, and says so.
    again = call(capsys, "run", finished.file, "--executor", "serial", *where)
    assert again.code == 3
    assert "3 cells cancelled; `grid requeue` opens them again" in again.err
    assert json.loads(call(capsys, "plan", finished.file, "--json", *where).out)["cells"] == 4
    opened = call(capsys, "requeue", out, "--only", "defense=finetune rate=0.1")
    assert opened.out.startswith("1 cell open again")
    assert status_of(out)["cells"] == {"ok": 1, "cancelled": 2, "requeued": 1}
    run_serial(finished.grid, out, finished.store)
    assert statuses(out) == {
        "badnet/0/none/s0": "ok",
        "badnet/0/finetune/s0": "cancelled",
        "badnet/0.1/none/s0": "cancelled",
        "badnet/0.1/finetune/s0": "ok",
    }
    assert not store.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("cancel", "OUT", "--only", "atack=badnet"), "Did you mean 'attack'?"),
        (("cancel", "OUT", "--only", "attack=badnut"), "Did you mean 'badnet'?"),
        (("requeue", "OUT", "--only", ""), "is no condition"),
        (("cancel", "OUT"), "Missing option"),
        (("pause", "NOWHERE"), "no run of a grid is there"),
    ],
)
def test_wrong_words_ask_for_nothing(
    finished: Finished,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    says: str,
) -> None:
    run = finished.copy(tmp_path)
    named = {"OUT": str(run.out), "NOWHERE": str(tmp_path / "nowhere")}
    answer = call(capsys, *(named.get(word, word) for word in words))
    assert answer.code == 2
    assert says in answer.err
    assert not (run.out / "control").exists()


class _KilledError(BaseException):
    """What ends a driver between doing something and saying so."""


def test_a_driver_killed_before_its_answer_loses_no_request(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished.copy(tmp_path)
    for file in (run.out / "rows").iterdir():
        file.unlink()
    request = ask(run.out, Verb.CANCEL, "rate=0.1")
    with monkeypatch.context() as patched:

        def killed(self: Control, request: Request, did: str) -> None:
            raise _KilledError

        patched.setattr(Control, "answer", killed)
        with pytest.raises(_KilledError):
            settle(run.out, _quiet)
    # Its effect is on disk, and it is still there; doing it again changes nothing.
    assert Control(run.out).pending() == [request]
    assert sorted(status for status, _ in outcomes_in(run.out).values()) == ["cancelled"] * 2
    settle(run.out, _quiet)
    assert Control(run.out).pending() == []
    assert Control(run.out).answer_to(request) == "0 cells cancelled"
    assert len(records(run.out, "rows")) == 2


def test_another_grid_file_in_the_results_leaves_the_request_standing(
    finished: Finished, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path)
    (run.out / "grid.yaml").write_text(write_grid_file(tmp_path / "in", seeds=[5]).read_text())
    ask(run.out, Verb.CANCEL, "rate=0.1")
    with pytest.raises(GridError, match="The request stands"):
        settle(run.out, _quiet)
    assert len(Control(run.out).pending()) == 1


# A run that is alive.


def test_a_live_run_is_paused_cancelled_in_part_and_resumed(
    finished: Finished, tmp_path: Path
) -> None:
    run, out = finished.copy(tmp_path), tmp_path / "new"
    for planned in make_plan(run.grid).cells:
        Store(run.store).remove(planned.measure.key)
    out.mkdir()
    ask(out, Verb.PAUSE)  # before there is anybody to read it
    seen: dict[str, Any] = {}

    def operate() -> None:
        wait_for(lambda: (out / "progress.json").exists())
        wait_for(lambda: status_of(out)["state"] == "paused")
        cancel = ask(out, Verb.CANCEL, "defense=finetune")
        wait_for(lambda: Control(out).answer_to(cancel) is not None)
        time.sleep(0.7)
        seen["status"] = status_of(out)
        seen["started"] = list((out / "logs").iterdir())
        seen["cancel"] = Control(out).answer_to(cancel)
        # It waited for its victim's gate, which has been judged meanwhile.
        ask(out, Verb.REQUEUE, "defense=finetune rate=0.1")
        ask(out, Verb.RESUME)

    operator = threading.Thread(target=operate)
    operator.start()
    report = run_serial(run.grid, out, run.store)
    operator.join()
    assert seen["started"] == []
    assert (seen["status"]["paused"], seen["cancel"]) == (True, "2 cells cancelled")
    assert seen["status"]["cells"] == {"cancelled": 2, "missing": 2}
    assert (report.counts, report.code) == ({"ok": 3, "cancelled": 1}, 3)
    assert report.remaining == ["badnet/0/finetune/s0"]
    assert Control(out).pending() == []
    assert not Control(out).is_paused
    # What was cancelled and opened again in between has the numbers of a calm run.
    calm = numbers(finished.out)
    measured = {key: row for key, row in numbers(out).items() if key[2] != "cell"}
    assert {row["label"] for row in measured.values()} == set(statuses(out)) - set(report.remaining)
    for key, row in measured.items():
        assert row == calm[key]


def test_files_that_are_not_whole_or_not_ours_are_named_by_a_check(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A board warns of them; a check fails, since nobody knows what they held."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    run = finished.copy(tmp_path)
    where = ("--out", run.out, "--store", run.store)
    assert call(capsys, "check", run.file, *where).code == 0
    whole = next((run.out / "rows").glob("*.parquet")).read_bytes()
    (run.out / "rows" / "half.parquet").write_bytes(whole[: len(whole) // 2])
    pq.write_table(pa.table({"a": [1]}), run.out / "samples" / "foreign.parquet")
    done = call(capsys, "check", run.file, *where)
    assert done.code == 3
    assert "half.parquet: cannot be read (" in done.out
    assert "foreign.parquet: is no samples file of this tool" in done.out
    told = json.loads(call(capsys, "check", run.file, "--json", *where).out)
    assert (told["complete"], len(told["unreadable"])) == (True, 2)
    board = call(capsys, "leaderboard", run.out)
    assert board.code == 0
    assert "half.parquet: skipped, cannot be read" in " ".join(board.out.split())


def test_cancelling_keeps_the_stages_that_others_need(finished: Finished, tmp_path: Path) -> None:
    """A clean victim serves every attack; a poisoned one, the cells of its rate alone."""
    driver = Driver(finished.grid, tmp_path / "out", Store(tmp_path / "store"), say=_quiet)
    (tmp_path / "out").mkdir()
    driver._open_cells(driver._todo())
    executor = SerialExecutor(Execution(), str(tmp_path / "store"), Runtime(), "")
    victims = {c.cell.rate: c.victim for c in driver.plan.cells}
    for victim in victims.values():
        driver.running.add(victim.key)
        executor.submit(victim)
    ask(driver.out, Verb.CANCEL, "rate=0.1")
    Steering(driver).heed(executor)
    assert [stage.key for stage in executor.begun] == [victims["0"].key]
    assert driver.running == {victims["0"].key}
    assert victims["0"].key in driver.waits
    assert victims["0.1"].key not in driver.waits
    assert {c.cell.rate for c in driver.open.values()} == {"0"}
    answered = (driver.out / "control" / "answered.jsonl").read_text()
    assert json.loads(answered)["did"] == "2 cells cancelled; 1 stage stopped"


def test_a_pause_now_takes_back_what_runs(finished: Finished, tmp_path: Path) -> None:
    driver = Driver(finished.grid, tmp_path / "out", Store(tmp_path / "store"), say=_quiet)
    (tmp_path / "out").mkdir()
    driver._open_cells(driver._todo())
    executor = SerialExecutor(Execution(), str(tmp_path / "store"), Runtime(), "")
    first = {key for heap in driver.ready.values() for _, _, key in heap}
    driver.ready.clear()
    for key in first:
        driver.running.add(key)
        executor.submit(driver.plan.stages[key])
    ask(driver.out, Verb.PAUSE)
    Steering(driver).heed(executor)
    assert (driver.running, executor.running) == (first, len(first))
    ask(driver.out, Verb.PAUSE_NOW)
    Steering(driver).heed(executor)
    assert (driver.running, executor.running) == (set(), 0)
    assert {key for heap in driver.ready.values() for _, _, key in heap} == first
    said = [json.loads(line)["did"] for line in open_answers(driver.out)]
    paused = "paused: nothing new starts until `grid resume`"
    assert said == [
        f"{paused}; {len(first)} stages running come to an end",
        f"{paused}; {len(first)} stages stopped",
    ]
    assert not driver.attempts


def open_answers(out: Path) -> list[str]:
    return (out / "control" / "answered.jsonl").read_text().splitlines()


def test_a_stage_that_is_stopped_leaves_the_others(tmp_path: Path) -> None:
    executor = SerialExecutor(Execution(), str(tmp_path / "store"), Runtime(), "")
    stages = [Note(name, str(tmp_path), needs_ray=False) for name in ("a", "b")]
    for stage in stages:
        executor.submit(stage)
    executor.stop({stages[0].key})
    assert [outcome.key for outcome in executor.poll(0)] == [stages[1].key]
    assert not (tmp_path / "a.json").exists()


# A real driver, real workers, real kills.

LONG: dict[str, Any] = {
    "data": {"world": {**TINY["data"]["world"], "suspect": 256}},
    "recipes": {**TINY["recipes"], "repair": {**RECIPE, "epochs": 200}},
    "execution": {**TINY["execution"], "lanes": 2, "checkpoint_seconds": 2},
}


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_fits_that_are_paused_now_go_on_from_their_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_grid_file(tmp_path, **LONG)
    out, store = tmp_path / "out", tmp_path / "store"

    def fits() -> list[str]:
        """The defenses that train now and have left a checkpoint."""
        stages = [s for s in status_of(out)["running"] if s["kind"] == "defended"]
        logs = [out / "logs" / f"{s['key']}.log" for s in stages if s["has_begun"]]
        saved = list(store.glob("partial/*/fit.safetensors"))
        return [log.name for log in logs if log.exists()] if len(saved) == 2 else []

    with command(tmp_path / "run.txt", "run", file, "--out", out, "--store", store) as run:
        wait_for(lambda: (out / "progress.json").exists(), 300)
        wait_for(lambda: len(fits()) == 2, 300)
        logs = fits()
        paused = call(capsys, "pause", out, "--now")
        assert paused.out.endswith("until `grid resume`; 2 stages stopped\n")
        wait_for(lambda: status_of(out)["running"] == [])
        assert status_of(out)["state"] == "paused"
        call(capsys, "resume", out)
        assert run.wait(300) == 0, run.said
        run.leaves_nothing()
    for log in logs:
        assert (out / "logs" / log).read_text().count(" epoch 1/") == 1
    calm = tmp_path / "calm"
    run_serial(tiny_grid(calm, **LONG), calm / "out", calm / "store")
    assert numbers(out) == numbers(calm / "out")


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_a_real_driver_is_operated_from_outside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another process pauses it, stops a long fit of it, kills it, and opens the cells again."""
    file = write_grid_file(tmp_path, **LONG)
    out, store = tmp_path / "out", tmp_path / "store"
    words = ("run", file, "--out", out, "--store", store)

    def running(kind: str) -> list[str]:
        stages = status_of(out)["running"]
        return [stage["key"] for stage in stages if stage["kind"] == kind and stage["has_begun"]]

    with command(tmp_path / "first.txt", *words) as first:
        wait_for(lambda: (out / "progress.json").exists(), 300)
        wait_for(lambda: len(running("defended")) == 2, 300)
        shown = call(capsys, "status", out)
        assert "running: defended" in shown.out
        paused = call(capsys, "pause", out)
        assert "nothing new starts until `grid resume`; 2 stages running" in paused.out
        # One of the two long fits is stopped, the other one comes to its end.
        stopped = call(capsys, "cancel", out, "--only", "defense=finetune rate=0.1")
        assert stopped.out == "1 cell cancelled; 1 stage stopped\n"
        wait_for(lambda: len(running("defended")) < 2)
        assert status_of(out)["state"] == "paused"
        assert status_of(out)["cells"]["cancelled"] == 1
        # A request is left while nobody looks, and the driver dies.
        first.send(signal.SIGSTOP)
        left = call(capsys, "requeue", out, "--only", "defense=finetune", "--wait", "0.1")
        assert "asked" in left.out
        first.send(signal.SIGKILL)
        first.wait()
        first.leaves_nothing(but="Agent")
    assert status_of(out)["state"] == "died"
    assert len(status_of(out)["requests"]) == 1

    with command(tmp_path / "second.txt", *words) as second:
        # It is still paused, as was asked for, and has taken up the request first of all.
        wait_for(lambda: "paused: nothing starts until" in second.said, 300)
        assert status_of(out)["cells"]["requeued"] == 1
        assert "resumed" in call(capsys, "resume", out).out
        assert second.wait(300) == 0, second.said
        second.leaves_nothing()
    assert set(statuses(out).values()) == {"ok"}
    calm = tmp_path / "calm"
    run_serial(tiny_grid(calm, **LONG), calm / "out", calm / "store")
    assert numbers(out) == numbers(calm / "out")
