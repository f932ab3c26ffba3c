"""From measurements to rows: what a run writes for every cell, whatever became of it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

from attacks.base import Aim
from grid.cell_columns import describe_cell
from grid.gate import Gate, Planted
from grid.measure import MeasureStage
from grid.plan import CellPlan, GateCheck, Plan
from grid.schema.status import Status
from grid.spec import Cell, DefenseEntry
from grid.stages import ModelStage, PoisonStage
from victims.keys import canonical, content_key
from victims.manifests import BadManifest, plain_json
from victims.measuring import Share, wilson
from victims.recipe import Runtime, Select
from victims.store import Damaged, Store

PACKAGES = (
    "backdoor-grid",
    "torch",
    "open_clip_torch",
    "scikit-learn",
    "ray",
    "numpy",
    "duckdb",
    "pyarrow",
)


@cache
def versions() -> str:
    """What is installed, as JSON."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return json.dumps(found, sort_keys=True)


@cache
def commit() -> str:
    """The commit of this project's checkout, else its version."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found = ""
    return found or f"v{version('backdoor-grid')}"


def read_measure(store: Store, stage: MeasureStage) -> dict[str, Any]:
    """The metrics of a measurement, per evaluation set."""
    text = store.need(stage.key).path("metrics.json").read_bytes()
    try:
        found: dict[str, Any] = plain_json(text, nan=True)
    except BadManifest as error:
        store.discard(stage.key, f"metrics.json: {error}")
        raise Damaged(stage.key, f"metrics.json: {error}") from error
    return found


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the tuning split says of the victims of one attack at one rate, all seeds together."""

    status: Status
    detail: str
    asr: float
    lift: float
    clean_loss: float
    # The success of every victim, of which ``asr`` is the mean.
    each: tuple[float, ...] = ()

    @property
    def passes(self) -> bool:
        return self.status is not Status.INVALID_VICTIM


# What an attack's success is called, by its aim.
SUCCESS = {Aim.TARGETS: "psr_top1", Aim.QUERIES: "text_hit_top1"}


def judge(store: Store, check: GateCheck, gate: Gate) -> Verdict:
    """The validity gate at the reference rate, the inert rule at the others.

    The victims of an attack at a rate, one a seed, pass or fail together: by their means.
    """
    attack = check.victims[0].trigger.attack
    success = SUCCESS.get(attack.aim, "asr_top1")
    found = [_tuning(store, stage) for stage in check.victims]
    clean = [_tuning(store, stage) for stage in check.clean]
    # A remapped class is lost on purpose: its pictures are left out where there is such a metric.
    kept = "clean_other_top1" if "clean_other_top1" in found[0] else "clean_top1"

    def mean(measured: Sequence[Mapping[str, Any]], metric: str) -> float:
        return fmean(m[metric]["value"] for m in measured)

    asr, accuracy = mean(found, success), mean(found, kept)
    lift, loss = asr - mean(clean, success), mean(clean, kept) - accuracy
    start = [_tuning(store, stage) for stage in check.init]
    fallen = mean(start, kept) - accuracy if start else 0.0
    what = {"psr_top1": "PSR", "text_hit_top1": "Hit@1"}.get(success, "ASR")
    each = tuple(float(m[success]["value"]) for m in found)
    wanted, told = f"{_mean(each)}{what}", f"{what} {asr:.1%}"
    if len(each) > 1:
        apart = ", ".join(f"{100 * share:.1f}" for share in each)
        told = f"mean {what} of {len(each)} victims {asr:.1%} ({apart})"
    numbers = (
        f"tuning split: {told}, lift {100 * lift:.1f} points, clean loss {100 * loss:.1f} points"
    )
    if not check.is_reference:
        inert = lift < gate.inert_lift
        detail = f"{numbers}; inert below a lift of {100 * gate.inert_lift:.0f}" if inert else ""
        return Verdict(Status.INERT if inert else Status.OK, detail, asr, lift, loss, each)
    wants = gate.thresholds(attack.group)
    faults = []
    if isinstance(wants, Planted):
        hits = sum(f[success]["successes"] for f in found), sum(f[success]["n"] for f in found)
        low, base = wilson(*hits)[0], mean(clean, success)
        if low < wants.low:
            faults.append(
                f"the lower bound of {what} must be at least {wants.low:.0%}, it is {low:.1%}"
            )
        if base > wants.clean:
            faults.append(
                f"the clean victim's {what} may be at most {wants.clean:.0%}, it is {base:.1%}"
            )
    else:
        if asr < wants.asr:
            faults.append(f"{wanted} must be at least {wants.asr:.0%}")
        if lift < wants.lift:
            faults.append(f"lift must be at least {100 * wants.lift:.0f} points")
    if loss > wants.clean_loss:
        faults.append(f"clean loss must be at most {100 * wants.clean_loss:.0f} points")
    if fallen > gate.init_loss:
        faults.append(
            f"clean accuracy may fall at most {100 * gate.init_loss:.0f} points below the init"
            f" model's, it falls {100 * fallen:.1f}"
        )
    shares = [read_measure(store, m)["sets"]["tuning"]["changed_share"] for m in check.victims]
    changed = min((share for share in shares if share is not None), default=1.0)
    if changed < 0.99:
        faults.append(f"the stamp must change 99 % of pictures, it changes {changed:.1%}")
    status = Status.INVALID_VICTIM if faults else Status.OK
    detail = f"{numbers}; {'; '.join(faults)}" if faults else ""
    return Verdict(status, detail, asr, lift, loss, each)


def _mean(each: Sequence[float]) -> str:
    return "mean " if len(each) > 1 else ""


def _tuning(store: Store, stage: MeasureStage) -> dict[str, Any]:
    metrics: dict[str, Any] = read_measure(store, stage)["sets"]["tuning"]["metrics"]
    return metrics


def identity(plan: Plan, planned: CellPlan) -> dict[str, Any]:
    """The columns that say which cell it is."""
    stage, grid = planned.measure, plan.grid
    return {
        "cell": planned.key,
        "track": grid.track.value,
        "regime": grid.regime.value,
        "count": planned.cell.count,
        "model": grid.model_words,
        "target": stage.trigger.goal.label,
        **describe_cell(planned.cell, grid),
    }


def refused_identity(plan: Plan, cell: Cell, reason: str) -> dict[str, Any]:
    """The same for a cell that cannot be: it has no stages."""
    grid = plan.grid
    about = [cell.attack.method, cell.defense.method, cell.label, grid.identity_hash, reason]
    return {
        "cell": content_key("cell", about),
        "track": grid.track.value,
        "regime": grid.regime.value,
        "model": grid.model_words,
        "target": grid.data.classes[cell.target],
        **describe_cell(cell, grid),
    }


def planned_cells(plan: Plan) -> list[dict[str, Any]]:
    """Every cell of the plan in file order, the impossible ones last."""
    possible = [identity(plan, cell) for cell in plan.cells]
    return [*possible, *(refused_identity(plan, *refused) for refused in plan.refused)]


class RowMaker:
    """Rows of one grid's cells."""

    def __init__(self, plan: Plan, store: Store, runtime: Runtime, first_cells: set[str]) -> None:
        self.plan, self.store, self.runtime = plan, store, runtime
        self.first_cells = first_cells

    def _common(self, cell: Cell) -> dict[str, Any]:
        grid = self.plan.grid
        return {
            "grid": grid.name,
            "grid_hash": grid.identity_hash,
            "attack_params": _params(cell.attack.method),
            "defense_params": _defense_params(cell.defense),
            "tuned": _tuned(cell),
            "knob": _knob(cell),
            "num_rows": grid.data.suspect,
            "threads": self.runtime.threads,
            "commit": commit(),
            "versions": versions(),
        }

    def outcome(
        self, planned: CellPlan, status: Status, detail: str, attempts: int, reused: bool
    ) -> dict[str, Any]:
        """The one row of a cell that carries its status."""
        stage = planned.measure
        return {
            **self._common(planned.cell),
            **identity(self.plan, planned),
            "added_later": bool(self.first_cells) and planned.key not in self.first_cells,
            "eval_set": "",
            "metric": "cell",
            "status": status.value,
            "detail": detail or None,
            "attempts": attempts,
            "reused": reused,
            "victim_key": planned.victim.key,
            "data_key": planned.victim.data.key,
            "trigger_key": stage.trigger.key,
            "defended_key": stage.defended.key,
            "measure_key": stage.key,
        }

    def refused(self, cell: Cell, reason: str) -> dict[str, Any]:
        return {
            **self._common(cell),
            **refused_identity(self.plan, cell, reason),
            "added_later": False,
            "eval_set": "",
            "metric": "cell",
            "status": Status.NOT_APPLICABLE.value,
            "detail": reason,
        }

    def measured(
        self, planned: CellPlan, verdict: Verdict | None, attempts: int, reused: bool
    ) -> list[dict[str, Any]]:
        """Every row of a cell that was measured: its outcome and one row per set and metric."""
        status = Status.OK
        if verdict is not None and (verdict.passes or planned.gated is False):
            status = verdict.status
        detail = verdict.detail if verdict else ""
        outcome = self.outcome(planned, status, detail, attempts, reused)
        outcome |= {**self._cost(planned), **self._training(planned)}
        own = read_measure(self.store, planned.measure)
        clean = read_measure(self.store, planned.clean_victim)["sets"]
        init = read_measure(self.store, planned.init_model)["sets"] if planned.init_model else {}
        preprocess = self.store.need(planned.measure.key).meta["preprocess_digest"]
        dealt = self._dealt(planned)
        outcome |= {"corpus_digest": self._digest(planned), "cover_count": dealt.get("cover", 0)}
        rows = [outcome]
        for name, found in own["sets"].items():
            common = {
                **outcome,
                "eval_set": name,
                "eval_digest": found["corpus_digest"],
                "templates_digest": found["templates_digest"],
                "preprocess_digest": preprocess,
            }
            for metric, share in found["metrics"].items():
                beside = {"clean_victim": clean[name]["metrics"][metric]["value"]}
                if init:
                    beside["init_model"] = init[name]["metrics"][metric]["value"]
                rows.append({**common, **share, **beside, "metric": metric})
            absent = {**common, "status": Status.NOT_APPLICABLE.value}
            rows.extend({**absent, "metric": metric} for metric in found["not_applicable"])
        told = {f"found_{metric}": share for metric, share in own["detection"].items()}
        if dealt:
            told |= self._dealt_shares(planned, dealt)
        rows.extend({**outcome, **s, "eval_set": "suspect", "metric": m} for m, s in told.items())
        return rows

    def _dealt(self, planned: CellPlan) -> Mapping[str, int]:
        """What the poisoning did, in rows; empty for clean data."""
        data = planned.victim.data
        if not isinstance(data, PoisonStage):
            return {}
        meta = self.store.need(data.truth_key).meta
        return {name: int(meta[name]) for name in ("count", "cover", "length", "changed")}

    def _dealt_shares(
        self, planned: CellPlan, dealt: Mapping[str, int]
    ) -> Mapping[str, dict[str, Any]]:
        """Poisoned rows whose picture is not of the target; for chosen pictures, rows of all."""
        attack = planned.cell.attack.method
        if attack.aim is not Aim.TARGETS:
            return {"label_changed": Share(dealt["changed"], dealt["count"]).as_dict()}
        each = dealt["count"] // attack.unit
        return {
            "per_target_rate": Share(each, dealt["length"]).as_dict(),
            "total_rate": Share(dealt["count"], dealt["length"]).as_dict(),
        }

    def _digest(self, planned: CellPlan) -> str:
        return str(self.store.need(planned.measure.defended.suspect.key).meta["digest"])

    def _cost(self, planned: CellPlan) -> dict[str, Any]:
        defended = planned.measure.defended
        meta = self.store.need(defended.key).meta
        cost = meta["cost"]
        victim = self._train_cost(planned.victim)
        seconds, spent = cost.get("train_seconds", 0.0), victim.get("train_seconds", 0.0)
        return {
            "cost_seconds": seconds,
            "victim_seconds": spent or None,
            "relative_cost": seconds / spent if spent else None,
            "pair_views": int(cost.get("images_backward", 0)),
            "wall_seconds": cost.get("wall_seconds", 0.0),
            "device": meta.get("device"),
        }

    def _training(self, planned: CellPlan) -> dict[str, Any]:
        """The learning rate, how it came about, and what the defense tells of its run."""
        stage = planned.measure.defended
        meta = self.store.need(stage.key).meta
        found: dict[str, Any] = {"notes": json.dumps(meta["notes"]) if meta["notes"] else None}
        if not (stage.trains and stage.defense.fits_by_recipe()):
            return found
        if choices := meta["choices"]:
            curve = json.dumps(choices)
            return {**found, "lr": choices[-1]["chosen"], "lr_rule": "select", "lr_curve": curve}
        if isinstance(stage.recipe.lr, Select):  # which the method's own fields went before
            return {**found, "lr_rule": "own"}
        return {**found, "lr": stage.recipe.rate, "lr_rule": "fixed"}

    def _train_cost(self, stage: ModelStage) -> Mapping[str, float]:
        cost: Mapping[str, float] = self.store.need(stage.key).meta["cost"]
        return cost


def _tuned(cell: Cell) -> str | None:
    """Who chose a cell's settings, at what cost, and whether its attack was seen by the search."""
    tuned = cell.defense.tuned
    if tuned is None:
        return None
    about = {name: getattr(tuned, name) for name in ("campaign", "objective", "trials", "oracle")}
    about |= {"device_seconds": tuned.device_seconds, "seen": cell.attack.label in tuned.attacks}
    return json.dumps(about)


def _knob(cell: Cell) -> str | None:
    """Of which settings of one defense a cell's are one."""
    knob = cell.defense.knob
    return json.dumps({"of": knob.of, "name": knob.name, "value": knob.value}) if knob else None


def _params(method: Any) -> str:
    return json.dumps(canonical(method)["fields"], sort_keys=True)


def _defense_params(entry: DefenseEntry) -> str:
    """A defense's fields, what its entry changes of the recipe, and who judges for it."""
    found = canonical(entry.method)["fields"]
    if entry.overrides:
        found = {**found, "recipe": canonical(dict(entry.overrides))}
    if entry.guide is not None:
        found = {**found, "guide": entry.guide.label}
    return json.dumps(found, sort_keys=True)
