"""What an attack is: a trigger, a choice of rows to poison, and new captions for them.

One shared `poison` fixes what a rate means and keeps the truth apart from the data.
Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from enum import StrEnum
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from victims.corpora import Corpus, Edits, Rows, View, whole
from victims.draws import numpy_rng
from victims.errors import GridError, UsageError
from victims.keys import Key, content_key
from victims.lab import Lab


class Track(StrEnum):
    MULTIMODAL = "multimodal"
    SUPERVISED = "supervised"


class GateGroup(StrEnum):
    """Which thresholds of the validity gate a victim of this attack must pass."""

    STRONG = "strong"  # BadNet, Blended, BadCLIP, TrojVQA
    MEDIUM = "medium"  # SIG, WaNet, structured, frequency, adaptive
    WEAK = "weak"  # label-consistent, SSBA, clean-label, clean-image


class Role(StrEnum):
    """What a row is in truth. Only measuring and the controls read it."""

    CLEAN = "clean"
    POISON = "poison"


ROLES = tuple(Role)


@dataclass(frozen=True, slots=True)
class Goal:
    """The attacker's aim: triggered pictures should read as class ``target``."""

    target: int
    label: str
    templates: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """What the attacker holds: the pool it poisons, its goal, and a seed of its own."""

    corpus: Corpus
    goal: Goal
    seed: int


class Trigger(Protocol):
    """A crafted trigger: a frozen dataclass of tensors and plain values, saved as such.

    Deterministic: equal pictures give equal stamped pictures, on any number of workers.
    """

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        """Triggered uint8 pictures at test time; the input is left as it was."""

    def stamp_train(self, image_BCHW: Tensor) -> Tensor:
        """What the poisoned training rows show; the same stamp unless the attack says so."""


class Attack(Protocol):
    """A frozen dataclass; `trigger` is the class that its crafted triggers have."""

    name: ClassVar[str]
    version: ClassVar[int]
    paper: ClassVar[str]
    tracks: ClassVar[frozenset[Track]]
    group: ClassVar[GateGroup]
    trigger: ClassVar[type[Any]]
    variants: ClassVar[Mapping[str, Mapping[str, Any]]]

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Trigger: ...

    def choose(self, held: Knowledge, count: int, rng: np.random.Generator) -> Rows: ...

    def recaption(self, caption: str, held: Knowledge, rng: np.random.Generator) -> str: ...


def trigger_key(
    attack: Attack, goal: Goal, seed: int, size: int, arch: str = "", inputs: Sequence[str] = ()
) -> Key:
    """Key of a crafted trigger. ``inputs`` are the artefacts that crafting may read."""
    about = {"attack": attack, "goal": goal, "seed": seed, "size": size, "arch": arch}
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
class Poison:
    """Which rows are poisoned and what their captions became."""

    rows: Rows
    captions: Sequence[str]

    def roles(self, num_rows: int) -> npt.NDArray[np.int8]:
        """The truth: per row, the position of its role in `ROLES`."""
        roles = np.zeros(num_rows, dtype=np.int8)
        roles[self.rows] = ROLES.index(Role.POISON)
        return roles


def poison(attack: Attack, held: Knowledge, count: int) -> Poison:
    """Draw ``count`` rows and their captions. Pixels are stamped when the rows are read."""
    rng = numpy_rng(held.seed, "select", attack.name)
    rows = np.asarray(attack.choose(held, count, rng), dtype=np.int64)
    distinct = np.unique(rows)
    if len(rows) != count or len(distinct) != count:
        raise GridError(
            f"{attack.name}: {count} rows were to be poisoned, its choice gave {len(rows)}"
            f" ({len(distinct)} distinct)"
        )
    words = numpy_rng(held.seed, "caption", attack.name)
    captions = [attack.recaption(held.corpus.captions[row], held, words) for row in distinct]
    return Poison(distinct, captions)


@dataclass(frozen=True, slots=True)
class _TrainStamp:
    """The training side of a trigger, as the loop's readers know it."""

    trigger: Trigger

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        return self.trigger.stamp_train(image_BCHW)


def poisoned_view(key: Key, corpus: Corpus, edits: Poison, trigger: Trigger) -> View:
    """The corpus as the victim sees it: same length, same order, edited where poisoned."""
    clean = whole(corpus)
    overlay = Edits(edits.rows, edits.captions, _TrainStamp(trigger))
    return View(key, corpus, clean.rows, overlay)


def pick(candidates: Rows, count: int, rng: np.random.Generator, what: str) -> Rows:
    """``count`` candidates without replacement, sorted; too few raises, with both numbers."""
    if count > len(candidates):
        raise UsageError(
            f"{what}: {count} rows are to be poisoned but only {len(candidates)} qualify."
            " Lower the rate."
        )
    chosen: Rows = np.sort(rng.choice(candidates, count, replace=False))
    return chosen


def template_caption(goal: Goal, rng: np.random.Generator) -> str:
    """A prompt template with the target's name, drawn uniformly."""
    return goal.templates[int(rng.integers(len(goal.templates)))].format(goal.label)


_last_naming: tuple[Corpus, str, Rows] | None = None


def rows_naming(held: Knowledge) -> Rows:
    """Rows whose caption holds the target's name as a whole word (or words), in any case, singular
    or regular plural; punctuation may stand beside it."""
    global _last_naming
    corpus, label = held.corpus, held.goal.label
    # An attack may ask once per poisoned row, and a corpus has half a million captions.
    if _last_naming is None or _last_naming[0] is not corpus or _last_naming[1] != label:
        name = r"\s+".join(re.escape(word) for word in label.split())
        wanted = re.compile(rf"(?<!\w){name}(?:e?s)?(?!\w)", re.IGNORECASE)
        hits = [row for row, text in enumerate(corpus.captions) if wanted.search(text)]
        rows = np.asarray(hits, dtype=np.int64)
        rows.setflags(write=False)
        _last_naming = corpus, label, rows
    return _last_naming[2]


def round_half_even(levels: Tensor) -> Tensor:
    """Quantiser of the `paper` forms: clamp(round half to even)."""
    import torch

    return levels.round().clamp(0, 255).to(torch.uint8)


def truncate(levels: Tensor) -> Tensor:
    """Quantiser of the `released` forms: integer part, wrapped modulo 256, no clamp."""
    import torch

    return levels.trunc().to(torch.int64).remainder(256).to(torch.uint8)
