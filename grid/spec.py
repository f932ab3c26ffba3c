"""A grid: attacks x rates x defenses x seeds, and everything that determines their results.

These are the types that a grid file is decoded to (`grid.gridfile` reads one) and its squares.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from attacks.base import poison_count
from defenses.base import Regime
from grid.data import Data, LabelledWorldData
from grid.evaluate import Evaluate
from grid.execution import Execution
from grid.gate import Gate
from victims.classifiers import ClassifierSpec
from victims.keys import digest
from victims.models import ModelSpec
from victims.pretrained import Weights
from victims.recipe import Recipe
from victims.tracks import Track

UNDEFENDED = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide:
    """A CLIP that judges the data of image classifiers: fitted by ``recipe`` to the public pairs,
    or the victim of a ``cell`` of the multimodal grid ``of``, or the weights of a file."""

    label: str
    model: ModelSpec
    recipe: Recipe | None = None
    of: Grid | None = None
    cell: Cell | None = None
    weights: Weights | None = None

    def identity(self) -> dict[str, Any]:
        """What determines its weights, besides the public pairs of the grid."""
        if self.of is None or self.cell is None:
            sha256 = self.weights.sha256 if self.weights else ""
            return {"model": self.model, "recipe": self.recipe, "sha256": sha256}
        grid, cell = self.of, self.cell
        attack = [cell.attack.method, cell.count, cell.target] if cell.count else []
        fits = [grid.victim, grid.weights or grid.reference, grid.regime]
        return {"model": self.model, "data": grid.data, "attack": [*attack, cell.seed, *fits]}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackEntry:
    """An attack and the rates, or the counts of poisoned rows, of its own, if it has any."""

    label: str
    method: Any
    rates: tuple[str, ...] | None = None
    counts: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """Where the settings of a defense come from that a campaign chose, and what they cost.

    ``attacks`` are those whose success the search could see, ``rule`` its objective in words,
    ``found`` what the settings showed on the tuning split, ``made`` when and with what.
    """

    name: str
    defense: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    campaign: str
    objective: str
    rule: str = ""
    oracle: bool = False
    attacks: tuple[str, ...] = ()
    trials: int
    device_seconds: float
    feasible: bool = True
    found: Mapping[str, Any] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """One of several settings of a defense that differ in ``name`` alone; ``of`` is their label."""

    of: str
    name: str
    value: str

    @property
    def label(self) -> str:
        return f"{self.of}@{self.name}={self.value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DefenseEntry:
    """A defense and the recipes it trains with. ``victim_recipe`` differs from the grid's only for
    defenses that replace the victim's own training."""

    label: str
    method: Any
    recipe: Recipe
    victim_recipe: Recipe
    # Who judges the data, for a defense of classifiers that asks a CLIP.
    guide: Guide | None = field(default=None, metadata={"keyed": False})
    # How a file wrote its recipes, which are what counts.
    overrides: Mapping[str, Any] = field(default_factory=dict, metadata={"keyed": False})
    # Who chose its settings, which are what counts.
    tuned: Tuned | None = field(default=None, metadata={"keyed": False})
    # Which settings it belongs to, of which its own are what counts.
    knob: Knob | None = field(default=None, metadata={"keyed": False})


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One square of the grid. ``not_applicable`` says why a square can hold no result.

    ``rate`` is the rate as written, or ``50rows`` where a file counts them; ``count`` the rows.
    """

    label: str
    attack: AttackEntry
    rate: str
    count: int
    defense: DefenseEntry
    seed: int
    defense_seed: int
    target: int
    not_applicable: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A decoded grid file. ``reference`` has a meaning in regime F alone, and where the model has
    no ``weights`` of its own."""

    name: str
    description: str = ""
    track: Track = Track.MULTIMODAL
    regime: Regime = Regime.F
    data: Data
    model: ModelSpec | ClassifierSpec
    weights: Weights | None = None
    targets: tuple[int, ...] = (0,)
    attacks: tuple[AttackEntry, ...]
    rates: tuple[str, ...]
    defenses: tuple[DefenseEntry, ...]
    seeds: tuple[int, ...]
    defense_seeds: tuple[int, ...] = (0,)
    reference: Recipe
    victim: Recipe
    repair: Recipe
    gate: Gate = field(default_factory=Gate)
    evaluate: Evaluate = field(default_factory=Evaluate)
    execution: Execution = field(default_factory=Execution)
    source: str = ""
    text: str = ""

    def levels(self, attack: AttackEntry) -> dict[str, int]:
        """How much is poisoned: each rate of an attack as written, and its rows."""
        if attack.counts is not None:
            return {f"{count}rows" if count else "0": count for count in attack.counts}
        rates = self.rates if attack.rates is None else attack.rates
        return {rate: poison_count(rate, self.data.suspect) for rate in rates}

    def gate_rate(self, attack: AttackEntry) -> str:
        """The rate at which an attack's victims are judged."""
        levels = self.levels(attack)
        if self.gate.rate in levels:
            return str(self.gate.rate)
        return max(levels, key=lambda rate: levels[rate])

    @property
    def identity_hash(self) -> str:
        """12 hex digits over all that can change a number on the board."""
        apart = {"name", "description", "execution", "source", "text"}
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        kept["gate"] = replace(self.gate, rate="")
        if self.evaluate.others:
            kept["others"] = self.evaluate.others
        kept["gate_rates"] = [self.gate_rate(attack) for attack in self.attacks]
        # On the supervised track it fits guides, which are named below.
        surrogate = any(a.method.needs_surrogate for a in self.attacks)
        if self.track is Track.SUPERVISED or (self.regime is Regime.S and not surrogate):
            del kept["reference"]
        if self.weights is None:
            del kept["weights"]
        else:
            kept.pop("reference", None)
        guides = [entry.guide and entry.guide.identity() for entry in self.defenses]
        if any(guides):
            kept["guides"] = guides
        return digest(["grid", kept])[:12]

    @property
    def model_words(self) -> str:
        """The model in a word, for rows and boards: the network and the weights it starts from."""
        if self.weights is None:
            return self.model.label
        return f"{self.model.label}:{self.weights.tag or self.weights.sha256[:8]}"

    def _too_many(self, attack: AttackEntry, count: int) -> str | None:
        """Of a labelled set an attack that keeps labels may poison half of the target class."""
        # Classes of the embedded world are about equal. Of files the draw of the rows tells.
        if not isinstance(self.data, LabelledWorldData) or not attack.method.clean_label:
            return None
        of_class = self.data.suspect // len(self.data.classes)
        if count <= of_class // 2:
            return None
        return (
            f"{attack.label} poisons rows of the target class alone, and {count} are more than half"
            f" of the about {of_class} that it has. Poison at most {of_class // 2} rows, a rate of"
            f" {of_class // 2 / self.data.suspect:g}, or give more suspect rows."
        )

    def cells(self) -> list[Cell]:
        """Every square, in the order of the file."""
        defenses = [(entry, self._off_track(entry)) for entry in self.defenses]
        found = []
        for attack in self.attacks:
            off_track = self._off_track(attack)
            for rate, count in self.levels(attack).items():
                too_many = self._too_many(attack, count)
                squares = itertools.product(self.targets, self.seeds, defenses, self.defense_seeds)
                for target, seed, (defense, off), defense_seed in squares:
                    reason = off_track or off or too_many
                    square = (attack, rate, count, target, seed, defense, defense_seed, reason)
                    found.append(self._cell(*square))
        return found

    def _off_track(self, entry: AttackEntry | DefenseEntry) -> str | None:
        """Why a method has no meaning on the grid's track, if it has none."""
        method = entry.method
        if self.track in defined_on(method):
            return None
        names = ", ".join(sorted(defined_on(method)))
        shown = "" if self.track not in tracks(method) else ", as it is configured,"
        return f"{method.name}{shown} is defined on track {names}, the grid's is {self.track}"

    def _cell(
        self,
        attack: AttackEntry,
        rate: str,
        count: int,
        target: int,
        seed: int,
        defense: DefenseEntry,
        defense_seed: int,
        reason: str | None,
    ) -> Cell:
        label = f"{attack.label}/{rate}/{defense.label}/s{seed}"
        if len(self.targets) > 1:
            label += f"/t{target}"
        if len(self.defense_seeds) > 1:
            label += f"/d{defense_seed}"
        return Cell(
            label=label,
            attack=attack,
            rate=rate,
            count=count,
            defense=defense,
            seed=seed,
            defense_seed=defense_seed,
            target=target,
            not_applicable=reason,
        )


def tracks(method: Any) -> frozenset[Track]:
    """The tracks a method declares; a defense that says nothing defends CLIPs."""
    declared: frozenset[Track] = getattr(method, "tracks", frozenset({Track.MULTIMODAL}))
    return declared


def defined_on(method: Any) -> frozenset[Track]:
    """The tracks on which a method, as it is configured, has a meaning."""
    asked = getattr(method, "defined_on", None)
    return tracks(method) if asked is None else asked()
