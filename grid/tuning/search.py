"""One search on Ray Tune: Tune's searchers suggest settings, its schedulers end trials early, and
its actors run them; what a trial did is in the store and in our records, never in Tune's."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ray import tune
from ray.tune.execution.placement_groups import PlacementGroupFactory
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)
from ray.tune.search import BasicVariantGenerator, Searcher

from defenses.base import Between, OneOf
from grid.cluster.warm import assigned_device
from grid.execution import Resources
from grid.interrupts import Interrupt
from grid.tuning.file import is_whole, values_of
from grid.tuning.score import FAILED, Incumbent, signed_rank_p
from grid.tuning.spec import (
    Budget,
    By,
    Campaign,
    Drop,
    Search,
    Searched,
    Sees,
    Space,
    Stop,
    Values,
)
from grid.tuning.trial import OUT_OF_BUDGET, PROCESS_FAILED, Context, Record, run_trial
from grid.work import LeftOff

# Where a budget names no number of trials, more than any hours allow.
NO_LIMIT = 1_000_000
SCORE, PAIR = "score", ("ca", "worst_asr")
# What searchers learn from: the score of a trial that came to its end, and the worst of any other.
FINAL = "final"
# So many trials that fail one after another end a search: the next would fail too.
MOST_FAILURES = 20
# Above any number of epochs: no trial is ended for having had enough of them.
MOST_EPOCHS = 100_000


@dataclass(slots=True)
class Spent:
    """What a search has used of its budget, in whatever runs; what was found counts as made."""

    budget: Budget
    device_seconds: float = 0.0
    wall_seconds: float = 0.0
    trials: int = 0
    failed_in_a_row: int = 0
    interrupt: Interrupt = field(default_factory=Interrupt)
    began: float = field(default_factory=time.monotonic)

    @property
    def is_over(self) -> bool:
        hours, minutes = self.budget.device_hours, self.budget.wall_minutes
        waited = self.wall_seconds + time.monotonic() - self.began
        if self.interrupt.seen or self.failed_in_a_row >= MOST_FAILURES:
            return True
        return (hours is not None and self.device_seconds >= 3600 * hours) or (
            minutes is not None and waited >= 60 * minutes
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What one search says: a record of a trial by its number, and the attempts behind it."""

    number: int
    record: Record
    outcomes: Sequence[Record] = ()


def run_search(
    campaign: Campaign,
    searched: Searched,
    context: Context,
    spent: Spent,
    earlier: Sequence[Values],
    incumbent: Incumbent | None,
    num_cells: int,
    say: Callable[[Told], None],
    at_once: int,
) -> None:
    """Run trials until the budget is used up.

    ``earlier`` are the settings of trials that an earlier run ended, which the searcher learns
    from; ``incumbent`` what the default settings show, if they keep to the limits, which a trial
    must not be worse than to go on, where the campaign drops trials; ``num_cells`` are those of a
    trial.
    """
    wants = campaign.grid.execution.resources_for("defended")
    # Who sees no attack, or asks for none to fail, may not end a trial for what attacks do to it.
    rule = campaign.objectives[context.objective]
    is_blind = rule.sees is Sees.CLEAN or rule.minimise is None
    rules = _Rules(campaign.stop, None if is_blind else campaign.drop, incumbent, num_cells)
    space = {name: _domain(dimension) for name, dimension in searched.space.items()}
    metric = list(PAIR) if campaign.search.by is By.NSGA2 else FINAL
    searcher, param_space, samples = _searcher(campaign, searched.space, space, metric, earlier)
    scratch = tempfile.mkdtemp(prefix="backdoor-grid-tune-")
    trainable = tune.with_resources(_trainable(context), _request(wants))
    listener = _Listener(rules, spent, say)
    try:
        tune.Tuner(
            trainable,
            param_space=param_space,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=rules,
                num_samples=samples,
                max_concurrent_trials=at_once,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=scratch,
                callbacks=[listener],
                stop=_OutOfBudget(spent),
                failure_config=tune.FailureConfig(max_failures=2),
                verbose=0,
            ),
        ).fit()
        listener.finish()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# Columns that a trial's own record does not have.
OF_A_CELL = (
    *("cell", "attack", "rate_text", "seed", "epoch", "defended_key", "measure_key"),
    *("clean_top1", "clean_n", "asr_top1", "asr_n", "victim_clean", "victim_asr"),
)


# --- what Tune runs


def _trainable(context: Context) -> Callable[[dict[str, Any]], None]:
    """A trial as Tune wants it. What all trials share travels once, as an object of the cluster."""

    def trial(config: dict[str, Any], context: Context) -> None:
        import torch

        torch.set_num_threads(context.runtime.threads)
        here = replace(context.runtime, device=assigned_device(context.runtime))

        def tell(record: Record, outcomes: list[Record]) -> None:
            is_whole = record["record"] == "trial" and record["status"] == "ok"
            score = record.get(SCORE)
            found = {SCORE: FAILED if score is None else score}
            worst = {FINAL: FAILED, "ca": 0.0, "worst_asr": 1.0}
            found |= {
                n: record[n.replace(FINAL, SCORE)] if is_whole else w for n, w in worst.items()
            }
            try:
                # As text: Tune would take a mapping apart, and copy it about.
                tune.report({**found, "told": json.dumps([record, outcomes])})
            except SystemExit as error:  # how Tune ends a trial in its middle
                raise LeftOff from error

        try:
            run_trial(replace(context, runtime=here), plain_values(config), tell)
        except LeftOff:
            # To return would have Tune's wrapper report once more, which nobody waits for: the
            # actor could not be used again, and the trial that was to have it would be lost.
            raise SystemExit(0) from None

    found: Callable[[dict[str, Any]], None] = tune.with_parameters(trial, context=context)
    return found


def _own_values(values: Values, space: Space) -> dict[str, Any]:
    """Settings with the objects of the space in place of those that JSON made of them."""
    found = dict(values)
    for name, dimension in space.items():
        if isinstance(dimension, OneOf) and name in found:
            by_text = {json.dumps(value): value for value in dimension.values}
            found[name] = by_text.get(json.dumps(found[name]), found[name])
    return found


def plain_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON has them: Tune draws numbers of numpy's."""
    return {n: v.item() if hasattr(v, "item") else v for n, v in config.items()}


def _request(wants: Resources) -> PlacementGroupFactory:
    bundle = {"CPU": wants.cpus, **({"GPU": wants.gpus} if wants.gpus else {})}
    if wants.memory_gb:
        bundle["memory"] = int(wants.memory_gb * 2**30)
    if wants.accelerator:
        bundle[f"accelerator_type:{wants.accelerator}"] = 0.001
    labels = [dict(wants.labels)] if wants.labels else None
    return PlacementGroupFactory([bundle], bundle_label_selector=labels)


# --- who suggests settings


def _domain(dimension: Between | OneOf) -> Any:
    if isinstance(dimension, OneOf):
        return tune.choice(list(dimension.values))
    low, high = dimension.low, dimension.high
    if is_whole(dimension):
        make = tune.lograndint if dimension.log else tune.randint
        return make(int(low), int(high) + 1)
    return (tune.loguniform if dimension.log else tune.uniform)(low, high)


def _searcher(
    campaign: Campaign,
    space: Space,
    domains: Mapping[str, Any],
    metric: str | list[str],
    earlier: Sequence[Values],
) -> tuple[Any, dict[str, Any] | None, int]:
    """A searcher of Tune's, its space where the searcher has none, and how many samples to draw.

    Random and grid search draw the same settings again after a restart, and find them measured;
    Optuna's samplers are told those of before, in their order.
    """
    how: Search = campaign.search
    trials = campaign.budget.trials or NO_LIMIT
    if how.by is By.RANDOM:
        return BasicVariantGenerator(random_state=how.seed), dict(domains), trials
    if how.by is By.GRID:
        values = {name: tune.grid_search(values_of(d, how.points)) for name, d in space.items()}
        return BasicVariantGenerator(random_state=how.seed), values, 1
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = how.seed + len(earlier)
    if how.by is By.TPE:
        sampler: Any = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    else:
        sampler = optuna.samplers.NSGAIISampler(seed=seed, population_size=how.population)
    found: Searcher = OptunaSearch(
        space=dict(domains),
        metric=metric,
        mode="min" if isinstance(metric, str) else ["max", "min"],
        sampler=sampler,
        points_to_evaluate=[_own_values(values, space) for values in earlier] or None,
    )
    return found, None, trials


# --- who ends trials


def _told(result: Mapping[str, Any]) -> tuple[Record, list[Record]]:
    record, outcomes = json.loads(result["told"])
    return record, outcomes


class _Rules(FIFOScheduler):
    """Tune's rule on epochs of the first cell, ours on cells; remembers why it ended a trial."""

    def __init__(
        self, stop: Stop | None, drop: Drop | None, incumbent: Incumbent | None, num_cells: int
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.on_epochs = _on_epochs(stop) if stop else None
        self.drop = drop
        self.best, self.best_score = incumbent or Incumbent({}, FAILED)
        # Every look may err: what may be erred in all is shared among them.
        self.num_cells = num_cells
        self.looks = max(1, num_cells - drop.after) if drop else 1
        self.cells: dict[str, dict[int, float]] = {}
        self.reasons: dict[str, str] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True  # what is compared is always the score

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        if self.on_epochs is not None:
            self.on_epochs.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        record = _told(result)[0]
        why = self._why_to_end(tune_controller, trial, record, result)
        # What is known teaches the rules as it did before, and is not ended again.
        if why is None or record.get("replayed"):
            return str(TrialScheduler.CONTINUE)
        self.reasons[trial.trial_id] = why
        return str(TrialScheduler.STOP)

    def _why_to_end(
        self, controller: Any, trial: Any, record: Record, result: dict[str, Any]
    ) -> str | None:
        if record["record"] == "epoch" and record["cell"] == 0 and self.on_epochs is not None:
            seen = {**result, "epoch": record["epoch"]}
            if self.on_epochs.on_trial_result(controller, trial, seen) == TrialScheduler.STOP:
                return f"behind others at epoch {record['epoch']}"
        if record["record"] == "cell":
            return self._why_worse(trial.trial_id, record)
        return None

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        record = _told(result)[0]
        if record["record"] == "trial" and record["status"] == "ok":
            self._take(trial.trial_id, record)
        if self.on_epochs is not None:
            # The median rule wants a last result by epochs, and has had the trial's.
            self.on_epochs.on_trial_remove(tune_controller, trial)

    def _take(self, name: str, record: Record) -> None:
        """The best trial so far is what the others are compared with."""
        cells = self.cells.get(name)
        if cells and record["is_feasible"] and record["score"] < self.best_score:
            self.best, self.best_score = cells, record["score"]

    def _why_worse(self, name: str, record: Record) -> str | None:
        cells = self.cells.setdefault(name, {})
        cells[record["cell"]] = record["asr_top1"]
        if self.drop is None or not self.drop.after <= len(cells) < self.num_cells:
            return None
        differences = [asr - self.best[place] for place, asr in cells.items() if place in self.best]
        p = signed_rank_p(differences)
        if p > self.drop.p / self.looks:
            return None
        return f"worse than the best so far on {len(cells)} cells, p {p:.3g}"


def _on_epochs(stop: Stop) -> Any:
    shared: dict[str, Any] = {"time_attr": "epoch", "metric": SCORE, "mode": "min"}
    if stop.by == "asha":
        return AsyncHyperBandScheduler(
            **shared,
            max_t=MOST_EPOCHS,
            grace_period=stop.grace,
            reduction_factor=stop.reduction,
            stop_last_trials=False,
        )
    return MedianStoppingRule(**shared, grace_period=stop.grace, min_samples_required=3)


class _OutOfBudget(tune.Stopper):
    def __init__(self, spent: Spent) -> None:
        self.spent = spent

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.spent.is_over


class _Listener(tune.Callback):
    """Hands on what trials tell, with their numbers, and ends the records of those cut short."""

    def __init__(self, rules: _Rules, spent: Spent, say: Callable[[Told], None]) -> None:
        self.rules, self.spent, self.say = rules, spent, say
        self.numbers: dict[str, int] = {}
        self.last: dict[str, Record] = {}
        self.cells: dict[str, float] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # In the order of their making: two may start in another.
        self.numbers.setdefault(trial.trial_id, trials.index(trial) + 1)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        name, (record, outcomes) = trial.trial_id, _told(result)
        self.last[name] = record
        if record["record"] == "cell":
            self.cells[name] = self.cells.get(name, 0.0) + record["device_seconds"]
            self.spent.device_seconds += record["device_seconds"]
        self.say(Told(number=self.numbers[name], record=record, outcomes=outcomes))
        if record["record"] == "trial":
            self._count(name, record["device_seconds"], record["status"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = trial.trial_id
        self._cut_short(name, self.rules.reasons.get(name, OUT_OF_BUDGET))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = trial.trial_id
        if name in self.last:
            self._cut_short(name, PROCESS_FAILED, "failed")
            return
        # It never said a word: still it is a trial of the budget, which is run again later.
        number = self.numbers.setdefault(name, trials.index(trial) + 1)
        settings = json.dumps(plain_values(trial.config), sort_keys=True)
        ended: Record = {"record": "trial", "trial": "", "settings": settings, "status": "failed"}
        ended |= {"reason": PROCESS_FAILED, "score": FAILED, "is_feasible": False}
        ended |= {"device_seconds": 0.0, "started_at": time.time()}
        self.say(Told(number=number, record=ended))
        self._count(name, 0.0, "failed")

    def finish(self) -> None:
        """Of trials that were under way when the budget ended nobody is told otherwise."""
        for name in list(self.last):
            self._cut_short(name, OUT_OF_BUDGET)

    def _count(self, name: str, total: float, status: str) -> None:
        """A trial has ended, with what its cells did not say themselves."""
        self.spent.failed_in_a_row = self.spent.failed_in_a_row + 1 if status == "failed" else 0
        self.spent.device_seconds += total - self.cells.pop(name, 0.0)
        self.spent.trials += 1

    def _cut_short(self, name: str, reason: str, status: str = "stopped") -> None:
        """The record of a trial that did not tell its end itself."""
        last = self.last.pop(name, None)
        if last is None or last["record"] == "trial":
            return
        total = self.cells.get(name, 0.0)
        if last["record"] == "epoch":
            total += last["device_seconds"]
        ended = {**last, **dict.fromkeys(OF_A_CELL), "record": "trial", "status": status}
        ended |= {"reason": reason, "device_seconds": total}
        ended |= {"spent_seconds": time.time() - last["started_at"]}
        self.say(Told(number=self.numbers[name], record=ended))
        self._count(name, total, status)
