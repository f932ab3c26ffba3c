"""`grid cache`: what a store holds, who needs it, and that only what nobody needs is collected."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest

from grid.cache import contents, inventory, pin_key, pins, reasons, unpin
from grid.collect import DAY, collect
from grid.control import Control, Verb
from grid.places import folders_with_needs, run_folders
from grid.planning import make_plan
from grid.steering import settle
from tests.finished import Finished
from tests.grids import call, numbers, run_serial
from victims.blobs import RemoteBlobs
from victims.errors import GridError, UsageError
from victims.keys import content_key
from victims.store import Store


@pytest.fixture
def run(finished: Finished, tmp_path: Path) -> Finished:
    """A copy of a finished run, to be spoiled."""
    return finished.copy(tmp_path)


def whole(store: Path) -> set[str]:
    return {key for key, held in inventory(Store(store)).items() if held.is_whole}


def add(store: Path, name: str, size: int = 1000, days: float = 0.0) -> str:
    """An artefact that no plan knows, last used so many days ago."""
    key = content_key("tensor", name)

    def make(scratch: Path) -> dict[str, Any]:
        (scratch / "values.bin").write_bytes(bytes(size))
        return {}

    artefact = Store(store).get_or_make(key, make)
    then = time.time() - days * DAY
    os.utime(artefact.path("values.bin"), (then, then))
    os.utime(store / "manifests" / "tensor" / f"{key}.json", (then, then))
    return key


def garbage(found: dict[str, Any]) -> set[str]:
    return {item["key"] for item in found["garbage"]}


# What there is.


def test_the_store_is_listed_by_kind(run: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    add(run.store, "old", days=3)
    found = contents(Store(run.store))
    for kind, entry in found["kinds"].items():
        assert entry["number"] == len(list((run.store / "manifests" / kind).iterdir()))
    on_disk = sum(p.stat().st_size for p in (run.store / "data").rglob("*") if p.is_file())
    assert found["bytes"] == on_disk
    # Reading manifests, as this does, is no use of what they describe.
    assert found["kinds"]["tensor"]["newest_use"] == pytest.approx(time.time() - 3 * DAY, abs=60)
    assert "used 3.0 days ago" in call(capsys, "cache", "ls", "--store", run.store).out
    missing = call(capsys, "cache", "ls", "--store", run.store / "nowhere")
    assert (missing.code, "no store is there" in missing.err) == (2, True)
    assert not (run.store / "nowhere").exists()


def test_why_names_the_cells_that_need_an_artefact(run: Finished) -> None:
    store, plan = Store(run.store), make_plan(run.grid)
    cell = next(c for c in plan.cells if c.cell.label == "badnet/0.1/finetune/s0")
    (user,) = reasons(store, cell.measure.defended.key, [run.out])["needed_by"]
    assert user["cells"] == [cell.cell.label]
    # Gates need the victims of their rate, and cells their gates.
    (user,) = reasons(store, cell.victim.key, [run.out])["needed_by"]
    assert set(user["cells"]) == {"badnet/0.1/none/s0", "badnet/0.1/finetune/s0"}
    # A defense's model is no stage: its artefact points at it.
    model = store.need(cell.measure.defended.key).meta["model_key"]
    assert reasons(store, model[:12], [run.out])["needed_by"][0]["cells"] == [cell.cell.label]
    truth = next(key for key in whole(run.store) if key.startswith("truth-"))
    assert reasons(store, truth, [run.out])["needed_by"][0]["num_cells"] == 2
    with pytest.raises(UsageError, match="is the beginning of 5 keys"):
        reasons(store, "model-", [run.out])
    with pytest.raises(UsageError, match=f"Did you mean '{model}'"):
        reasons(store, model[:-1] + "x", [run.out])


# What is collected.


def test_gc_is_a_rehearsal_until_told_to_delete(
    run: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, orphan = whole(run.store), add(run.store, "orphan")
    words = ("cache", "gc", "--store", run.store, "--out", run.out)
    rehearsal = call(capsys, *words)
    assert "nothing was deleted: this was a rehearsal" in rehearsal.out
    assert whole(run.store) == kept | {orphan}
    done = json.loads(call(capsys, *words, "--delete", "--json").out)
    assert (garbage(done), done["bytes"]) == ({orphan}, 1000)
    assert whole(run.store) == kept
    assert not (run.store / "data" / orphan).exists()
    # Every finished cell still has its whole chain.
    again = run_serial(run.grid, run.out.parent / "again", run.store)
    assert (again.stages_run, again.code) == (0, 0)


def test_what_is_collected_is_made_again(run: Finished) -> None:
    """A run that nobody told of loses artefacts, and no number."""
    found = collect(Store(run.store), [], delete=True)
    assert whole(run.store) == set()
    assert found["bytes_after"] == 0
    again = run_serial(run.grid, run.out.parent / "again", run.store)
    assert again.code == 0
    assert numbers(run.out.parent / "again") == numbers(run.out)


def test_a_run_whose_needs_cannot_be_read_stops_the_collection(run: Finished) -> None:
    (run.out / "chains.json").write_text('{"cells": []}')
    with pytest.raises(GridError, match="not a list of stages"):
        collect(Store(run.store), [run.out], delete=True)
    (run.out / "chains.json").unlink()
    with pytest.raises(GridError, match="on these results writes it"):
        collect(Store(run.store), [run.out], delete=True)


def test_an_unfinished_run_keeps_its_plan_and_parts_of_its_defenses(run: Finished) -> None:
    """A fit within a defense is in no plan, and a killed run resumes from it."""
    (run.out / "first_cells.json").touch()
    for file in (run.out / "rows").iterdir():
        file.unlink()
    within, before = add(run.store, "within"), add(run.store, "before", days=2)
    kept = whole(run.store) - {before}
    found = collect(Store(run.store), [run.out], delete=True)
    assert garbage(found) == {before}
    assert found["kept"]["perhaps part of a defense that a run has not made yet"] == 1
    assert whole(run.store) == kept
    assert within in kept


def test_cancelled_cells_need_nothing(run: Finished) -> None:
    for file in (run.out / "rows").iterdir():
        file.unlink()
    past = time.time() + DAY
    os.utime(run.out / "first_cells.json", (past, past))
    Control(run.out).ask(Verb.CANCEL, "rate=0.1")
    settle(run.out, lambda line: None)
    cells = make_plan(run.grid).cells
    poisoned = {c.victim.key for c in cells if c.cell.rate == "0.1"}
    clean = {c.victim.key for c in cells if c.cell.rate == "0"}
    found = garbage(collect(Store(run.store), [run.out]))
    assert poisoned <= found
    assert not clean & found


def test_what_is_being_made_and_what_is_pinned_stays(run: Finished) -> None:
    store = Store(run.store)
    making, pinned, free = (add(run.store, name) for name in ("making", "pinned", "free"))
    pin_key(store, pinned)
    with Store(run.store).claim(making):
        found = collect(store, [run.out], delete=True)
    assert garbage(found) == {free}
    assert (found["kept"]["being made now"], found["kept"]["pinned"]) == (1, 1)
    assert {making, pinned} <= whole(run.store)


def test_age_and_size_bound_what_is_collected(run: Finished) -> None:
    store, total = Store(run.store), contents(Store(run.store))["bytes"]
    oldest, old, new = (add(run.store, str(d), days=d) for d in (9.0, 5.0, 0.0))
    assert garbage(collect(store, [run.out], older_than=4)) == {oldest, old}
    # As much as it takes, least recently used first.
    assert garbage(collect(store, [run.out], max_bytes=total + 2000)) == {oldest}
    assert garbage(collect(store, [run.out], max_bytes=total + 1999)) == {oldest, old}
    none = collect(store, [run.out], max_bytes=0)
    assert garbage(none) == {oldest, old, new}
    assert none["above_max_bytes"] == total


def test_what_killed_processes_left_is_collected(run: Finished) -> None:
    """Attempts without a manifest, checkpoints of what is finished, and nothing that is whole."""
    kept, key = whole(run.store), next(iter(sorted(whole(run.store))))
    lost = content_key("model", "lost")
    for name in (f"data/{key}/{'a' * 12}", f"data/{lost}/{'b' * 12}", f"partial/{key}"):
        (run.store / name).mkdir(parents=True)
        (run.store / name / "file").write_bytes(bytes(10))
    needed = next(k for k in make_plan(run.grid).stages if k.startswith("model-"))
    Store(run.store).remove(needed)
    (run.store / "partial" / needed).mkdir()
    (run.store / "partial" / needed / "fit").write_bytes(bytes(10))
    found = collect(Store(run.store), [run.out], delete=True)
    assert sorted((i["key"], i["what"]) for i in found["garbage"]) == sorted(
        [(key, "attempt"), (key, "checkpoint"), (lost, "attempt")]
    )
    assert whole(run.store) == kept - {needed}
    assert Store(run.store).need(key).key == key
    # A fit that a run still has to make goes on from its checkpoint.
    assert (run.store / "partial" / needed / "fit").exists()


def test_a_kill_in_the_middle_leaves_nothing_half(
    run: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    orphan = add(run.store, "orphan")
    with monkeypatch.context() as patched:

        def killed(self: Store, name: str) -> None:
            raise KeyboardInterrupt

        patched.setattr(Store, "_delete_folder", killed)
        with pytest.raises(KeyboardInterrupt):
            collect(Store(run.store), [run.out], delete=True)
    # Its manifest went first: nobody takes what is left for an artefact.
    assert orphan not in Store(run.store)
    assert (run.store / "data" / orphan).exists()
    (item,) = collect(Store(run.store), [run.out], delete=True)["garbage"]
    assert (item["key"], item["what"]) == (orphan, "attempt")


def test_a_remote_store_is_collected_through_its_file_system(run: Finished, tmp_path: Path) -> None:
    orphan = add(run.store, "orphan")
    upload = content_key("tensor", "upload")
    (run.store / "data" / upload / "attempt").mkdir(parents=True)
    (run.store / "data" / upload / "attempt" / "file").write_bytes(bytes(10))
    local, store = Store(run.store), Store(run.store, cache=tmp_path / "cache")
    # As an object store would be: not the local file system.
    store.remote = RemoteBlobs(pafs.SubTreeFileSystem(str(run.store), pafs.LocalFileSystem()))
    store.root = ""
    assert contents(store)["kinds"].keys() == contents(local)["kinds"].keys()
    assert contents(store)["bytes"] == contents(local)["bytes"]
    # Without locks nobody knows whether an upload is under way: a young one is left alone.
    assert garbage(collect(store, [run.out], delete=True)) == {orphan}
    assert orphan not in whole(run.store)


# Pins.


def test_pins_are_set_shown_and_taken_back(
    run: Finished, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRID_HOME", str(run.out.parent / "home"))
    where = ("--store", run.store)
    everything = whole(run.store)
    pinned = call(capsys, "cache", "pin", "--grid", run.out, *where)
    assert pinned.out.startswith(f"pinned grid tiny: {len(everything)} artefacts")
    assert garbage(json.loads(call(capsys, "cache", "gc", "--json", *where).out)) == set()
    key = sorted(everything)[0]
    held = call(capsys, "cache", "unpin", key, *where)
    assert held.code == 2
    assert "It is kept by the pin of grid tiny" in held.err
    assert call(capsys, "cache", "unpin", "--grid", "tiny", *where).code == 0
    assert pins(Store(run.store)) == {}
    assert call(capsys, "cache", "pin", *where).code == 2
    defended = next(k for k in everything if k.startswith("defended-"))
    call(capsys, "cache", "pin", defended, *where)
    # A defense's artefact is worth nothing without the model that it points at.
    assert len(pins(Store(run.store))[defended]) == 2
    with pytest.raises(UsageError, match=f"Did you mean '{defended}'"):
        unpin(Store(run.store), defended[:-1], None)


def test_an_unreadable_pin_stops_the_collection(run: Finished) -> None:
    (run.store / "pins").mkdir()
    (run.store / "pins" / "x.json").write_text("{")
    with pytest.raises(UsageError, match="nothing tells what it keeps"):
        collect(Store(run.store), [run.out], delete=True)


def test_a_campaign_that_never_said_what_it_needs_stops_the_collection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its held-out grid is a run one folder below."""
    monkeypatch.setenv("GRID_HOME", str(tmp_path))
    held_out = tmp_path / "camp" / "held-out"
    held_out.mkdir(parents=True)
    (tmp_path / "camp" / "campaign.yaml").write_text("{}")
    (held_out / "grid.json").write_text("{}")
    Store(str(tmp_path / "store"))
    assert run_folders(tmp_path) == [held_out]
    assert folders_with_needs(tmp_path) == [tmp_path / "camp", held_out]
    answer = call(capsys, "cache", "gc")
    assert answer.code == 1
    assert f"{tmp_path / 'camp' / 'chains.json'}: cannot be read" in answer.err
