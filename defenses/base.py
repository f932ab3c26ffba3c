"""What a defense is: declared needs, and a plan written with the lab's primitives.

A defense is a frozen dataclass of its hyperparameters. It is handed a `Case`, which raises on
anything the defense has not declared, and hands back a `Defended`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from importlib import import_module
from typing import Any, ClassVar, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from defenses import DEFENSES
from victims.errors import Forbidden, UsageError, unknown
from victims.lab import DataRef, Lab, ModelRef
from victims.models import Clip, Encoder
from victims.recipe import Recipe
from victims.tracks import Track as Track
from victims.work import Work, fitted


class Phase(StrEnum):
    """When a defense acts; controls are shown beside the defenses and never ranked with them."""

    PRETRAINING = "pretraining"
    FILTERING = "filtering"
    FINETUNING = "finetuning"
    INFERENCE = "inference"
    CONTROL = "control"


class Need(StrEnum):
    """What a defense may be given. ``start`` is where the victim's own training began: the public
    reference model in regime F, random weights in regime S. ``truth`` is for controls alone."""

    SUSPECT_DATA = "suspect_data"
    VICTIM = "victim"
    CLEAN_DATA = "clean_data"
    REFERENCE = "reference"
    START = "start"
    TRUTH = "truth"


class Fidelity(StrEnum):
    """How far the code can claim to be the paper's method; a column of the board."""

    EXACT = "exact"
    READING = "reading"
    ADAPTED = "adapted"


class Regime(StrEnum):
    """F fine-tunes a public model on the suspect data, S trains from scratch on it."""

    F = "F"
    S = "S"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipes:
    """The grid's two recipes, as this cell uses them (seeds included)."""

    victim: Recipe
    repair: Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a plan knows of the data before there are any: rows of each, and the classes."""

    clean: int
    suspect: int
    classes: int


class Case:
    """What the defender is given. Asking for something undeclared raises.

    Each need is a function closed over its value, so nothing undeclared hangs on this object.
    """

    __slots__ = ("_grants", "_owner", "_training", "granted")

    def __init__(
        self,
        owner: str,
        grants: Mapping[Need, Callable[[], Any]],
        training: tuple[Recipes | None, int] | None,
    ) -> None:
        self._owner, self._grants, self._training = owner, dict(grants), training
        self.granted = frozenset(grants)

    @property
    def recipes(self) -> Recipes:
        """How to train, for a defense that was given something to train on."""
        recipes = self._trained()[0]
        if recipes is None:
            raise Forbidden(
                f"{self._owner} asked for the recipes, and says of itself that it does not train by"
                " them: change `fits_by_recipe`."
            )
        return recipes

    @property
    def seed(self) -> int:
        """The seed of whatever a defense draws."""
        return self._trained()[1]

    def _trained(self) -> tuple[Recipes | None, int]:
        if self._training is None:
            raise Forbidden(
                f"{self._owner} asked for the recipes or the seed, and its `needs` give it nothing"
                " to train: declare Need.START, or Need.VICTIM with clean or suspect data."
            )
        return self._training

    def lend(self, other: Defense, clean_data: DataRef) -> Case:
        """The case for another defense, with data that this one judged clean as its clean data.

        It gets what it declares, and nothing that this case does not hold.
        """
        grants = {n: give for n, give in self._grants.items() if n in other.needed()}
        grants[Need.CLEAN_DATA] = lambda: clean_data
        return Case(f"{other.name}, employed by {self._owner}", grants, self._training)

    def _ask(self, need: Need) -> Any:
        if need not in self._grants:
            _refuse(self._owner, need)
        return self._grants[need]()

    @property
    def suspect_data(self) -> DataRef:
        data: DataRef = self._ask(Need.SUSPECT_DATA)
        return data

    @property
    def clean_data(self) -> DataRef:
        data: DataRef = self._ask(Need.CLEAN_DATA)
        return data

    @property
    def victim(self) -> ModelRef:
        model: ModelRef = self._ask(Need.VICTIM)
        return model

    @property
    def reference(self) -> ModelRef:
        model: ModelRef = self._ask(Need.REFERENCE)
        return model

    @property
    def start(self) -> ModelRef | None:
        """Where the victim's training began: the reference, or None for random weights."""
        model: ModelRef | None = self._ask(Need.START)
        return model

    @property
    def truth(self) -> Truth:
        truth: Truth = self._ask(Need.TRUTH)
        return truth


def _refuse(owner: str, need: Need) -> NoReturn:
    raise Forbidden(
        f"{owner} asked for {need}, which it does not declare. Add Need.{need.name} to its `needs`:"
        " the board shows the needs, and a method is compared with others of the same needs."
    )


@dataclass(frozen=True, slots=True)
class Truth:
    """Which rows are poisoned, and the data as it was before. Controls alone receive it."""

    poisoned: npt.NDArray[np.bool_]
    restored: DataRef


class Guard(Protocol):
    """An inference-time wrapper: a frozen dataclass that turns a model into another encoder."""

    def wrap(self, model: Clip) -> Encoder: ...


@dataclass(frozen=True, slots=True)
class Defended:
    """What a defense hands back.

    ``flagged`` marks the rows it held to be poisoned, if it judged; ``suspicion`` ranks all rows,
    higher is more suspicious. ``sets`` and ``scores`` are the same for its intermediate findings,
    by name: they are measured beside, a score among the rows that have one (not NaN). ``notes`` are
    numbers about the run for the cell's row. ``triggered_alike`` are the victim's features of what
    the defense made to look like triggered pictures, if it did: how near they come to the target is
    measured.
    """

    model: ModelRef
    guard: Guard | None = None
    flagged: npt.NDArray[np.bool_] | None = None
    suspicion: npt.NDArray[np.float32] | None = None
    sets: Mapping[str, npt.NDArray[np.bool_]] = field(default_factory=dict)
    scores: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    notes: Mapping[str, float] = field(default_factory=dict)
    triggered_alike: npt.NDArray[np.float32] | None = None


def require(defense: Defense, **allowed: tuple[bool, str]) -> None:
    """Raise for the first field that does not hold; each is given with what is allowed."""
    for field_name, (holds, words) in allowed.items():
        if not holds:
            found = getattr(defense, field_name)
            raise UsageError(f"{defense.name}: {field_name} must be {words}, got {found}")


def rows_in(share: float, num_rows: int) -> int:
    """Floor of the product of the decimals as written: 0.29 of 100 rows is 29, in floats 28."""
    return int(Decimal(str(share)) * num_rows)


def trained_without(lab: Lab, case: Case, flagged: npt.NDArray[np.bool_]) -> ModelRef:
    """The victim's own training repeated on the suspect rows that are not flagged; without a
    flagged row it is the victim."""
    kept = lab.subset(case.suspect_data, np.flatnonzero(~flagged))
    recipe = case.recipes.victim
    return lab.train(lab.plain(recipe), kept, recipe, init=case.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """The setting along which a defense trades accuracy against attack success: a field of its own
    or ``recipe.FIELD``, and the values of its curve."""

    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Between:
    """A range of a search space; of whole numbers where both ends are whole."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OneOf:
    """The choices of a search space."""

    values: tuple[Any, ...]


Space = Mapping[str, Between | OneOf]
LR_KNOB = Knob(name="recipe.lr", values=(1e-6, 3e-6, 4.5e-6, 1e-5, 2e-5))
LR = Between(low=1e-6, high=1e-4, log=True)
EPOCHS = Between(low=1, high=20)


class Defense(Protocol):
    """A frozen dataclass that derives from this class.

    ``fidelity`` is one word, or a mapping by regime. ``needs`` are those of the defaults; where
    they depend on a field, `needed` tells them. What is no control declares its ``knob`` and, for
    campaigns, the ``space`` in which its settings are searched, named as the knob is.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    paper: ClassVar[str]
    phase: ClassVar[Phase]
    tracks: ClassVar[frozenset[Track]] = frozenset({Track.MULTIMODAL})
    needs: ClassVar[frozenset[Need]]
    fidelity: ClassVar[Any]
    variants: ClassVar[Mapping[str, Mapping[str, Any]]]
    knob: ClassVar[Knob | None] = None
    space: ClassVar[Space] = {}

    def needed(self) -> frozenset[Need]:
        """What this configuration is to be given."""
        return self.needs

    def defined_on(self) -> frozenset[Track]:
        """The tracks on which this configuration has a meaning."""
        return self.tracks

    def fits_by_recipe(self) -> bool:
        """Whether it trains by a recipe of the grid. Else it is handed none, and its own fields say
        all about its fits."""
        return True

    def claims(self) -> Any:
        """The fidelity of this configuration, as `fidelity` declares it."""
        return self.fidelity

    def replaces_training(self) -> bool:
        """Whether it trains with the victim's recipe, from where the victim began."""
        return Need.START in self.needed() and self.phase != Phase.FINETUNING

    def check(self) -> None:
        """Raise `UsageError` where the fields cannot be meant; asked when a grid file is read."""
        return None

    def acts(self) -> Phase:
        """The phase of this configuration, where a field decides it."""
        return self.phase

    def caution(self, rate: float, num_rows: int) -> str:
        """What a user should know before running it on this much suspect data of that poison rate:
        printed, never acted on."""
        return ""

    def costs(self, recipes: Recipes, sizes: Sizes) -> Work:
        """What it sends through the victim's network, or its like, as far as that is known before:
        an upper bound where it may stop early. The default is one plain fit of all its data."""
        needs = self.needed()
        if self.replaces_training():
            return fitted(recipes.victim, sizes.suspect)
        if Need.CLEAN_DATA in needs and needs & {Need.VICTIM, Need.START}:
            return fitted(recipes.repair, sizes.clean)
        if Need.SUSPECT_DATA in needs and needs & {Need.VICTIM, Need.START}:
            return fitted(recipes.repair, sizes.suspect)
        return Work()

    def employs(self) -> Sequence[Defense]:
        """Other defenses that this configuration hands its findings to: part of its identity."""
        return ()

    def apply(self, lab: Lab, case: Case) -> Defended: ...


def clean_data_defense(
    name: str, lent: frozenset[Need], where: str, track: Track = Track.MULTIMODAL
) -> Defense:
    """The defense of that name, to be handed data that were judged clean: with its defaults, or as
    ``NAME:VARIANT``.

    Raises `UsageError` unless it is defined on the track, takes clean data, and nothing else but
    what is ``lent``.
    """
    name, _, variant = name.partition(":")
    if name not in DEFENSES:
        raise unknown("defense", name, DEFENSES, where)
    module, attribute = DEFENSES[name].split(":")
    cls = getattr(import_module(module), attribute)
    if variant and variant not in cls.variants:
        raise unknown(f"variant of {name}", variant, cls.variants or ("it has none",), where)
    other: Defense = cls(**cls.variants[variant] if variant else {})
    if track not in other.defined_on():
        shown = ", ".join(sorted(other.defined_on()))
        raise UsageError(f"{where}: {name} is defined on track {shown}, and this is {track}")
    extra = other.needed() - lent - {Need.CLEAN_DATA}
    if Need.CLEAN_DATA not in other.needed() or extra:
        shown = ", ".join(need.value for need in Need if need in other.needed())
        allowed = ", ".join(need.value for need in Need if need in lent)
        raise UsageError(
            f"{where}: {name} needs {shown}; it cannot be handed data that were judged clean. Name"
            f" a defense that needs clean_data and besides at most {allowed}."
        )
    return other


def check_truth(defense: Defense | type[Defense]) -> None:
    """Raise where something other than a control declares the truth among its needs."""
    needs = defense.needs if isinstance(defense, type) else defense.needed()
    if Need.TRUTH in needs and defense.phase != Phase.CONTROL:
        raise Forbidden(
            f"{defense.name} is a {defense.phase} defense and declares Need.TRUTH, which no"
            " defender has. Remove it from its `needs`; only controls (phase control) may hold it."
        )


def resolved_needs(defense: Defense | type[Defense], regime: Regime) -> list[str]:
    """The needs as the board shows them: in regime F the start weights are the reference."""
    start = {Need.START: Need.REFERENCE} if regime is Regime.F else {}
    needs = defense.needs if isinstance(defense, type) else defense.needed()
    shown = {start.get(need, need) for need in needs}
    if regime is Regime.S:
        shown.discard(Need.START)
    return [need.value for need in Need if need in shown]


def fidelity_in(defense: Defense | type[Defense], regime: Regime) -> Fidelity:
    declared = defense.fidelity if isinstance(defense, type) else defense.claims()
    return Fidelity(declared if isinstance(declared, str) else declared[regime])
