"""A campaign: what its searches found, read from ``trials/`` and ``campaign.json``.

The records of trials are what was measured; ``campaign.json`` says what a search may see, what it
may cost, and what it chose. The first may be ahead of the second while a campaign still runs.
Shares are 0 to 1, times are device seconds.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from analysis.reader import Tables, read_tables
from analysis.stats import Point, hypervolume, pareto_front
from grid.schema.columns import SCHEMA_VERSION
from grid.schema.errors import ResultsError, SchemaError

REFERENCE_LOSS = 0.05
"""Clean accuracy below the undefended victim's at which a hypervolume begins."""
SEES_WORDS: Mapping[str, str] = {
    "attacks": "tuning attacks",
    "clean": "clean pictures",
    "simulated": "simulated attacks",
    "held_out": "held-out attacks",
}


class Epoch(NamedTuple):
    """A trial after an epoch of its fits: means over the ``num_cells`` that it had begun."""

    epoch: int
    ca: float
    worst_asr: float | None
    num_cells: int


class Square(NamedTuple):
    """The end of one cell of a trial, beside the undefended victim of that cell."""

    attack: str
    rate_text: str | None
    seed: int | None
    clean_top1: float | None
    asr_top1: float | None
    victim_clean: float | None
    victim_asr: float | None


class Undefended(NamedTuple):
    """What a search starts from: the victims of its cells as they are."""

    ca: float
    worst_asr: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Some settings and how they did; ``running`` until the record of their end is written.

    The numbers of a stopped trial are of the cells and epochs so far, so only those of a complete
    one are compared.
    """

    key: str
    number: int
    status: str
    reason: str | None
    settings: Mapping[str, Any]
    is_default: bool
    ca: float | None
    ca_loss: float | None
    worst_asr: float | None
    mean_asr: float | None
    change: float | None
    score: float | None
    is_feasible: bool | None
    device_seconds: float
    squares: Sequence[Square] = ()
    epochs: Sequence[Epoch] = ()

    @property
    def is_complete(self) -> bool:
        return self.status == "ok" and self.ca is not None

    @property
    def point(self) -> Point | None:
        """Clean accuracy and what the worst attack leaves, of a complete trial: more is better."""
        if not self.is_complete or self.ca is None or self.worst_asr is None:
            return None
        return Point(self.ca, 1 - self.worst_asr)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """One search: a defense, for an objective. ``told`` is its entry in ``campaign.json``."""

    defense: str
    objective: str
    key: str
    sees: str | None
    minimise: str | None = None
    maximise: str | None = None
    ca_loss_limit: float | None = None
    told: Mapping[str, Any] = field(default_factory=dict)
    trials: Sequence[Trial] = ()

    @property
    def is_oracle(self) -> bool:
        return self.sees == "held_out" or bool(self.told.get("oracle"))

    @property
    def label(self) -> str:
        """The objective, and that it is an oracle where it is one."""
        is_said = "oracle" in self.objective.lower()
        return f"{self.objective} (oracle)" if self.is_oracle and not is_said else self.objective

    @cached_property
    def complete(self) -> list[Trial]:
        """The trials whose numbers may be compared, by number."""
        return [trial for trial in self.trials if trial.is_complete]

    @property
    def default(self) -> Trial | None:
        """The settings that the defense has anyway."""
        return next((trial for trial in self.trials if trial.is_default), None)

    @property
    def is_final(self) -> bool:
        """Whether the search has ended with a choice; before, the best so far stands for it."""
        return bool(self.told)

    @property
    def is_of_a_grid(self) -> bool:
        """Whether it tries all settings of a grid and is done."""
        return self.told.get("by") == "grid"

    @property
    def chosen(self) -> Trial | None:
        """What the search chose, or would choose now: the trial of the least score."""
        if self.is_final:
            chosen = self.told.get("chosen")
            return next((trial for trial in self.trials if trial.key == chosen), None)
        able = [t for t in self.complete if t.score is not None]
        return min(able, key=lambda t: (t.score or 0.0, -(t.ca or 0.0), t.number), default=None)

    @property
    def tried(self) -> list[Trial]:
        """The trials that the budget was spent on: all but the default settings."""
        return [trial for trial in self.trials if not trial.is_default]

    @property
    def num_trials(self) -> int:
        return self._count(len(self.tried), "trials")

    @property
    def num_stopped(self) -> int:
        return self._count(sum(trial.status == "stopped" for trial in self.tried), "stopped")

    @property
    def num_failed(self) -> int:
        return self._count(sum(trial.status == "failed" for trial in self.tried), "failed")

    @property
    def num_running(self) -> int:
        return sum(trial.status == "running" for trial in self.trials)

    @property
    def device_seconds(self) -> float:
        recorded = math.fsum(trial.device_seconds for trial in self.tried)
        return max(recorded, float(self.told.get("device_seconds") or 0.0))

    @cached_property
    def undefended(self) -> Undefended | None:
        """The undefended victims of the cells of a complete trial."""
        for trial in self.complete:
            clean = [s.victim_clean for s in trial.squares if s.victim_clean is not None]
            asr = _by_attack([(s.attack, s.victim_asr) for s in trial.squares])
            if clean:
                return Undefended(_mean(clean), max(asr.values(), default=None))
            if trial.ca is not None and trial.ca_loss is not None:
                return Undefended(trial.ca + trial.ca_loss, None)
        return None

    @cached_property
    def attacks(self) -> list[str]:
        """The attacks of its cells, in their order."""
        return list(dict.fromkeys(s.attack for trial in self.trials for s in trial.squares))

    @property
    def scene(self) -> tuple[str, ...]:
        """What its numbers are measured on; only those of equal scenes are compared."""
        sees = "attacks" if self.sees == "clean" else self.sees or "unknown"
        return (sees, *self.attacks)

    @property
    def scene_words(self) -> str:
        """What its numbers are measured on, for people."""
        kind = SEES_WORDS.get(self.scene[0], "attacks")
        return f"{kind} {', '.join(self.attacks)}" if self.attacks else kind

    def front(self) -> list[Trial]:
        """The complete trials that none beats in clean accuracy and worst ASR, by falling CA."""
        found = [(trial, point) for trial in self.complete if (point := trial.point) is not None]
        return [found[i][0] for i in pareto_front([point for _, point in found])]

    def hypervolumes(self) -> list[tuple[int, float]]:
        """Hypervolume of the complete ones among the default settings and the first 0, 1, 2, ...
        trials; empty if unknown.

        The box spans from 5 points below the undefended victim's clean accuracy and an ASR of
        100 % to that accuracy and an ASR of 0.
        """
        if self.undefended is None:
            return []
        best = Point(self.undefended.ca, 1.0)
        reference = Point(best.x - REFERENCE_LOSS, 0.0)
        ended = [trial for trial in self.trials if trial.status != "running"]
        found: list[tuple[int, float]] = []
        points: list[Point] = []
        for place, trial in enumerate(ended, start=0 if self.default in ended else 1):
            points += [trial.point] if trial.point is not None else []
            found.append((place, hypervolume(points, reference, best)))
        return found

    def _count(self, recorded: int, name: str) -> int:
        """Settings that a search tried twice have one record; its own count knows better."""
        return max(recorded, int(self.told.get(name) or 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignBoard:
    """Everything that tables and figures of a campaign need, defense by defense."""

    directory: Path
    name: str
    hash: str | None
    grid: str | None
    budget: Mapping[str, Any]
    searches: Sequence[SearchResult]
    warnings: list[str] = field(default_factory=list)

    @property
    def defenses(self) -> dict[str, list[SearchResult]]:
        """The searches of each defense, in order."""
        found: dict[str, list[SearchResult]] = {}
        for search in self.searches:
            found.setdefault(search.defense, []).append(search)
        return found

    @property
    def objectives(self) -> list[str]:
        """Labels of objectives, in order; a place in it is an objective's colour everywhere."""
        return list(dict.fromkeys(search.objective for search in self.searches))

    def scenes(self) -> dict[tuple[str, ...], list[SearchResult]]:
        """Searches by what their numbers are measured on."""
        found: dict[tuple[str, ...], list[SearchResult]] = {}
        for search in self.searches:
            found.setdefault(search.scene, []).append(search)
        return found


def load_campaign(directory: Path) -> CampaignBoard:
    """The board of a campaign's results directory, also while the campaign is running."""
    return read_tables(directory, read_campaign, of="trials")


def read_campaign(results: Tables) -> CampaignBoard:
    """The board of open results."""
    file = _campaign_file(results.directory / "campaign.json", results.warnings)
    records = _records(results, "FROM newest_trials ORDER BY number, cell, epoch")
    if not records:
        raise ResultsError(
            f"No trials of a campaign in {results.directory}: its files in trials/ hold none that "
            f"can be read. {' '.join(results.warnings)}".strip()
        )
    epochs: dict[tuple[str, str], list[Epoch]] = defaultdict(list)
    for row in _records(results, "FROM curves ORDER BY epoch"):
        point = Epoch(row["epoch"], row["ca"], row["worst_asr"], row["num_cells"])
        epochs[row["search"], row["trial"]].append(point)
    by_search: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        by_search[record["search"]].append(record)
    told = {str(entry.get("search")): entry for entry in file.get("searches") or ()}
    kept = _current(by_search, told, results.warnings)
    searches = [_search(by_search[key], told.get(key, {}), file, epochs) for key in kept]
    return CampaignBoard(
        directory=results.directory,
        name=str(file.get("name") or records[0]["campaign"]),
        hash=file.get("hash"),
        grid=file.get("grid"),
        budget=file.get("budget") or {},
        searches=searches,
        warnings=results.warnings,
    )


def _campaign_file(path: Path, warnings: list[str]) -> Mapping[str, Any]:
    """campaign.json, or nothing and a warning where it is not there or not whole."""
    if not path.is_file():
        warnings.append(f"{path}: not there, so what was chosen and the budget cannot be told")
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        warnings.append(f"{path}: skipped, cannot be read ({error})")
        return {}
    if not isinstance(found, dict):
        warnings.append(f"{path}: skipped, holds {type(found).__name__}, not an object")
        return {}
    version = found.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise SchemaError(
            f"{path} was written with results schema {version}; this backdoor-grid reads up to "
            f"{SCHEMA_VERSION}. Install the newer backdoor-grid that wrote it."
        )
    return found


def _records(results: Tables, sql: str) -> list[dict[str, Any]]:
    """A query's rows by the names of their columns."""
    answer = results.query(sql)
    return [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]


def _current(
    by_search: Mapping[str, Sequence[Mapping[str, Any]]],
    told: Mapping[str, Mapping[str, Any]],
    warnings: list[str],
) -> list[str]:
    """The searches that count: as campaign.json lists them, then those it does not know yet.

    A defense's search for an objective that was since begun anew, with another space or limit,
    has another key; the one listed counts, or else the newest.
    """
    listed = [key for key in told if key in by_search]
    newest = sorted(by_search, key=lambda key: max(r["written_at"] for r in by_search[key]))
    kept: dict[tuple[str, str], str] = {}
    for key in (*listed, *(key for key in reversed(newest) if key not in told)):
        first = by_search[key][0]
        about = (first["defense"], first["objective"])
        if about in kept:
            warnings.append(
                f"{about[0]}, {about[1]}: {_num_trials(by_search[key])} trials of an earlier "
                f"search ({key[:12]}) left out; its space, limits or victims were others"
            )
        kept.setdefault(about, key)
    # Defenses and objectives begin in the order of the file, so the oldest first record leads.
    unlisted = [key for key in by_search if key in kept.values() and key not in told]
    return listed + sorted(unlisted, key=lambda key: min(r["started_at"] for r in by_search[key]))


def _num_trials(records: Sequence[Mapping[str, Any]]) -> int:
    return len({record["trial"] for record in records if not record["is_default"]})


def _search(
    records: Sequence[Mapping[str, Any]],
    told: Mapping[str, Any],
    file: Mapping[str, Any],
    epochs: Mapping[tuple[str, str], Sequence[Epoch]],
) -> SearchResult:
    """The search that some records belong to."""
    first = records[0]
    objective = (file.get("objectives") or {}).get(first["objective"]) or {}
    by_trial: dict[tuple[str, bool], list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        by_trial[record["trial"], record["is_default"]].append(record)
    trials = [
        _trial(group, epochs.get((first["search"], key), ()))
        for (key, _), group in by_trial.items()
    ]
    return SearchResult(
        defense=first["defense"],
        objective=first["objective"],
        key=first["search"],
        sees=objective.get("sees"),
        minimise=objective.get("minimise"),
        maximise=objective.get("maximise"),
        ca_loss_limit=objective.get("ca_loss"),
        told=told,
        trials=sorted(trials, key=lambda trial: trial.number),
    )


def _trial(records: Sequence[Mapping[str, Any]], epochs: Sequence[Epoch]) -> Trial:
    """A trial from its records; one without an end is running, and cost what its cells did."""
    ends = [record for record in records if record["record"] == "trial"]
    cells = [record for record in records if record["record"] == "cell"]
    end = ends[0] if ends else {**records[0], "status": "running", "reason": None}
    seconds = end["device_seconds"] if ends else _sum(cell["device_seconds"] for cell in cells)
    names = ("ca", "ca_loss", "worst_asr", "mean_asr", "change", "score", "is_feasible")
    return Trial(
        key=end["trial"],
        number=end["number"],
        status=end["status"],
        reason=end["reason"],
        settings=json.loads(end["settings"]),
        is_default=end["is_default"],
        device_seconds=float(seconds or 0.0),
        squares=[Square(*(cell[name] for name in Square._fields)) for cell in cells],
        epochs=epochs,
        **{name: _finite(end[name]) if ends else None for name in names},
    )


def _finite(value: Any) -> Any:
    """What is no number, such as the score of a model that broke, is not known."""
    return value if value is None or math.isfinite(value) else None


def _by_attack(found: Sequence[tuple[str, float | None]]) -> dict[str, float]:
    """Mean ASR per attack, of what was measured."""
    values: dict[str, list[float]] = {}
    for attack, asr in found:
        if asr is not None:
            values.setdefault(attack, []).append(asr)
    return {attack: _mean(many) for attack, many in values.items()}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _sum(values: Iterator[float | None]) -> float:
    return math.fsum(value for value in values if value is not None)
