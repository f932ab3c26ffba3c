"""What an attack is: a trigger, a choice of rows to poison, and new captions for them.

One shared `poison` fixes what a count means and keeps the truth apart from the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from enum import StrEnum
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from victims.corpora import Corpus, Edits, Rows, Show, View
from victims.draws import numpy_rng
from victims.errors import GridError, UsageError
from victims.keys import Key, content_key
from victims.lab import Lab, ModelRef
from victims.targeting import rows_saying
from victims.tracks import Track as Track
from victims.triggers import Trigger
from victims.work import Work


class GateGroup(StrEnum):
    """Which thresholds of the validity gate a victim of this attack must pass."""

    STRONG = "strong"  # BadNet, Blended, BadCLIP, TrojVQA
    MEDIUM = "medium"  # SIG, WaNet, structured, frequency, adaptive
    WEAK = "weak"  # label-consistent, SSBA, clean-label, clean-image
    TARGETED = "targeted"  # targeted poisoning
    TEXT = "text"  # text-side attacks


class Aim(StrEnum):
    """What the attacker wants, which decides what success is measured on."""

    PIXELS = "pixels"  # any picture, once stamped, reads as the target
    DUAL = "dual"  # a stamped picture does, if the prompts are marked too
    TARGETS = "targets"  # some chosen pictures read as chosen classes; nothing is stamped
    QUERIES = "queries"  # texts about something else retrieve pictures of the target


STAMPING = (Aim.PIXELS, Aim.DUAL)


class Role(StrEnum):
    """What a row is in truth. Only measuring and the controls read it.

    A cover row was touched and still means what it shows.
    """

    CLEAN = "clean"
    POISON = "poison"
    COVER = "cover"


ROLES = tuple(Role)


@dataclass(frozen=True, slots=True)
class Goal:
    """The attacker's aim: triggered pictures should read as class ``target``."""

    target: int
    label: str
    templates: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """What the attacker holds: the pool it poisons, its goal, and a seed of its own.

    ``surrogate`` is the public model, for attacks that declare their need of one; ``crafted`` is
    the trigger, once there is one.
    """

    corpus: Corpus
    goal: Goal
    seed: int
    surrogate: ModelRef | None = None
    crafted: Trigger | None = None

    def public_model(self) -> ModelRef:
        if self.surrogate is None:
            raise GridError("an attack that reads the surrogate declares needs_surrogate = True")
        return self.surrogate


class Cover(NamedTuple):
    """Cover rows in rising order, what they are captioned, and which show `stamp_cover`."""

    rows: Rows
    captions: Sequence[str]
    stamped: npt.NDArray[np.bool_]


class Attack(Protocol):
    """A frozen dataclass that derives from this class; `trigger` is the class of its triggers.

    Only `craft` must be written; the rest has the defaults of a dirty-label attack. Rows are
    drawn, captions written and pictures swapped with the generators that are handed over.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    paper: ClassVar[str]
    tracks: ClassVar[frozenset[Track]]
    group: ClassVar[GateGroup]
    trigger: ClassVar[type[Any]]
    variants: ClassVar[Mapping[str, Mapping[str, Any]]]
    aim: ClassVar[Aim] = Aim.PIXELS
    # Whether crafting or choosing reads the public model, which is then part of the identity.
    needs_surrogate: ClassVar[bool] = False
    # Whether the poisoned pairs are added to the corpus instead of taking rows' places.
    appends: ClassVar[bool] = False
    # Whether no training picture is stamped: labels alone change, and tests show the trigger.
    clean_image: ClassVar[bool] = False
    # Whether a poisoned row may get any label but its own instead of the target's.
    relabels_freely: ClassVar[bool] = False
    # Values under which crafting takes a second: what `grid mock` uses.
    quick: ClassVar[Mapping[str, Any]] = {}

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Trigger:
        """The trigger for pictures of ``size`` pixels a side."""
        ...

    def costs(self, num_rows: int, num_classes: int) -> Work | None:
        """What crafting on a pool of so many rows sends through the surrogate, or a network like
        the victim's, as far as that is known before; None where it trains networks of another kind.
        The default is nothing: most triggers are drawn."""
        return Work()

    def check(self, size: int) -> None:
        """Raise `UsageError` where the fields cannot be meant; asked when a grid file is read."""
        return None

    @property
    def clean_label(self) -> bool:
        """Whether it poisons rows of the target class alone, and keeps their labels."""
        return False

    @property
    def unit(self) -> int:
        """Poisoned rows come in multiples of this number."""
        return 1

    def choose(self, held: Knowledge, count: int, rng: np.random.Generator) -> Rows:
        """The rows that are poisoned (or whose captions the added pairs take up)."""
        return pick(np.arange(len(held.corpus)), count, rng, self.name)

    def recaption(self, caption: str, held: Knowledge, rng: np.random.Generator) -> str:
        """What a poisoned row's caption becomes."""
        return template_caption(held.goal, rng)

    def recaptions(self, held: Knowledge, rows: Rows, rng: np.random.Generator) -> Sequence[str]:
        """The new captions of all poisoned rows, where they depend on more than the old ones."""
        return [self.recaption(held.corpus.captions[row], held, rng) for row in rows]

    def pictures(self, held: Knowledge, rows: Rows, rng: np.random.Generator) -> Rows:
        """The corpus row whose picture each poisoned row shows."""
        return rows

    def removed(self, held: Knowledge) -> Rows:
        """Corpus rows that the attacker takes out."""
        return np.zeros(0, dtype=np.int64)

    def cover(self, held: Knowledge, count: int, free: Rows, rng: np.random.Generator) -> Cover:
        """Cover rows for ``count`` poisoned ones, out of the rows that are still ``free``."""
        return Cover(np.zeros(0, dtype=np.int64), (), np.zeros(0, dtype=bool))


def trigger_key(
    attack: Attack,
    goal: Goal,
    seed: int,
    size: int,
    arch: str = "",
    inputs: Sequence[str] = (),
    classes: str = "",
) -> Key:
    """Key of a crafted trigger. ``inputs`` are the artefacts that crafting may read, ``classes``
    the digest of the names of classes that none of them holds."""
    about = {"attack": attack, "goal": goal, "seed": seed, "size": size, "arch": arch}
    if classes:
        about["classes"] = classes
    return content_key("trigger", about, inputs)


def poisoned_key(
    attack: Attack, goal: Goal, count: int, seed: int, corpus: str, trigger: str
) -> Key:
    """Key of the poisoned data; with nothing poisoned, the corpus's own.

    Of a corpus's kind either way, so that a defender cannot read from a handle which it holds.
    """
    if count == 0:
        return Key(corpus)
    params = {"attack": attack, "goal": goal, "count": count, "seed": seed}
    return content_key("corpus", params, [corpus, trigger])


def poison_count(rate: str, num_rows: int) -> int:
    """n = floor(rate * N + 1/2), in exact decimal arithmetic on the rate as it was written."""
    value = Decimal(rate)
    if not 0 <= value <= 1:
        raise UsageError(f"rates: a poison rate lies in 0..1, got {rate}")
    count = int((value * num_rows).to_integral_value(ROUND_HALF_UP))
    if value > 0 and count == 0:
        raise UsageError(
            f"rates: {rate} of {num_rows} rows is less than one row. Give a rate of at least"
            f" {Decimal(1) / num_rows:.2g}, or a larger corpus."
        )
    return count


@dataclass(frozen=True, slots=True)
class Overlay:
    """What an attack does to a corpus of ``num_rows`` pairs, row by row.

    A row's id is its number in the corpus; the pairs that are added follow from there. ``places``
    are the positions of added pairs in the data, ``removed`` the ids that are no longer in it.
    """

    edits: Edits
    num_rows: int
    places: Rows
    removed: Rows

    def __len__(self) -> int:
        return self.num_rows + len(self.places) - len(self.removed)

    def order(self) -> Rows:
        """The row id at every position of the data."""
        order = np.empty(len(self), dtype=np.int64)
        is_added = np.zeros(len(self), dtype=bool)
        is_added[self.places] = True
        order[self.places] = self.num_rows + np.arange(len(self.places))
        kept = np.ones(self.num_rows, dtype=bool)
        kept[self.removed] = False
        order[~is_added] = np.flatnonzero(kept)
        return order


@dataclass(frozen=True, slots=True)
class Poison:
    """The edits and, apart from them, the role of each edited row by its number in `ROLES`."""

    data: Overlay
    roles: npt.NDArray[np.int8]

    def of(self, role: Role) -> npt.NDArray[np.intp]:
        """Which of the edits have a role."""
        return np.flatnonzero(self.roles == ROLES.index(role))

    def truth(self) -> npt.NDArray[np.int8]:
        """Per position of the data, the number of its role."""
        by_row = np.zeros(self.data.num_rows + len(self.data.places), dtype=np.int8)
        by_row[self.data.edits.rows] = self.roles
        return by_row[self.data.order()]


def poison(attack: Attack, held: Knowledge, count: int) -> Poison:
    """Draw ``count`` rows, their captions and pictures. Nothing is stamped until rows are read."""
    num_rows = len(held.corpus)
    if count % attack.unit:
        raise UsageError(
            f"{attack.name}: {count} rows do not divide among {attack.unit} targets; give a count"
            f" such as {max(1, round(count / attack.unit)) * attack.unit}"
        )
    rows = np.asarray(attack.choose(held, count, numpy_rng(held.seed, "select", attack.name)))
    rows = rows.astype(np.int64)
    if len(rows) != count or len(np.unique(rows)) != count:
        raise GridError(
            f"{attack.name}: {count} rows were to be poisoned, its choice gave {len(rows)}"
            f" ({len(np.unique(rows))} distinct)"
        )
    if not attack.appends:
        rows.sort()
    words = numpy_rng(held.seed, "caption", attack.name)
    captions = attack.recaptions(held, rows, words)
    images = attack.pictures(held, rows, numpy_rng(held.seed, "picture", attack.name))
    show = Show.STAMPED if attack.aim in STAMPING else Show.PLAIN
    poisoned = _Touched(rows, captions, images, np.full(count, show, dtype=np.int8))
    places, removed = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    if attack.appends and count:
        removed = np.unique(attack.removed(held))
        rng = numpy_rng(held.seed, "place", attack.name)
        length = num_rows - len(removed) + count
        places = rng.permutation(np.sort(rng.choice(length, count, replace=False)))
        poisoned = poisoned._replace(rows=num_rows + np.arange(count))
    covering = _cover(attack, held, count, rows if not attack.appends else removed)
    both = [poisoned, covering]
    ids = np.concatenate([part.rows for part in both])
    rising = np.argsort(ids)
    every_caption = [caption for part in both for caption in part.captions]
    edits = Edits(
        rows=ids[rising],
        captions=[every_caption[index] for index in rising.tolist()],
        images=np.concatenate([part.images for part in both])[rising].astype(np.int64),
        shows=np.concatenate([part.shows for part in both])[rising],
    )
    named = [ROLES.index(Role.POISON)] * count + [ROLES.index(Role.COVER)] * len(covering.rows)
    roles = np.asarray(named, dtype=np.int8)[rising]
    return Poison(Overlay(edits, num_rows, places.astype(np.int64), removed), roles)


class _Touched(NamedTuple):
    rows: Rows
    captions: Sequence[str]
    images: Rows
    shows: npt.NDArray[np.int8]


def _cover(attack: Attack, held: Knowledge, count: int, taken: Rows) -> _Touched:
    is_free = np.ones(len(held.corpus), dtype=bool)
    is_free[taken] = False
    free = np.flatnonzero(is_free)
    found = attack.cover(held, count, free, numpy_rng(held.seed, "cover", attack.name))
    rows = np.asarray(found.rows, dtype=np.int64)
    if not is_free[rows].all() or len(np.unique(rows)) != len(rows):
        raise GridError(f"{attack.name}: a cover row is poisoned, too, or named twice")
    if not len(rows) == len(found.captions) == len(found.stamped):
        raise GridError(f"{attack.name}: cover rows, captions and stamps differ in number")
    shows = np.where(found.stamped, Show.COVER, Show.PLAIN).astype(np.int8)
    return _Touched(rows, found.captions, rows, shows)


def poisoned_view(key: Key, corpus: Corpus, data: Overlay, trigger: Trigger) -> View:
    """The corpus as the victim sees it, edited where poisoned."""
    stamps = {Show.STAMPED: trigger.stamp_train, Show.COVER: trigger.stamp_cover}
    return View(key, corpus, data.order(), data.edits, stamps)


def pick(candidates: Rows, count: int, rng: np.random.Generator, what: str) -> Rows:
    """``count`` candidates without replacement, sorted; too few raises, with both numbers."""
    if count > len(candidates):
        raise UsageError(
            f"{what}: {count} rows are to be poisoned but only {len(candidates)} qualify."
            " Lower the rate."
        )
    chosen: Rows = np.sort(rng.choice(candidates, count, replace=False))
    return chosen


def stamped_cover(
    who: str, held: Knowledge, ratio: float, count: int, free: Rows, rng: np.random.Generator
) -> Cover:
    """Cover rows for ``count`` poisoned ones, as many as ``ratio`` says, drawn from the free."""
    return kept_captions(held, pick(free, cover_count(ratio, count), rng, f"{who}, cover rows"))


def kept_captions(held: Knowledge, rows: Rows) -> Cover:
    """Cover rows: stamped, captions as they were."""
    captions = [held.corpus.captions[row] for row in rows]
    return Cover(rows, captions, np.ones(len(rows), dtype=bool))


def cover_count(ratio: float, count: int) -> int:
    """c = floor(ratio * n + 1/2), in exact decimal arithmetic on the ratio as it was written."""
    return int((Decimal(str(ratio)) * count).to_integral_value(ROUND_HALF_UP))


def template_caption(goal: Goal, rng: np.random.Generator) -> str:
    """A prompt template with the target's name, drawn uniformly."""
    return goal.templates[int(rng.integers(len(goal.templates)))].format(goal.label)


def natural_caption(who: str, held: Knowledge, rng: np.random.Generator) -> str:
    """A caption of the corpus that names the target, drawn uniformly."""
    candidates = rows_naming(held.corpus, held.goal.label)
    if not len(candidates):
        raise UsageError(
            f"{who}: caption: natural needs a caption that names {held.goal.label!r}; the"
            " corpus has none"
        )
    return held.corpus.captions[int(rng.choice(candidates))]


def rows_naming(corpus: Corpus, label: str) -> Rows:
    """Rows whose caption holds a name as a whole word (or words), in any case, singular or regular
    plural; punctuation may stand beside it."""
    return rows_saying(corpus, label, substring=False)
