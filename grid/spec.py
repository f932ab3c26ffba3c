"""A grid: attacks x rates x defenses x seeds, and everything that determines their results.

These are the types that a grid file is decoded to (`grid.gridfile` reads one) and its squares.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from attacks.base import GateGroup, poison_count
from defenses.base import Regime
from grid.execution import Execution, at_least
from victims.classifiers import LABEL_TEMPLATES, ClassifierSpec
from victims.corpora import CorpusSpec
from victims.embedded import WorldCorpus
from victims.evaluation_sets import EvaluationSet
from victims.exhibits import Exhibits
from victims.ingested import IngestedPairs
from victims.keys import LATER, digest
from victims.labelled import LabelledWorld
from victims.labelled_files import LabelledFiles
from victims.models import ModelSpec
from victims.pretrained import Weights
from victims.recipe import Recipe
from victims.retrieval_sets import RetrievalSet
from victims.tracks import Track
from victims.world import CLASSES, TEMPLATES, World

UNDEFENDED = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanPool:
    """How many clean pairs there are, and whether they are `disjoint` from the suspect ones or,
    as in `overlap`, pairs that the suspect data holds too, as they were before any poisoning."""

    rows: int
    pool: Literal["disjoint", "overlap"] = "disjoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldData:
    """The embedded world and how many rows of each split the grid uses."""

    world: World = field(default_factory=World)
    public: int = 10_000
    suspect: int = 10_000
    clean: int | CleanPool = 2_000
    tuning: int = 2_000
    report: int = 2_000
    shifted: int = 2_000

    def __post_init__(self) -> None:
        at_least(self, 1, "public", "suspect", "tuning", "report", "shifted")
        if isinstance(self.clean, CleanPool) and self.clean.pool == "disjoint":
            object.__setattr__(self, "clean", self.clean.rows)  # as it is written otherwise
        num_clean, overlaps = self._clean()
        if num_clean < 1:
            raise ValueError(f"clean must be at least 1, got {num_clean}")
        if overlaps and num_clean > self.suspect:
            raise ValueError(
                f"clean: {num_clean} rows of pool overlap, and the suspect data has {self.suspect}"
            )

    def _clean(self) -> tuple[int, bool]:
        """The number of clean pairs, and whether the suspect data holds them too."""
        if isinstance(self.clean, CleanPool):
            return self.clean.rows, self.clean.pool == "overlap"
        return self.clean, False

    @property
    def size(self) -> int:
        """The side of a picture, in pixels."""
        return self.world.size

    def rows(self, split: str) -> int:
        """How many pairs a split has."""
        return self.captioned(split).num_rows

    def captioned(self, split: str) -> WorldCorpus:
        """The pairs of a split."""
        num_rows, overlaps = self._clean() if split == "clean" else (getattr(self, split), False)
        split = "suspect" if overlaps else split
        return WorldCorpus(world=self.world, split=split, num_rows=num_rows)

    def corpus(self, split: str) -> CorpusSpec:
        """What a split's stages read."""
        return self.captioned(split)

    @property
    def classes(self) -> Sequence[str]:
        return CLASSES

    @property
    def templates(self) -> Sequence[str]:
        return TEMPLATES


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledWorldData(WorldData):
    """The same pictures, each with the name of its class for a caption."""

    def corpus(self, split: str) -> CorpusSpec:
        return LabelledWorld(of=self.captioned(split))

    @property
    def templates(self) -> Sequence[str]:
        return LABEL_TEMPLATES


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesData:
    """A labelled set of pictures on disk: its splits by name."""

    splits: Mapping[str, LabelledFiles]

    @property
    def size(self) -> int:
        return self.splits["suspect"].size

    @property
    def suspect(self) -> int:
        return self.rows("suspect")

    @property
    def public(self) -> int:
        return self.rows("public")

    def rows(self, split: str) -> int:
        return self.splits[split].num_rows if split in self.splits else 0

    def corpus(self, split: str) -> CorpusSpec:
        return self.splits[split]

    @property
    def classes(self) -> Sequence[str]:
        return self.splits["suspect"].classes

    @property
    def templates(self) -> Sequence[str]:
        return LABEL_TEMPLATES


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusData:
    """Ingested pairs in disjoint splits, and a labelled set that victims are judged by."""

    splits: Mapping[str, IngestedPairs | EvaluationSet]

    @property
    def size(self) -> int:
        return self._report.size

    @property
    def suspect(self) -> int:
        return self.rows("suspect")

    @property
    def public(self) -> int:
        return self.rows("public")

    def rows(self, split: str) -> int:
        return self.splits[split].num_rows if split in self.splits else 0

    def corpus(self, split: str) -> CorpusSpec:
        return self.splits[split]

    @property
    def _report(self) -> EvaluationSet:
        report = self.splits["report"]
        assert isinstance(report, EvaluationSet)
        return report

    @property
    def classes(self) -> Sequence[str]:
        return self._report.classes

    @property
    def templates(self) -> Sequence[str]:
        return self._report.templates


Data = WorldData | FilesData | CorpusData


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What a victim must show: ASR as a share; its lift over the clean victim and the accuracy
    lost, which are differences of shares."""

    asr: float
    lift: float
    clean_loss: float

    def __post_init__(self) -> None:
        if not 0 <= self.asr <= 1:
            raise ValueError(f"asr is a share in 0..1, got {self.asr}")
        for name in ("lift", "clean_loss"):
            if not -1 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a difference in -1..1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """What a victim must show whose attack stamps nothing: ``low`` bounds the Wilson interval of
    its success from below, ``clean`` the success on the clean victim from above."""

    low: float
    clean: float
    clean_loss: float

    def __post_init__(self) -> None:
        for name in ("low", "clean", "clean_loss"):
            if not -1 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share in 0..1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """When a victim counts as attacked. ``rate`` is where it is judged; None, the largest of its
    attack.

    ``init_loss`` is the clean accuracy a victim may lose against the weights it started from,
    ``reference`` the accuracy that these must have before any victim is trained.
    """

    rate: str | None = None
    reference: float | None = field(default=None, metadata=LATER)
    strong: Thresholds = Thresholds(asr=0.90, lift=0.80, clean_loss=0.02)
    medium: Thresholds = Thresholds(asr=0.80, lift=0.70, clean_loss=0.02)
    weak: Thresholds = Thresholds(asr=0.50, lift=0.45, clean_loss=0.02)
    targeted: Planted = Planted(low=0.30, clean=0.0, clean_loss=0.02)
    # A clean model, too, ranks some picture first: twice the share of one class among twenty.
    text: Planted = Planted(low=0.30, clean=0.10, clean_loss=0.02)
    inert_lift: float = 0.20
    init_loss: float = 0.03

    def __post_init__(self) -> None:
        if self.reference is not None and not 0 <= self.reference <= 1:
            raise ValueError(f"reference is a share in 0..1, got {self.reference}")
        for name in ("inert_lift", "init_loss"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share in 0..1, got {getattr(self, name)}")

    def thresholds(self, group: GateGroup) -> Thresholds | Planted:
        by_group: dict[GateGroup, Thresholds | Planted] = {
            GateGroup.STRONG: self.strong,
            GateGroup.MEDIUM: self.medium,
            GateGroup.WEAK: self.weak,
            GateGroup.TARGETED: self.targeted,
            GateGroup.TEXT: self.text,
        }
        return by_group[group]


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherSet:
    """A further set that accuracy is measured on, and what a linear probe is trained on there."""

    report: EvaluationSet
    probe: EvaluationSet | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """Evaluation sets of the board, the k of its top-k metrics, and what is measured besides:
    ``retrieval`` between pictures and captions (of the board's sets, or of sets of its own), a
    linear ``probe`` trained on clean pairs, accuracy on ``others``, and ``exhibits`` to look at,
    which are no numbers of the board."""

    sets: tuple[Literal["report", "shifted"], ...] = ("report", "shifted")
    ks: tuple[int, ...] = (1, 3, 5, 10)
    retrieval: bool | tuple[RetrievalSet, ...] = False
    probe: bool = False
    exhibits: bool | Exhibits = field(default=False, metadata={"keyed": False})
    # Named in the grid's identity where there are any: those without keep theirs.
    others: tuple[OtherSet, ...] = field(default=(), metadata={"keyed": False})

    @property
    def retrieval_sets(self) -> tuple[RetrievalSet, ...]:
        return () if isinstance(self.retrieval, bool) else self.retrieval

    def __post_init__(self) -> None:
        if self.exhibits is True:
            object.__setattr__(self, "exhibits", Exhibits())  # as it is written otherwise
        _distinct("sets", self.sets)
        _distinct("ks", self.ks)
        names = [*(each.dataset for each in self.retrieval_sets)]
        names += [other.report.dataset for other in self.others]
        if names:
            _distinct("evaluate: sets", names)
        if min(self.ks) < 1 or 1 not in self.ks:
            raise ValueError(f"ks are positive and hold 1, which the gate reads; got {self.ks}")

    @property
    def shown(self) -> Exhibits | None:
        """What measurements of the board keep to be looked at."""
        return self.exhibits if isinstance(self.exhibits, Exhibits) else None


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


def _distinct(name: str, values: Sequence[Any]) -> None:
    if not values:
        raise ValueError(f"{name} is empty")
    if len(set(values)) < len(values):
        raise ValueError(f"{name} holds a value twice: {', '.join(map(str, values))}")
