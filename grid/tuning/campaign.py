"""The driver of a campaign: victims first, then a search per objective and defense, then files.

Everything a trial computes is a stage in the store, and every record of it a row in ``trials/``.
The same command goes on where it was: it replays what is recorded and runs what is not.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from grid.executors import Executor
from grid.gate import Gate
from grid.interrupts import Interrupt, heeded
from grid.lock import only_driver
from grid.places import BEGAN_FILE, CAMPAIGN_FILE
from grid.plan import Group
from grid.registry import Source
from grid.results import judge
from grid.scheduler import clear_errors
from grid.schema.status import Status
from grid.schema.whole import write_whole
from grid.spec import Tuned
from grid.stages import Stage
from grid.start_gate import StartStage, judge_start
from grid.tuning.preparation import Preparation
from grid.tuning.records import known_of, recorded_in, row, settings_of
from grid.tuning.report import CampaignReport, SearchReport, write_report
from grid.tuning.rests import Rests
from grid.tuning.scenes import Scenes, Square, inputs
from grid.tuning.score import CellNumbers, Incumbent, best, excess, over_cells, score
from grid.tuning.spec import Campaign, Objective, Searched, Sees
from grid.tuning.trial import PROCESS_FAILED, Context, Record, numbers_of, read_outcome, where_of
from grid.tuning.tuned import tuned_entry, write_held_out, write_tuned
from victims.errors import GridError, UsageError
from victims.keys import Key
from victims.store import Store

# Keeps Tune's own records few, and Ctrl-C ours; read when Ray is imported.
ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
}
SAY_SECONDS = 15.0
MANY = 1_000_000


class CampaignDriver:
    """One run of one campaign."""

    def __init__(
        self, campaign: Campaign, out: Path, store: Store, *, say: Callable[[str], None] = print
    ) -> None:
        self.campaign, self.out, self.store, self.say = campaign, out, store, say
        self.scenes = Scenes(campaign)
        self.source = Source(campaign.name, campaign.source, campaign.text)
        self.records = recorded_in(out)
        self.groups: dict[Sees, tuple[Group, ...]] = {}
        self.reports: list[SearchReport] = []
        self.tuned: list[Tuned] = []
        self.rests = Rests(out, campaign.grid, store.shown)
        self.said = 0.0
        self.interrupt = Interrupt()

    def run(self) -> CampaignReport:
        started = time.perf_counter()
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with only_driver(self.out), clear_errors(self.out), heeded() as self.interrupt:
            self._say_what()
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
                held_out = write_held_out(self.out, self.campaign, self.tuned, self.say)
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

    def _say_what(self) -> None:
        """Keep the campaign's text, and since when there has been one."""
        write_whole(self.out / CAMPAIGN_FILE, self.campaign.text)
        write_report(self.out, self.campaign, [], 0)
        if not (self.out / BEGAN_FILE).exists():
            write_whole(self.out / BEGAN_FILE, datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def _objectives(self) -> list[Any]:
        return list(self.campaign.objectives.values())

    # --- victims and defaults

    def _stages(self, sees: Iterable[Sees]) -> dict[Key, Stage]:
        """All that is made before the trials."""
        found: dict[Key, Stage] = {}
        for one in sees:
            scene = self.scenes.of(one)
            if scene.plan.start is not None:
                inputs(scene.plan.start, found)
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
        for one in chosen:
            plan = self.scenes.of(one).plan
            for planned in plan.cells:
                if planned.group in gates[one]:
                    start: list[Stage] = [plan.start] if plan.start else []
                    stages = (*start, *planned.stages, *plan.gates[planned.group].stages)
                    self.rests.add("victim ", planned.cell, stages)
        self.rests.write()
        self._check_start(executor, chosen)
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
        for one in chosen:
            for searched in self.campaign.defenses:
                squares = self._squares(searched, one)
                for square in squares:
                    self.rests.add("default ", square.cell, (square.measure, square.victim))
                prepared.add(square.measure for square in squares)
        self.rests.write()
        self._work(executor)

    def _check_start(self, executor: Executor, sees: Iterable[Sees]) -> None:
        """Weights that victims should not start from end a campaign before anything is trained."""
        required, found = self.campaign.grid.gate.reference, dict[Key, StartStage]()
        for stage in (self.scenes.of(one).plan.start for one in sees):
            if stage is not None:
                found[stage.key] = stage
        if required is None or not found:
            return
        self.prepared.add(found.values())
        self._work(executor)
        for stage in found.values():
            if stage.key in self.prepared.blocked:
                raise GridError(f"the start weights: {self.prepared.blocked[stage.key][1]}")
            verdict = judge_start(self.store, stage, required)
            if not verdict.passes:
                raise GridError(verdict.detail)

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
        from grid.tuning.search import MOST_FAILURES, Spent, run_search

        campaign, rule = self.campaign, self.campaign.objectives[objective]
        groups = self.groups[self.scenes.of(rule.sees).sees]
        key = self.scenes.search_key(searched, objective, groups)
        recorded = [record for record in self.records if record["search"] == key]
        mine = partial(
            row,
            campaign=campaign.name,
            search=key,
            defense=searched.label,
            objective=objective,
        )
        squares = self._squares(searched, rule.sees)
        default, told = self._default(searched, rule)
        records = [mine(record, 0, is_default=True) for record in told]
        if not any(r["is_default"] and r["trial"] == records[-1]["trial"] for r in recorded):
            self.prepared.buffer["trials"].extend(records)
        known = known_of(recorded)
        report = SearchReport(
            searched.label, objective, rule.is_oracle, key, campaign.search.by.value
        )
        wall = sum(float(r["spent_seconds"] or 0) for r in recorded if r["record"] == "trial")
        spent = Spent(campaign.budget, wall_seconds=wall / executor.lanes, interrupt=self.interrupt)
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
        # All that is known counts, whether or not the budget lets it be told again.
        ended = {
            r["trial"]: r
            for r in recorded
            if r["record"] == "trial" and not r["is_default"] and r["trial"] in known
        }
        before = set(ended)

        def hear(told: Any) -> None:
            found = mine(told.record, told.number)
            # What never said a word is nothing to go on from: it is run again under its own key.
            if found["trial"] and not told.record.get("replayed"):
                self.prepared.buffer["trials"].append(found)
            for one in told.outcomes:
                self.prepared.record(one, *read_outcome(one))
            if found["record"] == "trial":
                ended[found["trial"] or f"lost {told.number}"] = found
                report.replayed = len(before & set(ended))
                self._progress(report, list(ended.values()))
            if self.prepared.is_due:
                self.prepared.journal.state("running")
            self.prepared.flush()

        run_search(
            campaign,
            searched,
            context,
            spent,
            list(settings_of(recorded)),
            default,
            len(squares),
            hear,
            max(1, executor.room.most("defended")),
        )
        self.prepared.flush(force=True)
        if self.interrupt.seen:
            raise KeyboardInterrupt
        report.wall_seconds = time.perf_counter() - began
        trials = list(ended.values())
        report.trials = len(trials)
        report.stopped = sum(t["status"] == "stopped" for t in trials)
        report.failed = sum(t["status"] == "failed" for t in trials)
        report.lost = sum(t["reason"] == PROCESS_FAILED for t in trials)
        report.device_seconds = math.fsum(float(t["device_seconds"] or 0.0) for t in trials)
        if spent.failed_in_a_row >= MOST_FAILURES:
            self.say(
                f"{searched.label}, {objective}: ended, {MOST_FAILURES} trials failed in a row"
            )
        self._choose(report, searched, objective, [records[-1], *trials])
        self.reports.append(report)
        self._rest(searched, objective, trials)
        tuning = self.groups.get(Sees.ATTACKS)
        cells = self._squares(campaign.defenses[0], Sees.ATTACKS) if tuning else []
        write_report(self.out, campaign, self.reports, len(cells))

    def _default(
        self, searched: Searched, rule: Objective
    ) -> tuple[Incumbent | None, list[Record]]:
        """What the settings that the defense has show: what trials are held against, unless it is
        beyond the limits, and the records."""
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
            so_far = {"device_seconds": seconds, **_sums(cells, rule)}
            rows.append(
                {**common, "record": "cell", **where_of(place, square), **so_far, **columns}
            )
        ended: Record = {**common, "record": "trial", "device_seconds": total}
        if cells:
            ended |= _sums(cells, rule)
        if failed is not None:
            ended |= {"status": "failed", "reason": failed, "is_feasible": False}
        if failed is not None or not ended["is_feasible"]:
            return None, [*rows, ended]
        asr = {place: cell.asr for place, cell in enumerate(cells)}
        return Incumbent(asr, float(ended["score"])), [*rows, ended]

    def _rest(self, searched: Searched, objective: str, trials: Sequence[Record]) -> None:
        """Tell what trials rest on."""
        scene = self.scenes.of(self.campaign.objectives[objective].sees)
        for trial in trials:
            with contextlib.suppress(UsageError):  # settings that cannot be left nothing
                entry = self.scenes.entry(searched, json.loads(str(trial["settings"])))
                about = f"{objective} #{trial['number']} "
                for square in scene.squares(entry, self.groups[scene.sees]):
                    self.rests.add(about, square.cell, (square.measure, square.victim))
        self.rests.write()

    def _progress(self, report: SearchReport, trials: Sequence[Record]) -> None:
        now = time.monotonic()
        of = self.campaign.budget.trials
        if now - self.said < SAY_SECONDS and len(trials) != of:
            return
        self.said = now
        chosen = best(trials)
        told = "none ended yet" if chosen is None else _shown(chosen)
        total = f"/{of}" if of else ""
        known = f" ({report.replayed} known before)" if report.replayed else ""
        place = f"[{len(self.reports) + 1}/{self.num_searches}]"
        self.say(
            f"{place} {report.defense}, {report.objective}: {len(trials)}{total} trials{known};"
            f" best: {told}"
        )

    @property
    def num_searches(self) -> int:
        return len(self.campaign.objectives) * len(self.campaign.defenses)

    def _choose(
        self, report: SearchReport, searched: Searched, objective: str, trials: Sequence[Record]
    ) -> None:
        chosen = best(trials)
        if chosen is None or not any(t["status"] == "ok" for t in trials[1:]):
            self.say(f"{searched.label}, {objective}: no trial came to its end; nothing is chosen")
            return
        if chosen["is_default"]:
            self.say(f"{searched.label}, {objective}: nothing is better than the defaults")
        counts = {"trials": report.trials, "device_seconds": report.device_seconds}
        tuned = tuned_entry(self.campaign, searched, objective, chosen, counts, report.search)
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


def run_campaign(
    campaign: Campaign, out: Path, store_uri: str, *, say: Callable[[str], None] = print
) -> CampaignReport:
    """Run what is missing of a campaign and report."""
    return CampaignDriver(campaign, out, Store(store_uri), say=say).run()
