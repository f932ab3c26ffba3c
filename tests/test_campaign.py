"""A campaign from its file to the held-out board, by the command, on a real Ray: seconds of it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import yaml

from grid.cache import reasons
from grid.collect import collect
from grid.gridfile import load_grid
from grid.operations import status
from grid.registry import Source
from grid.run import run_grid
from grid.tuning.campaign import run_campaign
from grid.tuning.file import decode_campaign
from grid.tuning.report import CampaignReport
from grid.tuning.scenes import Scenes
from grid.tuning.spec import Sees
from grid.tuning.trial import numbers_of
from grid.work import Ended, execute
from tests.campaigns import FILE, GRID, campaign, campaign_text, write_campaign_file
from tests.grids import environment, grid_command
from tests.processes import wait_for
from victims.keys import content_key
from victims.recipe import Runtime
from victims.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Each search starts its processes anew, which takes seconds: these are the fewest that show all.
CHANGES: dict[str, Any] = {
    "objectives": {
        "tuned": {"minimise": "worst_asr"},
        "oracle": {"sees": "held_out", "minimise": "worst_asr"},
    },
    "curves": True,
}
LARGER: dict[str, Any] = {
    "defenses": [*FILE["defenses"], {"cleanclip": {"space": {"inmodal_weight": [0.5, 1.0, 2.0]}}}],
    "objectives": {
        **CHANGES["objectives"],
        "clean-only": {"sees": "clean", "maximise": "change"},
    },
}


class Ran(NamedTuple):
    """A folder with a campaign's file, its results and its store."""

    folder: Path
    said: str

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def store(self) -> Store:
        return Store(str(self.folder / "store"))

    def told(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / "campaign.json").read_text())
        return found


def command(folder: Path) -> list[str]:
    where = ("--out", folder / "out", "--store", folder / "store")
    return grid_command("tune", folder / "mini.yaml", *where)


def tune(folder: Path) -> Ran:
    done = subprocess.run(command(folder), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Ran(folder, done.stderr)


def trials(out: Path, kind: str = "trials") -> list[dict[str, Any]]:
    """The records of a results directory, oldest first."""
    files = sorted((out / kind).glob("*.parquet"))
    records = [record for file in files for record in pq.read_table(file).to_pylist()]
    return sorted(records, key=lambda record: record["written_at"])


def ended(out: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The record of every trial's end, by its search and number."""
    found = [record for record in trials(out) if record["record"] == "trial"]
    return {(r["defense"], r["objective"], r["number"]): r for r in found}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("campaign")
    write_campaign_file(folder, **CHANGES)
    return tune(folder)


def test_every_search_has_its_defaults_and_its_budget(ran: Ran) -> None:
    found = ended(ran.out)
    searches = Counter((defense, objective) for defense, objective, _ in found)
    assert searches == {("finetune", "tuned"): 4, ("finetune", "oracle"): 4}
    for (_, _, number), record in found.items():
        assert record["is_default"] == (number == 0)
        assert record["status"] == "ok"
    told = ran.told()
    assert {one["trials"] for one in told["searches"]} == {3}, "equal budgets"
    assert told["budget"]["trials"] == 3
    assert [one["oracle"] for one in told["searches"]] == [False, True]
    settings = [r["settings"] for (d, o, n), r in found.items() if (d, o) == ("finetune", "tuned")]
    assert len(set(settings)) == 4
    same = {n: r["settings"] for (d, o, n), r in found.items() if (d, o) == ("finetune", "oracle")}
    for (_, _, number), record in found.items():
        assert record["settings"] == same[number], "objectives are searched with the same settings"


def test_a_trial_is_what_its_settings_give_elsewhere(ran: Ran, tmp_path: Path) -> None:
    """The same settings, one stage after another in this process and in another store."""
    record = ended(ran.out)["finetune", "tuned", 2]
    scenes = Scenes(campaign(**CHANGES))
    searched = scenes.campaign.defenses[0]
    entry = scenes.entry(searched, json.loads(record["settings"]))
    store, cells = Store(str(tmp_path / "store")), {}
    for place, square in enumerate(scenes.of(Sees.ATTACKS).squares(entry)):
        from grid.tuning.scenes import inputs

        for stage in (inputs(square.measure) | inputs(square.victim)).values():
            assert execute(stage, store.uri, Runtime(), "").ended is Ended.OK
        cells[place] = numbers_of(store, square)[1]
    own = [r for r in trials(ran.out) if r["trial"] == record["trial"] and r["record"] == "cell"]
    mine = {r["cell"]: r for r in own if r["objective"] == "tuned"}
    assert sorted(mine) == sorted(cells) == [0, 1]
    for place, columns in cells.items():
        assert {name: mine[place][name] for name in columns} == columns
    assert record["worst_asr"] == max(r["asr_top1"] for r in mine.values())


def test_curves_end_where_the_trial_does(ran: Ran) -> None:
    """Looking at a model after every epoch changes nothing: its last look is its measurement."""
    records = [r for r in trials(ran.out) if r["objective"] == "tuned"]
    looks = {(r["trial"], r["cell"], r["epoch"]): r for r in records if r["record"] == "epoch"}
    cells = {(r["trial"], r["cell"]): r for r in records if r["record"] == "cell"}
    assert looks
    for trial, cell in {(trial, cell) for trial, cell, _ in looks}:
        epochs = [e for t, c, e in looks if (t, c) == (trial, cell)]
        assert sorted(epochs) == list(range(1, len(epochs) + 1))
        last = looks[trial, cell, max(epochs)]
        for name in ("clean_top1", "asr_top1", "change"):
            assert last[name] == cells[trial, cell][name]


def test_nothing_of_what_is_reported_is_even_made(ran: Ran) -> None:
    metas = [ran.store.need(key).meta for key in ran.store.keys("corpus")]
    # Poisoned data have the name of a corpus and say nothing of themselves.
    splits = {str(meta["split"]) for meta in metas if meta}
    assert splits == {"public", "suspect", "clean", "tuning"}


def test_victims_are_trained_once_and_attempts_are_on_record(ran: Ran) -> None:
    attempts = Counter(r["key"] for r in trials(ran.out, "attempts") if r["outcome"] == "ok")
    assert max(attempts.values()) == 1
    kinds = Counter(r["kind"] for r in trials(ran.out, "stages"))
    # (default + 3) x (2 + 1 cells), and the undefended victims of the gates.
    assert kinds["defended"] >= 12
    measured = {r["measure_key"] for r in trials(ran.out) if r["record"] == "cell"}
    assert measured <= set(attempts)


def test_what_trials_rest_on_is_no_garbage(ran: Ran) -> None:
    """Nothing that a campaign made is collected; before its end, nothing that is younger."""
    everything = set(ran.store.keys("model"))
    assert everything
    orphan = content_key("tensor", "orphan")
    ran.store.get_or_make(orphan, lambda scratch: {})
    found = collect(ran.store, [ran.out])
    assert {item["key"] for item in found["garbage"]} == {orphan}
    chosen = ended(ran.out)["finetune", "tuned", 1]
    (cell, *_) = [r for r in trials(ran.out) if r["trial"] == chosen["trial"] and r["measure_key"]]
    (user,) = reasons(ran.store, cell["defended_key"], [ran.out])["needed_by"]
    assert f"tuned #1 {cell['attack']}" in " ".join(user["cells"])
    said = ran.out / "progress.json"
    before = said.read_text()
    said.write_text(json.dumps({**json.loads(before), "state": "running"}))
    try:
        assert collect(ran.store, [ran.out])["garbage"] == []
    finally:
        said.write_text(before)
        ran.store.remove(orphan)


def test_status_tells_of_every_search(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    status(str(ran.out))
    first, *searches = capsys.readouterr().out.splitlines()
    assert first.startswith("mini (campaign): ended")
    assert [line.split(" of 3 trials")[0] for line in searches] == [
        "finetune, tuned: 3",
        "finetune, oracle: 3",
    ]
    status(str(ran.out), as_json=True)
    told = json.loads(capsys.readouterr().out)
    chosen = ran.told()["searches"][0]
    best = ended(ran.out)["finetune", "tuned", told["searches"][0]["best"]["number"]]
    assert best["trial"] == chosen["chosen"]


@pytest.mark.exhaustive
def test_the_same_command_replays(ran: Ran, tmp_path: Path) -> None:
    """It adds no record and chooses the same; a larger budget begins with the same settings."""
    folder = tmp_path / "again"
    shutil.copytree(ran.folder, folder)
    before = ended(ran.out)
    again = tune(folder)
    assert len(trials(again.out)) == len(trials(ran.out))
    for one, other in zip(again.told()["searches"], ran.told()["searches"], strict=True):
        timed = ("wall_seconds", "replayed")
        assert one["replayed"] == 3
        assert {n: v for n, v in one.items() if n not in timed} == {
            n: v for n, v in other.items() if n not in timed
        }
    only = {"objectives": {"tuned": CHANGES["objectives"]["tuned"]}, "budget": {"trials": 4}}
    write_campaign_file(folder, **{**CHANGES, **only})
    longer = ended(tune(folder).out)
    assert longer["finetune", "tuned", 4]["status"] == "ok"
    for key, record in before.items():
        assert longer[key] == record


def test_what_was_chosen_is_tried_on_what_was_held_out(ran: Ran, tmp_path: Path) -> None:
    grid = load_grid(str(ran.out / "held-out.yaml"))
    labels = {entry.label for entry in grid.defenses}
    assert labels == {"none", "finetune", "finetune@mini", "finetune@mini-oracle"}
    store = str(tmp_path / "store")
    shutil.copytree(ran.folder / "store", store)
    report = run_grid(grid, tmp_path / "out", store, executor="serial", say=lambda line: None)
    assert report.counts == {"ok": 2 * len(labels)}
    cells = [r for r in trials(tmp_path / "out", "rows") if r["metric"] == "cell"]
    for row in cells:
        tuned = json.loads(row["tuned"]) if row["tuned"] else None
        assert (tuned is not None) == ("@" in row["defense"])
        if tuned is not None:
            assert tuned["trials"] == 3
            assert tuned["device_seconds"] > 0
            assert tuned["oracle"] == tuned["seen"] == row["defense"].endswith("-oracle")
    from analysis.board import load_board
    from analysis.render import render

    text = render(load_board(tmp_path / "out"), "table", 160)
    assert "oracle seen" in text
    assert "trials of the search that chose the settings" in " ".join(text.split())


# --- early stops, in this process, where the cluster can be asked


class Watched(NamedTuple):
    report: CampaignReport
    groups: dict[str, Any]
    free: dict[str, float]
    total: dict[str, float]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Run a campaign on a cluster of our own, and look at it before it goes."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    import ray as untyped

    from grid.cluster.executor import RayExecutor

    ray: Any = untyped

    seen: list[Any] = []
    close = RayExecutor.close

    def look(self: RayExecutor) -> None:
        def is_free() -> bool:
            now, has = ray.available_resources(), ray.cluster_resources()
            return bool(now.get("CPU") == has["CPU"])

        wait_for(is_free, 30)
        seen.append((ray.util.placement_group_table(), ray.available_resources()))
        close(self)

    monkeypatch.setattr(RayExecutor, "close", look)

    def run(folder: Path, **changes: Any) -> Watched:
        found = decode_campaign(Source("mini", "mini.yaml", campaign_text(**changes)))
        report = run_campaign(found, folder / "out", str(folder / "store"), say=lambda line: None)
        groups, free = seen[-1]
        return Watched(report, groups, free, {})

    yield run
    ray.shutdown()


# Each learns less in an epoch than the one before it.
FADING = [3e-3, 2e-3, 1e-4, 1e-5, 1e-6, 1e-7]
DIVERGING = [{"finetune": {"space": {"recipe.lr": [1e-4, 2e-4, 3e-4, 50.0, 60.0, 70.0]}}}]


@pytest.mark.exhaustive
def test_bad_trials_are_ended_early_and_leave_nothing_behind(
    in_process: Any, tmp_path: Path
) -> None:
    """A rate of 50 breaks the model in its first epoch: clean accuracy is what is asked for."""
    found = in_process(
        tmp_path,
        defenses=[{"finetune": {**DIVERGING[0]["finetune"], "recipe": {"epochs": 6}}}],
        objectives={"tuned": {"maximise": "ca"}},
        search={"by": "grid"},
        stop={"by": "asha", "grace": 1, "reduction": 2},
        budget={"trials": 6},
    )
    (search,) = found.report.searches
    assert search.trials == 6
    assert search.stopped + search.failed >= 1
    records = ended(tmp_path / "out")
    cut = [r for r in records.values() if r["status"] == "stopped"]
    for record in cut:
        assert record["reason"].startswith("behind others at epoch")
        looks = [r for r in trials(tmp_path / "out") if r["trial"] == record["trial"]]
        assert {r["record"] for r in looks} == {"epoch", "trial"}, "its first cell did not end"
    chosen = records[
        "finetune",
        "tuned",
        next(r["number"] for r in records.values() if r["trial"] == search.chosen),
    ]
    assert json.loads(chosen["settings"])["recipe.lr"] < 1
    assert {group["state"] for group in found.groups.values()} <= {"REMOVED"}


@pytest.mark.exhaustive
def test_trials_that_are_ended_in_a_long_epoch_cost_no_other_its_turn(
    in_process: Any, tmp_path: Path
) -> None:
    """An actor is used again only after the epoch that its last trial was in; Tune gives up
    waiting after 2 seconds unless told otherwise, and so lost the trial that was next."""
    world = {**GRID["data"]["world"], "clean": 8192}
    found = in_process(
        tmp_path,
        grid={**GRID, "data": {"world": world}},
        tuning={"attacks": ["badnet"]},
        defenses=[{"finetune": {"space": {"recipe.lr": FADING}, "recipe": {"epochs": 3}}}],
        objectives={"tuned": {"maximise": "ca"}},
        search={"by": "grid"},
        stop={"by": "asha", "grace": 1, "reduction": 2},
        budget={"trials": 6},
    )
    (search,) = found.report.searches
    assert (search.trials, search.lost) == (6, 0)
    assert search.stopped
    assert found.report.short == []
    statuses = Counter(r["status"] for r in ended(tmp_path / "out").values())
    assert statuses["ok"] + statuses["stopped"] + statuses["failed"] == 7


@pytest.mark.exhaustive
def test_settings_that_fail_are_trials_that_failed(in_process: Any, tmp_path: Path) -> None:
    found = in_process(
        tmp_path,
        defenses=[{"finetune": {"space": {"recipe.lr": [1e-3, 1e12]}}}],
        search={"by": "grid"},
        budget={"trials": 2},
    )
    (search,) = found.report.searches
    assert (search.trials, search.failed) == (2, 1)
    assert search.settings in ({}, {"recipe.lr": 1e-3}), "what failed is no candidate"
    (failed,) = [r for r in ended(tmp_path / "out").values() if r["status"] == "failed"]
    assert "not finite" in failed["reason"]


@pytest.mark.exhaustive
def test_device_hours_end_a_search(in_process: Any, tmp_path: Path) -> None:
    """The first cells use up a budget of nothing: the trials that were in flight are let go."""
    found = in_process(tmp_path, budget={"device_hours": 1e-9}, held_out={"attacks": ["sig"]})
    (search,) = found.report.searches
    assert 1 <= search.stopped == search.trials <= 4
    assert search.device_seconds > 0
    assert search.chosen is None
    reasons = {r["reason"] for r in ended(tmp_path / "out").values() if not r["is_default"]}
    assert reasons == {"the budget is used up"}


@pytest.mark.exhaustive
def test_every_defense_and_objective_is_searched(tmp_path: Path) -> None:
    write_campaign_file(tmp_path, **{**CHANGES, **LARGER})
    found = ended(tune(tmp_path).out)
    assert Counter((d, o) for d, o, _ in found) == {
        (d, o): 4 for d in ("finetune", "cleanclip") for o in LARGER["objectives"]
    }
    for (d, o, n), record in found.items():
        if o == "clean-only":
            other = found[d, "tuned", n]
            assert (record["trial"], record["ca"]) == (other["trial"], other["ca"])
            assert n == 0 or record["score"] == pytest.approx(1 - record["change"])


@pytest.mark.exhaustive
def test_what_is_known_counts_though_the_time_is_up(in_process: Any, tmp_path: Path) -> None:
    """The same command once rewrote what was chosen from the few trials that it still replayed."""
    one = {
        "budget": {"wall_minutes": 0.25},
        "held_out": {"attacks": ["sig"]},
        "tuning": {"attacks": ["badnet"]},
    }
    (first,) = in_process(tmp_path, **one).report.searches
    assert first.trials >= 2
    (again,) = in_process(tmp_path, **one).report.searches
    # The one that was under way when the time was up is no trial to go on from.
    assert again.trials >= first.trials - first.stopped > 0
    assert again.device_seconds > first.device_seconds / 2
    before = {r["trial"] for r in ended(tmp_path / "out").values()}
    assert again.chosen in before


# --- a driver that dies


@pytest.mark.exhaustive
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_driver_s_campaign_goes_on(sent: int, ran: Ran, tmp_path: Path) -> None:
    one = {"objectives": {"tuned": CHANGES["objectives"]["tuned"]}}
    write_campaign_file(tmp_path, **{**CHANGES, **one})
    process = subprocess.Popen(
        command(tmp_path),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(lambda: process.poll() is not None or _num_trials(tmp_path / "out") >= 2)
        assert process.poll() is None, "it ended before it could be stopped"
    finally:
        process.send_signal(sent)
        code = process.wait(timeout=60)
    assert code == (130 if sent == signal.SIGINT else -sent)
    assert not (tmp_path / "out" / "held-out.yaml").exists()
    again = tune(tmp_path)
    assert sum(one["replayed"] for one in again.told()["searches"]) >= 2
    found, undisturbed = ended(again.out), ended(ran.out)
    assert found.keys() == {key for key in undisturbed if key[1] == "tuned"}
    for key, record in found.items():
        for name in ("trial", "settings", "ca", "worst_asr", "mean_asr", "score", "status"):
            assert record[name] == undisturbed[key][name]
    (mine,), theirs = again.told()["searches"], ran.told()["searches"][0]
    assert (mine["chosen"], mine["settings"]) == (theirs["chosen"], theirs["settings"])


def _num_trials(out: Path) -> int:
    try:
        return sum(r["record"] == "trial" and not r["is_default"] for r in trials(out))
    except OSError:  # a file that is just being renamed
        return 0


# --- searchers that learn


@pytest.mark.exhaustive
@pytest.mark.parametrize("by", ["tpe", "nsga2"])
def test_searchers_that_learn_go_on_from_what_is_known(by: str, tmp_path: Path) -> None:
    one = {"objectives": {"tuned": {"minimise": "worst_asr"}}, "search": {"by": by}}
    write_campaign_file(tmp_path, **one, budget={"trials": 4})
    first = ended(tune(tmp_path).out)
    write_campaign_file(tmp_path, **one, budget={"trials": 7})
    again = tune(tmp_path)
    longer = ended(again.out)
    old = {r["settings"] for r in first.values()}
    assert old <= {r["settings"] for r in longer.values()}
    assert again.told()["searches"][0]["trials"] == 7
    assert again.told()["searches"][0]["replayed"] >= 4
    assert yaml.safe_load((again.out / "held-out.yaml").read_text())["seeds"] == [1]
