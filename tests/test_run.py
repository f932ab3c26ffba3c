"""The driver on the serial executor: rows for every cell, resume, extend, failures, damage."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch import Tensor

from analysis.board import load_board
from attacks.base import Attack, GateGroup, Track
from defenses.base import Case, Defended, Defense, Fidelity, Need, Phase
from grid.gridfile import load_grid
from grid.lock import only_driver
from grid.planning import make_plan
from grid.run import Driver, run_grid
from grid.run_report import RunReport
from grid.schema.arrow import VERSION_KEY
from grid.schema.columns import SCHEMA_VERSION
from grid.spec import Grid
from grid.stages import PoisonStage
from tests.grids import (
    OPEN_GATE,
    TINY,
    call,
    environment,
    grid_command,
    numbers,
    outcomes,
    records,
    run_serial,
    tiny_grid,
    write_grid_file,
)
from victims.batches import Batch
from victims.errors import GridError
from victims.lab import Lab
from victims.models import Clip
from victims.recipe import Clock
from victims.store import Store
from victims.training import Objective


@dataclass(frozen=True)
class Ran:
    """A finished run that tests may look at, copy, and never change."""

    grid: Grid
    out: Path
    store: Path
    report: RunReport


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("ran")
    grid = tiny_grid(folder)
    report = run_serial(grid, folder / "out", folder / "store")
    return Ran(grid, folder / "out", folder / "store", report)


def copy(ran: Ran, folder: Path) -> tuple[Path, Path]:
    """The same results and store, to be spoiled."""
    shutil.copytree(ran.out, folder / "out")
    shutil.copytree(ran.store, folder / "store")
    return folder / "out", folder / "store"


def manifest(store: Path, key: str) -> Path:
    return store / "manifests" / key.rsplit("-", 1)[0] / f"{key}.json"


def a_file_of(store: Path, key: str, name: str) -> Path:
    attempt: str = json.loads(manifest(store, key).read_text())["attempt"]
    return store / "data" / key / attempt / name


# A whole run.


def test_a_run_writes_rows_for_every_planned_cell(ran: Ran) -> None:
    assert ran.report.code == 0
    assert ran.report.counts == {"ok": 4}
    assert {o["status"] for o in outcomes(ran.out).values()} == {"ok"}
    planned = json.loads((ran.out / "grid.json").read_text())["cells"]
    assert {cell["cell"] for cell in planned} == {row["cell"] for row in records(ran.out, "rows")}
    for cell in planned:
        found = {m for c, s, m in numbers(ran.out) if c == cell["cell"] and s == "report"}
        assert {"clean_top1", "asr_top1", "asr_top10", "r_acc"} <= found
    samples = Counter((s["cell"], s["eval_set"]) for s in records(ran.out, "samples"))
    assert set(samples.values()) == {32}
    assert len(samples) == 4 * 2


def test_rows_trace_back_to_the_store_and_to_who_made_them(ran: Ran) -> None:
    store, stages = Store(ran.store), {s["key"]: s for s in records(ran.out, "stages")}
    for row in outcomes(ran.out).values():
        for name in ("victim_key", "data_key", "trigger_key", "defended_key", "measure_key"):
            assert row[name] in store
        assert stages[row["measure_key"]]["inputs"][0] == row["defended_key"]
        assert row["device"] == "cpu"
        assert row["victim_seconds"] > 0
        assert row["added_later"] is False
        assert (ran.out / "logs" / f"{row['measure_key']}.log").read_text().count("ok") == 1


def test_every_model_is_trained_once(ran: Ran) -> None:
    attempts = Counter(a["key"] for a in records(ran.out, "attempts"))
    assert set(attempts.values()) == {1}
    assert set(attempts) == set(make_plan(ran.grid).stages)
    assert not any(stage["reused"] for stage in records(ran.out, "stages"))
    # The reference, two victims, and a fine-tune of each.
    assert len(ran.report.trained) == 5
    assert set(ran.report.trained.values()) == {1}
    assert json.loads((ran.out / "run.json").read_text())["trained"] == ran.report.trained
    assert (ran.report.victims, ran.report.victims_trained) == (2, 2)
    assert ran.report.victims_told == "2 victims: 2 trained, each once"


def test_the_same_grid_again_runs_nothing(ran: Ran, tmp_path: Path) -> None:
    out, store = copy(ran, tmp_path)
    before = sorted(path.name for path in out.rglob("*.parquet"))
    report = run_serial(ran.grid, out, store)
    assert (report.stages_run, report.attempts, report.code) == (0, 0, 0)
    assert sorted(path.name for path in out.rglob("*.parquet")) == before


def test_another_results_directory_is_filled_from_the_store(ran: Ran, tmp_path: Path) -> None:
    report = run_serial(ran.grid, tmp_path / "other", ran.store)
    assert (report.stages_run, report.victims_trained) == (0, 0)
    assert report.victims_told == "2 victims: 2 found in the store"
    assert numbers(tmp_path / "other") == numbers(ran.out)
    assert all(row["reused"] for row in outcomes(tmp_path / "other").values())


def test_an_extended_grid_runs_the_difference(ran: Ran, tmp_path: Path) -> None:
    out, store = copy(ran, tmp_path)
    more = [{"finetune": {"as": "longer", "recipe": {"epochs": 2}}}]
    grid = tiny_grid(tmp_path / "in", defenses=[*TINY["defenses"], *more])
    report = run_serial(grid, out, store)
    ran_now = Counter(a["key"].split("-")[0] for a in records(out, "attempts"))
    ran_now -= Counter(a["key"].split("-")[0] for a in records(ran.out, "attempts"))
    assert ran_now == {"defended": 2, "measure": 2}
    assert report.counts == {"ok": 6}
    later = {name for name, row in outcomes(out).items() if row["added_later"]}
    assert later == {"badnet/0/longer/s0", "badnet/0.1/longer/s0"}
    old, new = numbers(ran.out), numbers(out)
    for name, row in old.items():
        assert new[name] == row


def test_cells_that_wait_for_the_gate_of_a_new_seed_say_so(
    ran: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was measured and judged before the seed joined was told to be "not run yet"."""
    out, store = copy(ran, tmp_path)
    file = write_grid_file(tmp_path / "in", seeds=[0, 7])
    places = ("--out", out, "--store", store)
    chosen = ("--only", "rate=0", "--executor", "serial")
    assert call(capsys, "run", file, *chosen, *places).code == 0
    why = "measured; waits for the gate, which judges all seeds together: the victim of seed 7 is"
    found = json.loads(call(capsys, "check", file, "--json", *places).out)
    told = {cell["label"]: cell["why"].startswith(why) for cell in found["incomplete"]}
    poisoned = "badnet/0.1"
    assert told == {
        f"{poisoned}/none/s0": True,
        f"{poisoned}/finetune/s0": True,
        f"{poisoned}/none/s7": False,
        f"{poisoned}/finetune/s7": False,
    }
    board = " ".join(call(capsys, "leaderboard", out).out.split())
    assert f"none, finetune: missing: {why}" in board
    assert "none of 2 lines has an outcome yet" in board
    assert f"of the missing, 2 cells: {why}" in call(capsys, "status", out).out
    # No number of theirs is on the board, and once all victims are there all are judged.
    assert not [row for row in load_board(out).lines if row.rate and row.num_shown]
    assert run_serial(load_grid(str(file)), out, store).counts == {"ok": 8}
    assert call(capsys, "check", file, *places).code == 0


def test_the_first_grid_is_remembered_before_anything_runs(ran: Ran, tmp_path: Path) -> None:
    """A first run that was killed must not make an extension look original."""
    out = tmp_path / "out"
    with pytest.raises(RuntimeError):
        run_serial(ran.grid, out, ran.store, only=_Explodes())
    grid = tiny_grid(tmp_path / "in", defenses=[*TINY["defenses"], "clean_model"])
    run_serial(grid, out, ran.store)
    later = {name for name, row in outcomes(out).items() if row["added_later"]}
    assert later == {"badnet/0/clean_model/s0", "badnet/0.1/clean_model/s0"}


class _Explodes:
    """A filter that stops a run after its plan was announced."""

    conditions = ()
    asked = 0

    def matches(self, cell: Any) -> bool:
        self.asked += 1
        if self.asked > 1:
            raise RuntimeError
        return True


def test_only_takes_a_part_and_the_rest_stays_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_grid_file(tmp_path)
    places = ("--out", tmp_path / "out", "--store", tmp_path / "store")
    chosen = ("--only", "defense=none rate=0")
    done = call(capsys, "run", file, "--executor", "serial", *chosen, *places)
    assert done.code == 0, done.err
    assert list(outcomes(tmp_path / "out")) == ["badnet/0/none/s0"]
    # No poisoned victim was trained for a part without poison: the reference and a clean victim.
    assert len(json.loads((tmp_path / "out" / "run.json").read_text())["trained"]) == 2
    checked = call(capsys, "check", file, "--json", *places)
    assert checked.code == 3
    assert json.loads(checked.out)["counts"] == {"ok": 1, "missing": 3}


def test_the_second_command_imports_no_torch(
    ran: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, store = copy(ran, tmp_path)
    file = write_grid_file(tmp_path)
    places = (file, "--out", out, "--store", store)
    assert call(capsys, "run", *places).code == 0  # remembers the plan, and needs no Ray for it
    assert call(capsys, "plan", *places).code == 0  # remembers its summary
    probe = (
        "import sys; from grid.cli import main\n"
        "for words in ['run', 'check', 'plan', 'leaderboard']:\n"
        "    rest = sys.argv[1:] if words != 'leaderboard' else [sys.argv[3]]\n"
        "    try: main([words, *rest])\n"
        "    except SystemExit as ended: print('code', ended.code or 0)\n"
        "print('heavy', {'torch', 'ray', 'open_clip'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe, *map(str, places)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
    )
    assert done.stdout.count("code 0\n") == 4, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy set()"


# Methods that fail.


@dataclass(frozen=True, slots=True, kw_only=True)
class Brittle(Defense):
    """A defense that fails while the file ``broken`` exists."""

    name: ClassVar[str] = "brittle"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "none"
    phase: ClassVar[Phase] = Phase.FINETUNING
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VICTIM})
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    variants: ClassVar[dict[str, Any]] = {}

    broken: str = ""
    calls: str = ""
    error: str = "ValueError"

    def apply(self, lab: Lab, case: Case) -> Defended:
        with Path(self.calls).open("a") as file:
            file.write("x")
        if Path(self.broken).exists():
            kinds: dict[str, Callable[[str], BaseException]] = {
                "ValueError": ValueError,
                "OSError": OSError,
                "SystemExit": SystemExit,
            }
            raise kinds[self.error]("no tea left\nsecond line")
        return Defended(case.victim)


def with_defense(grid: Grid, method: Any, label: str = "brittle") -> Grid:
    """The grid with one more defense, which no table knows."""
    entry = replace(grid.defenses[0], label=label, method=method)
    return replace(grid, defenses=(*grid.defenses, entry))


@pytest.fixture
def brittle(tmp_path: Path) -> Brittle:
    (tmp_path / "broken").touch()
    return Brittle(broken=str(tmp_path / "broken"), calls=str(tmp_path / "calls"))


def test_a_defense_that_raises_is_a_row(ran: Ran, tmp_path: Path, brittle: Brittle) -> None:
    out, store = copy(ran, tmp_path)
    grid = with_defense(ran.grid, brittle)
    report = run_serial(grid, out, store)
    assert report.code == 3
    assert report.counts == {"ok": 4, "failed_method": 2}
    row = outcomes(out)["badnet/0.1/brittle/s0"]
    assert row["detail"] == "defended:brittle: ValueError: no tea left"
    assert row["attempts"] == 1  # of its defense; its measurement was never tried
    assert (tmp_path / "calls").read_text() == "xx"
    log = (out / "logs" / f"{row['defended_key']}.log").read_text()
    assert "second line" in log
    assert "in apply" in log
    # Not tried again by a run, tried again by a retry, and by a retry only that.
    assert run_serial(grid, out, store).attempts == 0
    (tmp_path / "broken").unlink()
    assert run_serial(grid, out, store).attempts == 0
    again = run_serial(grid, out, store, retry=True)
    assert again.counts == {"ok": 6}
    assert {a["key"].split("-")[0] for a in records(out, "attempts")[-4:]} == {
        "defended",
        "measure",
    }
    assert again.attempts == 4


def test_a_method_that_exits_is_a_failed_method(ran: Ran, tmp_path: Path, brittle: Brittle) -> None:
    """sys.exit in somebody's code once ended the whole run."""
    grid = with_defense(ran.grid, replace(brittle, error="SystemExit"))
    report = run_serial(grid, *copy(ran, tmp_path))
    assert report.counts == {"ok": 4, "failed_method": 2}


def test_the_machines_fault_is_tried_three_times(
    ran: Ran, tmp_path: Path, brittle: Brittle
) -> None:
    out, store = copy(ran, tmp_path)
    grid = with_defense(ran.grid, replace(brittle, error="OSError"))
    report = run_serial(grid, out, store)
    assert report.counts == {"ok": 4, "failed_infrastructure": 2}
    assert (tmp_path / "calls").read_text() == "x" * 6
    tried = [a for a in records(out, "attempts") if a["outcome"] == "failed_infrastructure"]
    assert sorted(a["attempt"] for a in tried) == [1, 1, 2, 2, 3, 3]
    # The same command tries again: no code has to be mended.
    (tmp_path / "broken").unlink()
    assert run_serial(grid, out, store).counts == {"ok": 6}


TEA = """
from dataclasses import dataclass
from defenses.base import Defended, Defense, Fidelity, Need, Phase

@dataclass(frozen=True, kw_only=True)
class Tea(Defense):
    name = "tea"; version = 1; paper = "none"; phase = Phase.FINETUNING
    needs = frozenset({Need.VICTIM}); fidelity = Fidelity.EXACT; variants = {}
    def apply(self, lab, case):
        raise RuntimeError("no tea left")
"""


def test_check_lists_failures_and_retry_mends_them(
    ran: Ran,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, store = copy(ran, tmp_path)
    info = tmp_path / "site" / "tea-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tea\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[backdoor_grid.defenses]\ntea = tea_plugin:Tea\n")
    module = tmp_path / "site" / "tea_plugin.py"
    module.write_text(TEA)
    monkeypatch.syspath_prepend(tmp_path / "site")
    file = write_grid_file(tmp_path / "in", defenses=[*TINY["defenses"], "tea"])
    words = (file, "--out", out, "--store", store)
    try:
        assert call(capsys, "run", "--executor", "serial", *words).code == 3
        again = call(capsys, "run", "--executor", "serial", *words)
        assert (again.code, "nothing to run" in again.err) == (3, True)
        checked = call(capsys, "check", *words)
        assert checked.code == 3
        assert "badnet/0.1/tea/s0: failed_method: defended:tea: RuntimeError: no" in checked.out
        assert "badnet/0.1/none" not in checked.out
        module.write_text(TEA.replace('raise RuntimeError("no tea left")', MENDED))
        del sys.modules["tea_plugin"]
        importlib.invalidate_caches()
        mended = call(capsys, "retry", "--executor", "serial", *words)
        assert mended.code == 0, mended.err
        assert call(capsys, "check", *words).code == 0
    finally:
        sys.modules.pop("tea_plugin", None)


# Another length than what it replaces: Python looks at a source's size and its second.
MENDED = "return Defended(model=case.victim)"


class Overflow(Objective):
    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        scale = model.scale
        return {"calm": scale * 0, "storm": scale / (scale - scale)}


@dataclass(frozen=True, slots=True, kw_only=True)
class OverflowSpec:
    name: ClassVar[str] = "overflow"
    version: ClassVar[int] = 1

    def build(self, model: Clip) -> Objective:
        return Overflow()


@dataclass(frozen=True, slots=True, kw_only=True)
class Diverges(Brittle):
    name: ClassVar[str] = "diverges"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VICTIM, Need.CLEAN_DATA})

    def apply(self, lab: Lab, case: Case) -> Defended:
        recipe = case.recipes.repair
        return Defended(lab.train(OverflowSpec(), case.clean_data, recipe, init=case.victim))


def test_a_loss_that_is_not_finite_names_its_term(ran: Ran, tmp_path: Path) -> None:
    out, store = copy(ran, tmp_path)
    grid = with_defense(ran.grid, Diverges(), "diverges")
    assert run_serial(grid, out, store).counts == {"ok": 4, "failed_method": 2}
    detail = outcomes(out)["badnet/0/diverges/s0"]["detail"]
    assert "the loss is not finite: storm at step 0; still finite: calm" in detail


def test_a_victim_that_fails_takes_its_cells_along_and_no_others(tmp_path: Path) -> None:
    bad = [
        {"badnet": {"patch": 6, "cell": 2, "levels": 2, "place": "corner"}},
        {"blended": {"alpha": 0.2, "cell": 2, "levels": 2}},
    ]
    grid = tiny_grid(tmp_path, attacks=bad)
    broken = _FailingStamp(grid.attacks[1].method)
    grid = replace(grid, attacks=(grid.attacks[0], replace(grid.attacks[1], method=broken)))
    report = run_serial(grid, tmp_path / "out", tmp_path / "store")
    found = {name: row["status"] for name, row in outcomes(tmp_path / "out").items()}
    assert {n for n, s in found.items() if s == "failed_method"} == {
        n for n in found if n.startswith("blended")
    }
    assert {s for n, s in found.items() if n.startswith("badnet")} == {"ok"}
    assert report.code == 3
    assert report.victims_told == "3 victims: 2 trained, each once, 1 not there"
    # Nothing is left to do, and the store still knows what there is.
    again = run_serial(grid, tmp_path / "out", tmp_path / "store")
    assert again.victims_told == "3 victims: 2 found in the store, 1 not there"


@dataclass(frozen=True)
class _FailingStamp(Attack):
    """An attack that cannot craft its trigger."""

    like: Attack

    name: ClassVar[str] = "blended"
    version: ClassVar[int] = 99
    paper: ClassVar[str] = "none"
    group: ClassVar[GateGroup] = GateGroup.STRONG
    tracks: ClassVar[frozenset[Track]] = frozenset({Track.MULTIMODAL})
    trigger: ClassVar[type[Any]] = object
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def craft(self, lab: Any, held: Any, size: int) -> Any:
        raise ArithmeticError("no trigger")


# Gates.


def test_an_invalid_victim_is_reported_and_its_defenses_skipped(
    ran: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, store = copy(ran, tmp_path)
    strict = {"strong": {"asr": 1.0, "lift": 1.0, "clean_loss": 0}}
    file = write_grid_file(tmp_path / "in", gate=strict)
    places = ("--out", out, "--store", store)
    done = call(capsys, "run", file, "--executor", "serial", *places)
    assert done.code == 4, done.err
    rows = outcomes(out)
    assert rows["badnet/0.1/none/s0"]["status"] == "invalid_victim"
    assert "ASR must be at least 100%" in rows["badnet/0.1/none/s0"]["detail"]
    assert rows["badnet/0.1/finetune/s0"]["status"] == "skipped"
    assert rows["badnet/0.1/finetune/s0"]["detail"].startswith("victim failed its gate")
    assert rows["badnet/0/finetune/s0"]["status"] == "ok"
    # The board is complete, its victim is not valid: the code says so each time.
    assert call(capsys, "run", file, "--executor", "serial", *places).code == 4
    assert call(capsys, "check", file, *places).code == 4


def test_a_plan_under_another_name_heeds_the_gates_in_the_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy of a finished grid counted the cells behind failed gates as to run."""
    strict = {"strong": {"asr": 1.0, "lift": 1.0, "clean_loss": 0}}
    grid = tiny_grid(tmp_path, gate=strict)
    run_serial(grid, tmp_path / "out", tmp_path / "store")
    copied = write_grid_file(tmp_path / "in", gate=strict, name="another")
    places = ("--out", tmp_path / "none", "--store", tmp_path / "store")
    found = json.loads(call(capsys, "plan", copied, "--json", *places).out)
    assert (found["stages_to_run"], found["barred"]) == (0, 1)
    said = call(capsys, "plan", copied, *places).out
    assert "1 cell to be skipped: the store holds victims that failed their gate" in said


def test_defended_cells_of_an_invalid_victim_are_never_computed(tmp_path: Path) -> None:
    strict = {"strong": {"asr": 1.0, "lift": 1.0, "clean_loss": 0}}
    grid = tiny_grid(tmp_path, gate=strict)
    run_serial(grid, tmp_path / "out", tmp_path / "store")
    skipped = next(
        c
        for c in make_plan(grid).cells
        if c.cell.rate == "0.1" and c.cell.defense.label == "finetune"
    )
    tried = {a["key"] for a in records(tmp_path / "out", "attempts")}
    assert skipped.measure.defended.key not in tried
    assert skipped.clean_victim.key in tried


def test_below_the_gate_rate_a_weak_victim_is_inert(ran: Ran, tmp_path: Path) -> None:
    gate = {"rate": 0.1, "strong": OPEN_GATE, "inert_lift": 1.0, "init_loss": 1}
    grid = tiny_grid(tmp_path, rates=[0, 0.05, 0.1], gate=gate)
    report = run_serial(grid, tmp_path / "out", tmp_path / "store")
    status = {name: row["status"] for name, row in outcomes(tmp_path / "out").items()}
    assert {n for n, s in status.items() if s == "inert"} == {
        "badnet/0.05/none/s0",
        "badnet/0.05/finetune/s0",
    }
    assert report.code == 0


def test_a_gate_is_judged_once_every_seed_is_in(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, seeds=[0, 1], defenses=["none", "finetune"])
    said: list[str] = []
    driver = Driver(grid, tmp_path / "out", Store(tmp_path / "store"), executor="serial")
    order: list[tuple[str, bool]] = []
    judge = driver._judge_if_ready

    def watched(group: Any) -> None:
        gate = driver.plan.gates[group]
        before = group in driver.verdicts
        judge(group)
        if not before and group in driver.verdicts:
            order.append(("judged", all(m.key in driver.done for m in gate.stages)))

    driver._judge_if_ready = watched  # type: ignore[method-assign]
    driver.say = said.append
    report = driver.run()
    assert order == [("judged", True)]
    assert report.counts == {"ok": 8}
    assert len(driver.plan.gates["badnet", "0.1", 0].victims) == 2


# Damage.


def test_foreign_and_truncated_result_files_are_passed_over(ran: Ran, tmp_path: Path) -> None:
    out, store = copy(ran, tmp_path)
    rows = sorted((out / "rows").glob("*.parquet"))
    rows[0].write_bytes(rows[0].read_bytes()[:-40])
    (out / "rows" / "notes.parquet").write_text("not a table")
    pq.write_table(pa.table({"cell": ["x"], "metric": [3]}), out / "rows" / "other.parquet")
    (out / "rows" / "folder.parquet").mkdir()
    report = run_serial(ran.grid, out, store)
    assert (report.code, report.stages_run) == (0, 0)
    assert {o["status"] for o in _readable(out)} == {"ok"}


def _readable(out: Path) -> Iterator[dict[str, Any]]:
    for path in (out / "rows").glob("2*.parquet"):
        try:
            rows = pq.ParquetFile(path).read().to_pylist()
        except pa.ArrowException:
            continue
        yield from (row for row in rows if row["metric"] == "cell")


def test_results_of_a_newer_version_are_refused(ran: Ran, tmp_path: Path) -> None:
    out, store = copy(ran, tmp_path)
    path = next((out / "rows").glob("*.parquet"))
    table = pq.read_table(path)
    marks = {**table.schema.metadata, VERSION_KEY.encode(): f"{SCHEMA_VERSION + 1}"}
    pq.write_table(table.replace_schema_metadata(marks), path)
    with pytest.raises(GridError, match="newer version of this tool"):
        run_serial(ran.grid, out, store)


def spoil(path: Path) -> None:
    """Change one byte."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


SPOILED = {
    "weights of a victim": ("victim", "weights.safetensors"),
    "weights of a reference": ("reference", "weights.safetensors"),
    "a trigger": ("trigger", "trigger.safetensors"),
    "a corpus": ("corpus", "images.npy"),
    "the edits": ("poisoned", "edits.arrow"),
}


# Everything is measured anew, and one more victim is trained on the same data.
WIDER: dict[str, Any] = {
    "evaluate": {"ks": [1, 2]},
    "defenses": [*TINY["defenses"], "random_filter", "clean_model"],
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_serial(tiny_grid(folder, **WIDER), folder / "out", folder / "store")
    return numbers(folder / "out")


EACH = [
    pytest.param(what, marks=() if "victim" in what or "edits" in what else pytest.mark.exhaustive)
    for what in SPOILED
]


@pytest.mark.parametrize("what", EACH)
def test_what_is_damaged_is_made_again_when_it_is_needed(
    ran: Ran, undisturbed: dict[Any, Any], tmp_path: Path, what: str
) -> None:
    """Also what a stage does not read from its parents: a measurement loads the victim's weights
    past the defended stage between them, which the driver once could not mend."""
    out, store = copy(ran, tmp_path)
    cell = next(
        c
        for c in make_plan(ran.grid).cells
        if c.cell.rate == "0.1" and c.cell.defense.label == "none"
    )
    victim = cell.measure.defended.victim
    assert isinstance(victim.data, PoisonStage)
    assert victim.init is not None
    keys = {
        "victim": victim.key,
        "reference": victim.init.key,
        "trigger": cell.measure.trigger.key,
        "corpus": victim.data.trigger.corpus.key,
        "poisoned": victim.data.key,
    }
    which, name = SPOILED[what]
    spoil(a_file_of(store, keys[which], name))
    grid = tiny_grid(tmp_path / "in", **WIDER)
    said: list[str] = []
    report = run_grid(grid, out, str(store), executor="serial", say=said.append)
    assert report.counts == {"ok": 8}, (said, outcomes(out))
    assert any(keys[which] in line and "made again" in line for line in said)
    found = numbers(out)
    assert {name: found[name] for name in undisturbed} == undisturbed


def test_a_damaged_truth_is_made_again(ran: Ran, tmp_path: Path) -> None:
    """The truth is no stage of its own: it comes with the poisoned data."""
    out, store = copy(ran, tmp_path)
    data = next(s for s in make_plan(ran.grid).stages.values() if isinstance(s, PoisonStage))
    spoil(a_file_of(store, data.truth_key, "roles.npy"))
    grid = tiny_grid(tmp_path / "in", defenses=[*TINY["defenses"], "random_filter"])
    assert run_serial(grid, out, store).counts == {"ok": 6}
    found = {r["metric"] for r in records(out, "rows") if r["eval_set"] == "suspect"}
    assert found


@pytest.mark.parametrize("which", ["measure", "defended", "victim"])
def test_a_new_board_from_a_damaged_store(ran: Ran, tmp_path: Path, which: str) -> None:
    """Nothing runs here unless reading the finished cells finds the damage."""
    _, store = copy(ran, tmp_path)
    cell = make_plan(ran.grid).cells[-1]
    key, name = {
        "measure": (cell.measure.key, "metrics.json"),
        "defended": (cell.measure.defended.key, ""),
        "victim": (cell.measure.defended.victim.key, "weights.safetensors"),
    }[which]
    if name:
        spoil(a_file_of(store, key, name))
    else:
        manifest(store, key).write_text("{")
    driver = Driver(ran.grid, tmp_path / "new", Store(store), executor="serial", say=print)
    report = driver.run()
    assert report.counts == {"ok": 4}
    assert report.stages_run == 1
    # A cell that waits for what is being mended is not read again before it is there.
    assert all(len(owners) == 1 for owners in driver.mended.values())
    assert numbers(tmp_path / "new") == numbers(ran.out)


def test_foreign_files_in_a_store_do_no_harm(ran: Ran, tmp_path: Path) -> None:
    out, store = copy(ran, tmp_path)
    for folder in ("manifests/model", "data", "partial", "locks"):
        (store / folder).mkdir(parents=True, exist_ok=True)
        (store / folder / "README").write_text("hello")
    (store / "manifests" / "model" / "model-x.json").write_text("{}")
    shutil.rmtree(out / "rows")
    assert run_serial(ran.grid, out, store).counts == {"ok": 4}


def test_a_mid_fit_checkpoint_that_is_none_costs_time_alone(ran: Ran, tmp_path: Path) -> None:
    key = make_plan(ran.grid).cells[0].measure.defended.victim.key
    _, store = copy(ran, tmp_path)
    manifest(store, key).unlink()
    (store / "partial" / key).mkdir(parents=True)
    (store / "partial" / key / "fit.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    report = run_serial(ran.grid, tmp_path / "new", store)
    assert report.counts == {"ok": 4}
    assert numbers(tmp_path / "new") == numbers(ran.out)


# Two drivers, full disks.


def test_two_drivers_share_a_store(tmp_path: Path) -> None:
    file = write_grid_file(tmp_path, seeds=[0, 1])
    store = tmp_path / "store"
    other = subprocess.Popen(
        grid_command(
            "run", file, "--executor", "serial", "--out", tmp_path / "a", "--store", store
        ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        wait_for(lambda: (tmp_path / "a" / "logs").exists() or other.poll() is not None)
        report = run_serial(load_grid(str(file)), tmp_path / "b", store)
        said = other.communicate(timeout=120)[1]
    finally:
        other.kill()
    assert (report.code, other.returncode) == (0, 0), said
    trained: Counter[str] = Counter()
    made: Counter[str] = Counter()
    for name in ("a", "b"):
        mine = json.loads((tmp_path / name / "run.json").read_text())["trained"]
        trained.update(mine)
        made.update(s["key"] for s in records(tmp_path / name, "stages") if not s["reused"])
    # The reference, four victims, four fine-tunes: each by one of the two.
    assert len(trained) == 9
    assert set(trained.values()) == {1}
    assert set(made.values()) == {1}
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    assert len(outcomes(tmp_path / "a")) == 8


def wait_for(happened: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_one_results_directory_has_one_driver(
    ran: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, store = copy(ran, tmp_path)
    with only_driver(out):
        done = call(capsys, "run", write_grid_file(tmp_path), "--out", out, "--store", store)
    assert done.code == 1
    assert f"another run writes to {out} (process {os.getpid()} on " in done.err
    assert "give another --out" in done.err
    assert run_serial(ran.grid, out, store).code == 0


@pytest.mark.parametrize("full", ["store", "out"])
def test_a_full_disk_loses_nothing(
    ran: Ran, tmp_path: Path, full: str, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    size = {"store": "3m", "out": "64k"}[full]
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount one: {mounted.stderr.strip()}")
    try:
        file = write_grid_file(tmp_path / "in")
        places = {"out": tmp_path / "out", "store": tmp_path / "store", full: disk / full}
        command = ("run", file, "--executor", "serial")
        options = ("--out", places["out"], "--store", places["store"])
        done = call(capsys, *command, *options)
        assert done.code == 1, done.err
        assert "space" in done.err
        assert "run the same command again" in done.err
        store = Store(ran.store)
        for path in places["store"].glob("manifests/*/*.json"):
            whole = Store(places["store"]).need(path.stem)
            assert whole.files == store.need(path.stem).files
        for path in places["out"].glob("*/[!.]*.parquet"):
            pq.read_table(path)
        subprocess.run(["mount", "-o", "remount,size=256m", str(disk)], check=True)
        again = call(capsys, *command, *options)
        assert again.code == 0, again.err
        assert numbers(places["out"]) == numbers(ran.out)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


# What a run says while it goes.


def test_progress_counts_and_names_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from grid import progress

    now = [1000.0]
    monkeypatch.setattr("grid.progress.time.monotonic", lambda: now[0])
    said: list[str] = []
    line = progress.Progress(10, said.append)
    line.update(cells_left=10, stages_done=0, stages_planned=25, running=[])
    assert said == []  # at most one line a minute
    now[0] += 60
    # The first cell needs many stages: they show that something happens, and no rate is made up.
    line.update(cells_left=10, stages_done=5, stages_planned=25, running=["a", "a", "b"])
    assert said[0] == "0/10 cells, 5/25 stages; running: a x2, b"
    now[0] += 60
    counts = {"cells_left": 6, "stages_done": 13, "stages_planned": 25}
    line.update(**counts, running=["a"], waiting=2, seconds_left=185)
    # The time to go comes from the stages: the last cells may all close at once.
    assert said[1].startswith("4/10 cells, 13/25 stages, 120 cells/h, about 3 min to go")
    assert said[1].endswith("running: a; another run of this store makes 2 more")
    line.close()


def test_a_run_counts_its_stages(ran: Ran, tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[tuple[int, int, int]] = []

    def update(self: Any, **now: Any) -> None:
        seen.append((now["cells_left"], now["stages_done"], now["stages_planned"]))

    monkeypatch.setattr("grid.scheduler.Progress.update", update)
    report = run_serial(ran.grid, tmp_path / "out", tmp_path / "store")
    stages = report.stages_run
    # One after another, all of them planned from the start.
    assert [done for _, done, _ in seen] == list(range(1, stages + 1))
    assert {planned for *_, planned in seen} == {stages}
    assert seen[0][0] == report.cells
    assert seen[-1][0] == 0


def test_a_run_that_waits_for_another_holds_no_lane(ran: Ran, tmp_path: Path) -> None:
    """While another driver makes a victim, this one goes on with the rest."""
    grid = ran.grid
    victim = make_plan(grid).cells[-1].measure.defended.victim
    store = Store(tmp_path / "store")
    driver = Driver(grid, tmp_path / "out", store, executor="serial", say=lambda line: None)
    released = [0.0]
    held = store.claim(victim.key)
    held.__enter__()
    take = driver._take

    def watched(outcome: Any) -> None:
        take(outcome)
        clean = [c for c in driver.plan.cells if c.cell.rate == "0"]
        if not released[0] and all(c.key not in driver.open for c in clean):
            released[0] = time.monotonic()
            held.__exit__(None, None, None)

    driver._take = watched  # type: ignore[method-assign]
    assert driver.run().counts == {"ok": 4}
    assert released[0] > 0
