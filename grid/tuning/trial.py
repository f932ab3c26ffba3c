"""One trial, in the process that runs it: its cells one after another, each cell's defended stage
and its measurement on the tuning split, told as they end. No Ray here.

A trial's stages are ordinary ones: what the store holds is not made again, and what a trial leaves
there serves grids and other campaigns.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from grid.measure import MeasureStage, heads_of
from grid.registry import Source
from grid.stage_order import parents
from grid.stages import Stage, load_trigger
from grid.tuning.file import decode_campaign
from grid.tuning.scenes import Scenes, Square
from grid.tuning.score import FAILED, CellNumbers, TrialNumbers, excess, over_cells, score
from grid.tuning.spec import Objective, Searched, Values
from grid.work import Ended, Outcome, execute
from victims.corpora import Reader, open_corpus
from victims.errors import GridError, UsageError
from victims.keys import Key
from victims.lab import Watch
from victims.measuring import metrics, outcomes
from victims.models import Clip, device_seconds
from victims.recipe import Runtime
from victims.store import Store

MAX_ATTEMPTS = 3
BUSY_SECONDS = 0.5
SUCCESS, CLEAN = "asr_top1", "clean_top1"
# Reasons for which a trial is run again when there is a budget for it.
OUT_OF_BUDGET, PROCESS_FAILED = "the budget is used up", "the process that ran it failed"

Record = dict[str, Any]
Tell = Callable[[Record, list[Record]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What all trials of a search share. ``groups`` are the gates whose victims count; ``known``
    the records of trials that an earlier run brought to an end. The fits of the first
    ``watched_cells`` are measured after every epoch."""

    source: Source
    defense: str
    objective: str
    groups: tuple[tuple[str, str, int], ...]
    store: str
    runtime: Runtime
    logs: str
    watched_cells: int = 0
    known: Mapping[str, Sequence[Record]] = field(default_factory=dict)


@lru_cache(maxsize=4)
def _scenes(source: Source) -> Scenes:
    return Scenes(decode_campaign(source))


class _Failed(Exception):
    """A stage of the trial will not be made; ``ended`` says by whose fault."""

    def __init__(self, ended: Ended, message: str) -> None:
        super().__init__(message)
        self.ended = ended


def run_trial(context: Context, values: Values, tell: Tell) -> None:
    """Measure some settings on every cell; ``tell`` is given a record at a time, the last one that
    of the trial, and the outcomes of the stages that ran for it."""
    trial = _Trial(context, values, tell)
    try:
        trial.run()
    except UsageError as error:
        trial.end("failed", str(error))
    except _Failed as error:
        if error.ended is not Ended.METHOD:
            raise GridError(str(error)) from error
        trial.end("failed", str(error))


class _Trial:
    def __init__(self, context: Context, values: Values, tell: Tell) -> None:
        self.context, self.values, self._tell = context, values, tell
        self.scenes = _scenes(context.source)
        campaign = self.scenes.campaign
        self.objective: Objective = campaign.objectives[context.objective]
        self.searched: Searched = next(s for s in campaign.defenses if s.label == context.defense)
        self.store = Store(context.store)
        self.cells: list[CellNumbers] = []
        self.key: str = ""
        self.started, self.device_seconds = time.time(), 0.0
        self.outcomes: list[Record] = []

    def run(self) -> None:
        entry = self.scenes.entry(self.searched, self.values)
        squares = self.scenes.of(self.objective.sees).squares(entry, self.context.groups)
        self.key = self.scenes.trial_key(squares)
        if self.key in self.context.known:
            for record in self.context.known[self.key]:
                self._tell({**record, "replayed": True}, [])
            return
        for place, square in enumerate(squares):
            self._measure(place, square)
        self.end("ok")

    def _measure(self, place: int, square: Square) -> None:
        began = time.perf_counter()
        watch = None
        if place < self.context.watched_cells:
            watch = _Watcher(self, place, square).look
        self._ensure(square.measure, watch)
        meta = self.store.need(square.measure.defended.key).meta
        seconds = float(meta["cost"].get("train_seconds", 0.0))
        numbers, columns = numbers_of(self.store, square)
        self.cells.append(numbers)
        self.device_seconds += seconds
        self.tell(
            "cell",
            self.cells,
            {
                **where_of(place, square),
                **columns,
                "epoch": None,
                "device_seconds": seconds,
                "spent_seconds": time.perf_counter() - began,
            },
        )

    def tell(self, record: str, cells: Sequence[CellNumbers], more: Record) -> None:
        told, self.outcomes = self.outcomes, []
        columns: Record = dict.fromkeys(TrialNumbers.__slots__)
        if cells:
            numbers = over_cells(cells)
            columns = {
                **numbers.as_columns(),
                "score": score(numbers, self.objective),
                "is_feasible": not excess(numbers, self.objective),
            }
        self._tell(
            {
                "record": record,
                "trial": self.key,
                "status": "ok",
                "settings": json.dumps(dict(self.values), sort_keys=True),
                **columns,
                "started_at": self.started,
                **more,
            },
            told,
        )

    def end(self, status: str, reason: str | None = None) -> None:
        """Tell of the whole trial; one that failed before its first cell has no numbers."""
        if not self.key:
            self.key = f"trial-of-{json.dumps(dict(self.values), sort_keys=True)}"
        more = {
            "status": status,
            "reason": reason,
            "device_seconds": self.device_seconds,
            "spent_seconds": time.time() - self.started,
        }
        if status == "failed":
            more |= {"score": FAILED, "is_feasible": False}
        self.tell("trial", self.cells, more)

    # --- stages

    def _ensure(self, stage: Stage, watch: Watch | None = None) -> None:
        """A stage and what it is made from, unless the store holds it."""
        if stage.key in self.store:
            return
        for parent in parents(stage):
            self._ensure(parent, watch if stage.kind in ("gate", "measure") else None)
        attempt = 0
        while True:
            watched = watch if stage.kind == "defended" else None
            context = self.context
            outcome = execute(stage, context.store, context.runtime, context.logs, watched)
            if outcome.ended is Ended.BUSY:
                time.sleep(BUSY_SECONDS)
                continue
            attempt += 1
            self.outcomes.append(plain_outcome(stage, outcome, attempt))
            if outcome.ended is Ended.OK:
                return
            tried = outcome.ended is not Ended.INFRASTRUCTURE or attempt >= MAX_ATTEMPTS
            if tried or not outcome.again:
                raise _Failed(outcome.ended, f"{stage.family}: {outcome.message}")


class _Watcher:
    """Measures a model after every epoch of a cell's fits, as its cell will be at the end."""

    def __init__(self, trial: _Trial, place: int, square: Square) -> None:
        self.trial, self.place, self.square = trial, place, square
        self.epochs, self.away = 0, 0.0
        self.began = device_seconds(trial.context.runtime.device)

    def look(self, model: Clip, key: str, record: Mapping[str, float]) -> None:
        device = torch.device(self.trial.context.runtime.device)
        before = device_seconds(device)
        self.epochs += 1
        shares, numbers = look_at(self.trial.store, self.square, model, device)
        now = device_seconds(device)
        self.away += now - before
        self.trial.tell(
            "epoch",
            [*self.trial.cells, numbers],
            {
                **where_of(self.place, self.square),
                **shares,
                "epoch": self.epochs,
                "device_seconds": now - self.began - self.away,
            },
        )


def where_of(place: int, square: Square) -> Record:
    """Which cell of a trial a record is of."""
    cell = square.cell
    return {
        "cell": place,
        "attack": cell.attack.label,
        "rate_text": cell.rate,
        "seed": cell.seed,
        "defended_key": square.measure.defended.key,
        "measure_key": square.measure.key,
    }


def look_at(
    store: Store, square: Square, model: Clip, device: torch.device
) -> tuple[Record, CellNumbers]:
    """Accuracy and attack success of a model on the tuning split."""
    stage = square.measure
    (tuning,) = stage.sets
    corpus = open_corpus(store, tuning.key, Reader.TUNING)
    trigger = load_trigger(store, stage.trigger.key, stage.trigger.attack)
    heads = heads_of(store, model, corpus, trigger, stage.trigger.attack.aim, device)
    target = stage.trigger.goal.target
    seen = outcomes(model, heads, corpus, trigger, target, device)
    found = metrics(seen, target, len(corpus.classes), (1,))
    shares = {name: share.as_dict() for name, share in found.items()}
    columns, numbers = _columns(shares, _tuning(store, square.victim), square)
    change = float((seen.clean_prediction != _answers(store, square.victim)).mean())
    return {**columns, "change": change}, replace(numbers, change=change)


def numbers_of(store: Store, square: Square) -> tuple[CellNumbers, Record]:
    """A cell's numbers, once it has been measured, and the same as columns of a record."""
    own, victim = _tuning(store, square.measure), _tuning(store, square.victim)
    columns, numbers = _columns(own, victim, square)
    ours, theirs = (_answers(store, stage) for stage in (square.measure, square.victim))
    change = float((ours != theirs).mean())
    return replace(numbers, change=change), {**columns, "change": change}


def _columns(
    own: Mapping[str, Any], victim: Mapping[str, Any], square: Square
) -> tuple[Record, CellNumbers]:
    numbers = CellNumbers(
        attack=square.cell.attack.label,
        clean=float(own[CLEAN]["value"]),
        asr=float(own[SUCCESS]["value"]),
        victim_clean=float(victim[CLEAN]["value"]),
        victim_asr=float(victim[SUCCESS]["value"]),
    )
    columns = {
        "clean_top1": numbers.clean,
        "clean_n": int(own[CLEAN]["n"]),
        "asr_top1": numbers.asr,
        "asr_n": int(own[SUCCESS]["n"]),
        "victim_clean": numbers.victim_clean,
        "victim_asr": numbers.victim_asr,
    }
    return columns, numbers


def _tuning(store: Store, stage: MeasureStage) -> Mapping[str, Any]:
    from grid.results import read_measure

    found: Mapping[str, Any] = read_measure(store, stage)["sets"]["tuning"]["metrics"]
    return found


def _answers(store: Store, stage: MeasureStage) -> np.ndarray:
    """The class that a model gave every clean picture."""
    import pyarrow.parquet as pq

    path = store.need(stage.key).path("samples.parquet")
    return np.asarray(pq.read_table(path, columns=["clean_prediction"])["clean_prediction"])


def plain_outcome(stage: Stage, outcome: Outcome, attempt: int) -> Record:
    """What a driver records of an attempt, as plain values."""
    return {
        "key": stage.key,
        "kind": stage.kind,
        "name": stage.family,
        "inputs": [parent.key for parent in parents(stage)],
        "attempt": attempt,
        "outcome": {
            **{name: getattr(outcome, name) for name in Outcome.__slots__},
            "ended": outcome.ended.value,
            "made": list(outcome.made),
            "cost": dict(outcome.cost),
        },
    }


def read_outcome(told: Record) -> tuple[Key, Outcome]:
    """An attempt as `plain_outcome` wrote it."""
    found = dict(told["outcome"])
    found |= {"ended": Ended(found["ended"]), "made": tuple(found["made"])}
    return Key(told["key"]), Outcome(**found)
