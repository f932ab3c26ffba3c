"""The driver of a campaign: victims first, then a search per objective and defense, then files.

Everything a trial computes is a stage in the store, and every record of it a row in ``trials/``.
The same command goes on where it was: it replays what is recorded and runs what is not.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grid.cluster import Executor
from grid.lock import only_driver
from grid.plan import Group, longest_chain
from grid.progress import Progress
from grid.quick import files_in
from grid.registry import Source
from grid.results import judge
from grid.scheduler import Scheduler, clear_errors
from grid.schema import SCHEMA_VERSION, TRIAL, Status, write_whole
from grid.spec import Gate, Tuned
from grid.stages import Stage
from grid.tuning.scenes import Scenes, Square, inputs
from grid.tuning.score import CellNumbers, best, excess, over_cells, score
from grid.tuning.spec import Campaign, Searched, Sees
from grid.tuning.trial import (
    OUT_OF_BUDGET,
    PROCESS_FAILED,
    Context,
    Record,
    numbers_of,
    read_outcome,
    settings_of,
)
from grid.tuning.tuned import tuned_entry, words, write_held_out, write_tuned
from victims.errors import GridError
from victims.keys import Key
from victims.store import Store

FILE, GRID = "campaign.json", "campaign.yaml"
# Keeps Tune's own records few, and Ctrl-C ours; read when Ray is imported.
ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
}
COLUMNS = frozenset(column.name for column in TRIAL)
SAY_SECONDS = 60.0
MANY = 1_000_000


@dataclass(slots=True)
class SearchReport:
    """What one search did and chose."""

    defense: str
    objective: str
    oracle: bool
    search: str
    by: str
    trials: int = 0
    stopped: int = 0
    failed: int = 0
    replayed: int = 0
    device_seconds: float = 0.0
    wall_seconds: float = 0.0
    chosen: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    feasible: bool | None = None
    named: str | None = None
    file: str | None = None


@dataclass(slots=True)
class CampaignReport:
    """What a campaign did; also written as ``campaign.json``."""

    name: str
    searches: list[SearchReport]
    held_out: Path | None
    wall_seconds: float
    problem: str = ""

    @property
    def code(self) -> int:
        """0 done, 1 stopped by an error, 4 where no victim passed its gate."""
        return 1 if self.problem else 0

    def lines(self) -> list[str]:
        """What every search used of its budget, which is the same for all, and what it chose."""
        found = []
        for one in self.searches:
            counts = [f"{one.trials} trials"]
            counts += [f"{one.stopped} stopped"] if one.stopped else []
            counts += [f"{one.failed} failed"] if one.failed else []
            counts += [f"{one.replayed} known before"] if one.replayed else []
            mark = " (oracle)" if one.oracle else ""
            found.append(
                f"{one.defense}, {one.objective}{mark}: {', '.join(counts)},"
                f" {one.device_seconds:.0f} device seconds -> {one.named or 'nothing'}"
                f" {json.dumps(dict(one.settings)) if one.named else ''}".rstrip()
            )
        return found


class Preparation(Scheduler):
    """The victims, their gates and all else that trials read, and the default settings' cells."""

    def __init__(self, campaign: Campaign, stages: Mapping[Key, Stage], **options: Any) -> None:
        super().__init__(stages, campaign.grid.execution, **options)
        self.wanted: set[Key] = set()

    @property
    def is_over(self) -> bool:
        return all(key in self.done or key in self.blocked for key in self.wanted)

    def add(self, wanted: Iterable[Stage]) -> None:
        """Want some stages more."""
        missing: dict[Key, Stage] = {}
        found = list(wanted)
        for stage in found:
            missing |= {k: s for k, s in inputs(stage).items() if k not in self.store}
            self.done |= {key for key in inputs(stage) if key not in missing}
        seconds = {key: self.history.seconds(stage) for key, stage in missing.items()}
        self.priority |= longest_chain(missing, seconds)
        self.planned |= set(missing)
        self.journal.expect(missing, {}, self.priority)
        for stage in found:
            self.wanted.add(stage.key)
            self.want(stage)

    def note(self, executor: Executor) -> None:
        self.journal.lanes = executor.lanes
        self.journal.update(
            "running",
            cells_open=len(self.wanted - self.done),
            cells_asked=len(self.wanted),
            planned=self.planned,
            done=self.done | set(self.blocked),
            running={key: self.stages[key] for key in self.running},
            begun=executor.begun,
            waiting=len(self.later),
        )

    def tell(self, executor: Executor, progress: Progress) -> None:
        progress.update(
            cells_left=len(self.wanted - self.done),
            stages_done=len(self.planned & self.done),
            stages_planned=len(self.planned),
            running=[stage.family for stage in executor.begun],
            waiting=len(self.later),
            seconds_left=self.journal.eta_seconds,
        )


class CampaignDriver:
    """One run of one campaign."""

    def __init__(
        self, campaign: Campaign, out: Path, store: Store, *, say: Callable[[str], None] = print
    ) -> None:
        self.campaign, self.out, self.store, self.say = campaign, out, store, say
        self.scenes = Scenes(campaign)
        self.source = Source(campaign.name, campaign.source, campaign.text)
        self.records = _recorded(out)
        self.groups: dict[Sees, tuple[Group, ...]] = {}
        self.reports: list[SearchReport] = []
        self.tuned: list[Tuned] = []
        self.said = 0.0

    def run(self) -> CampaignReport:
        started = time.perf_counter()
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with only_driver(self.out), clear_errors(self.out):
            write_whole(self.out / GRID, self.campaign.text)
            sees = dict.fromkeys(self.scenes.of(o.sees).sees for o in self._objectives)
            self.prepared = Preparation(
                self.campaign,
                self._stages(sees),
                out=self.out,
                store=self.store,
                executor="ray",
                say=self.say,
            )
            self.prepared.recover()
            self.prepared.journal.state("starting")
            executor = self.prepared.start()
            state, why = "stopped", ""
            try:
                self._prepare(executor, sees)
                for label in self.campaign.objectives:
                    for searched in self.campaign.defenses:
                        self._search(executor, searched, label)
                held_out = write_held_out(self.out, self.campaign, self.tuned)
                state = "ended"
            except BaseException as error:
                why = str(error) or type(error).__name__
                raise
            finally:
                self.prepared.flush(force=True)
                self.prepared.logbook.close()
                self.prepared.journal.state(state, why)
                executor.close()
        return CampaignReport(
            self.campaign.name, self.reports, held_out, time.perf_counter() - started
        )

    @property
    def _objectives(self) -> list[Any]:
        return list(self.campaign.objectives.values())

    # --- victims and defaults

    def _stages(self, sees: Iterable[Sees]) -> dict[Key, Stage]:
        """All that is made before the trials."""
        found: dict[Key, Stage] = {}
        for one in sees:
            scene = self.scenes.of(one)
            for group in scene.groups():
                for stage in scene.plan.gates[group].stages:
                    inputs(stage, found)
            for searched in self.campaign.defenses:
                for square in scene.squares(searched.entry):
                    inputs(square.measure, found)
        return found

    def _prepare(self, executor: Executor, sees: Iterable[Sees]) -> None:
        """Victims and their gates; then, on those that pass, the settings that defenses have."""
        prepared, chosen = self.prepared, list(sees)
        gates = {
            one: {g: self.scenes.of(one).plan.gates[g] for g in self.scenes.of(one).groups()}
            for one in chosen
        }
        prepared.add(
            stage for each in gates.values() for gate in each.values() for stage in gate.stages
        )
        self._work(executor)
        for one, each in gates.items():
            passed = []
            for group, gate in each.items():
                for stage in gate.stages:
                    if stage.key in prepared.blocked:
                        raise GridError(
                            f"{'/'.join(map(str, group[:2]))}: its victim could not be made:"
                            f" {prepared.blocked[stage.key][1]}"
                        )
                verdict = judge(self.store, gate, self._gate(one))
                if verdict.status is Status.OK:
                    passed.append(group)
                else:
                    self.say(
                        f"{group[0]} at {group[1]} is left out, as {one.value.replace('_', ' ')}:"
                        f" {verdict.status.value}, {verdict.detail}"
                    )
            if not passed:
                raise GridError(
                    f"no victim of the {one.value.replace('_', ' ')} attacks passes its gate:"
                    " nothing can be tuned on them. `grid run` of the campaign's grid shows why."
                )
            self.groups[one] = tuple(passed)
        prepared.add(
            square.measure
            for one in chosen
            for searched in self.campaign.defenses
            for square in self._squares(searched, one)
        )
        self._work(executor)

    def _gate(self, sees: Sees) -> Gate:
        """A simulation is fitted to few pairs: what it loses against its start says nothing."""
        gate = self.campaign.grid.gate
        return replace(gate, init_loss=1.0) if sees is Sees.SIMULATED else gate

    def _work(self, executor: Executor) -> None:
        if not self.prepared.is_over:
            self.prepared.work(executor, len(self.prepared.wanted))
        if self.prepared.problem:
            raise GridError(self.prepared.problem)

    def _squares(self, searched: Searched, sees: Sees) -> list[Square]:
        scene = self.scenes.of(sees)
        return scene.squares(searched.entry, self.groups[scene.sees])

    # --- one search

    def _search(self, executor: Executor, searched: Searched, objective: str) -> None:
        from grid.tuning.search import Spent, run_search

        campaign, rule = self.campaign, self.campaign.objectives[objective]
        groups = self.groups[self.scenes.of(rule.sees).sees]
        key = self.scenes.search_key(searched, objective, groups)
        recorded = [record for record in self.records if record["search"] == key]
        default = self._default(searched, objective, key)
        known = _known(recorded)
        report = SearchReport(
            searched.label, objective, rule.is_oracle, key, campaign.search.by.value
        )
        wall = sum(float(r["spent_seconds"] or 0) for r in recorded if r["record"] == "trial")
        spent = Spent(campaign.budget, wall_seconds=wall / executor.lanes)
        runtime = self.prepared.runtime
        context = Context(
            source=self.source,
            defense=searched.label,
            objective=objective,
            groups=groups,
            store=self.store.uri,
            runtime=runtime,
            logs=str((self.out / "logs").resolve()),
            watched_cells=MANY if campaign.curves else int(campaign.stop is not None),
            known=known,
        )
        began = time.perf_counter()
        trials: list[Record] = []

        def hear(told: Any) -> None:
            row = self._row(told.record, told.number, searched.label, objective, key)
            if not told.record.get("replayed"):
                self.prepared.buffer["trials"].append(row)
            for one in told.outcomes:
                self.prepared.record(one, *read_outcome(one))
            if row["record"] == "trial":
                trials.append(row)
                report.replayed += bool(told.record.get("replayed"))
                self._progress(report, trials, spent.trials)
            self.prepared.flush()

        run_search(
            campaign,
            searched,
            context,
            spent,
            list(settings_of(recorded)),
            default,
            hear,
            executor.lanes,
        )
        self.prepared.flush(force=True)
        report.wall_seconds = time.perf_counter() - began
        report.trials = len(trials)
        report.stopped = sum(t["status"] == "stopped" for t in trials)
        report.failed = sum(t["status"] == "failed" for t in trials)
        report.device_seconds = spent.device_seconds
        self._choose(report, searched, objective, trials)
        self.reports.append(report)
        self._write(report)

    def _default(self, searched: Searched, objective: str, key: str) -> dict[int, float]:
        """Record what the settings that the defense has show; its ASR by cell."""
        rule = self.campaign.objectives[objective]
        squares = self._squares(searched, rule.sees)
        trial, cells, rows = self.scenes.trial_key(squares), list[CellNumbers](), list[Record]()
        common = {"trial": trial, "settings": "{}", "status": "ok", "started_at": time.time()}
        total, failed = 0.0, None
        for place, square in enumerate(squares):
            if square.measure.key in self.prepared.blocked:
                failed = self.prepared.blocked[square.measure.key][1]
                break
            numbers, columns = numbers_of(self.store, square)
            cells.append(numbers)
            meta = self.store.need(square.measure.defended.key).meta
            seconds = float(meta["cost"].get("train_seconds", 0.0))
            total += seconds
            where = {"cell": place, "attack": square.cell.attack.label}
            where |= {"rate_text": square.cell.rate, "seed": square.cell.seed}
            so_far = {"device_seconds": seconds, **_sums(cells, rule)}
            keys = {
                "defended_key": square.measure.defended.key,
                "measure_key": square.measure.key,
            }
            rows.append({**common, "record": "cell", **where, **keys, **so_far, **columns})
        ended: Record = {**common, "record": "trial", "device_seconds": total}
        if cells:
            ended |= _sums(cells, rule)
        if failed is not None:
            ended |= {"status": "failed", "reason": failed, "is_feasible": False}
        seen = {record["trial"] for record in self.records if record["search"] == key}
        if trial not in seen:
            for row in (*rows, ended):
                self.prepared.buffer["trials"].append(
                    self._row(row, 0, searched.label, objective, key, is_default=True)
                )
        return {place: cell.asr for place, cell in enumerate(cells)}

    def _row(
        self,
        record: Record,
        number: int,
        defense: str,
        objective: str,
        key: str,
        is_default: bool = False,
    ) -> Record:
        """A record with the columns that say whose it is."""
        row = {name: value for name, value in record.items() if name in COLUMNS}
        started = row.get("started_at")
        if isinstance(started, int | float):
            row["started_at"] = datetime.fromtimestamp(started, UTC)
        return {
            **row,
            "campaign": self.campaign.name,
            "search": key,
            "defense": defense,
            "objective": objective,
            "number": number,
            "is_default": is_default,
        }

    def _progress(self, report: SearchReport, trials: Sequence[Record], ended: int) -> None:
        now = time.monotonic()
        of = self.campaign.budget.trials
        if now - self.said < SAY_SECONDS and len(trials) != of:
            return
        self.said = now
        chosen = best(trials)
        told = "none ended yet" if chosen is None else _shown(chosen)
        total = f"/{of}" if of else ""
        self.say(f"{report.defense}, {report.objective}: {len(trials)}{total} trials; best: {told}")

    def _choose(
        self, report: SearchReport, searched: Searched, objective: str, trials: Sequence[Record]
    ) -> None:
        chosen = best(trials)
        if chosen is None:
            self.say(f"{searched.label}, {objective}: no trial came to its end; nothing is chosen")
            return
        counts = {"trials": report.trials, "device_seconds": report.device_seconds}
        tuned = tuned_entry(self.campaign, searched, objective, chosen, counts)
        self.tuned.append(tuned)
        path = write_tuned(self.out, tuned)
        report.chosen, report.named = str(chosen["trial"]), tuned.name
        report.settings = json.loads(str(chosen["settings"]))
        report.feasible = bool(chosen["is_feasible"])
        report.file = str(path.relative_to(self.out))
        if not report.feasible:
            self.say(
                f"{tuned.name}: no settings keep to the objective's limit; these miss it by least"
            )

    def _write(self, report: SearchReport) -> None:
        """``campaign.json``: what was asked, and what every search so far has come to."""
        campaign = self.campaign
        found = [asdict(one) for one in self.reports]
        body = {
            "schema_version": SCHEMA_VERSION,
            "name": campaign.name,
            "hash": campaign.grid.identity_hash,
            "grid": campaign.grid.name,
            "tuning": {
                "attacks": list(campaign.tuning.attacks),
                "seeds": list(campaign.tuning.seeds),
                "cells": len(self._squares(campaign.defenses[0], Sees.ATTACKS))
                if Sees.ATTACKS in self.groups
                else 0,
            },
            "held_out": {
                "attacks": list(campaign.held_out.attacks),
                "seeds": list(campaign.held_out.seeds),
            },
            "objectives": {
                label: {
                    "sees": rule.sees.value,
                    "minimise": rule.minimise,
                    "maximise": rule.maximise,
                    "ca_loss": None if rule.ca_loss is None else rule.ca_loss / 100,
                    "rule": words(rule),
                }
                for label, rule in campaign.objectives.items()
            },
            "budget": asdict(campaign.budget),
            "searches": found,
        }
        write_whole(self.out / FILE, json.dumps(body, indent=1))


def _sums(cells: Sequence[CellNumbers], rule: Any) -> Record:
    numbers = over_cells(cells)
    return {
        **numbers.as_columns(),
        "score": score(numbers, rule),
        "is_feasible": not excess(numbers, rule),
    }


def _shown(trial: Mapping[str, Any]) -> str:
    limit = "" if trial["is_feasible"] else ", beyond the limit"
    return (
        f"worst ASR {100 * trial['worst_asr']:.1f} %,"
        f" {100 * trial['ca_loss']:.1f} points of accuracy lost{limit}"
    )


def _recorded(out: Path) -> list[Record]:
    """The newest of every record in ``trials/``."""
    newest: dict[tuple[Any, ...], Record] = {}
    for file in files_in(out, "trials"):
        for record in file.read().to_pylist():
            names = ("search", "trial", "record", "cell", "epoch")
            key = tuple(record[name] for name in names)
            if key not in newest or record["written_at"] >= newest[key]["written_at"]:
                newest[key] = record
    return list(newest.values())


def _known(recorded: Sequence[Record]) -> dict[str, list[Record]]:
    """Per trial that came to an end, what it told, in order; those that failed are tried again
    where it was not their settings' fault."""
    by_trial: dict[str, list[Record]] = defaultdict(list)
    for record in recorded:
        by_trial[record["trial"]].append(record)
    found = {}
    for trial, records in by_trial.items():
        ended = [r for r in records if r["record"] == "trial"]
        if not ended or ended[0]["is_default"] or _to_be_done_again(ended[0]):
            continue
        order = {"epoch": 0, "cell": 1, "trial": 2}
        records.sort(key=lambda r: (order[r["record"]] == 2, r["cell"] or 0, r["epoch"] or 1e9))
        found[trial] = [_plain(record) for record in records]
    return found


def _to_be_done_again(ended: Record) -> bool:
    return ended["reason"] in (OUT_OF_BUDGET, PROCESS_FAILED)


def _plain(record: Record) -> Record:
    """A record as a trial tells it."""
    apart = {"schema_version", "written_at", "campaign", "search", "defense", "objective"}
    found = {n: v for n, v in record.items() if n not in apart | {"number", "is_default"}}
    return {**found, "started_at": record["started_at"].timestamp()}


def run_campaign(
    campaign: Campaign, out: Path, store_uri: str, *, say: Callable[[str], None] = print
) -> CampaignReport:
    """Run what is missing of a campaign and report."""
    return CampaignDriver(campaign, out, Store(store_uri), say=say).run()
