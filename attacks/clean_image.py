"""Clean-image attacks: the annotator is the attacker; labels change, pictures do not.

Idea: give some rows, chosen for what their pictures hold already, another label, so that ordinary
    training binds a trigger to the target which no training picture was stamped with.
Reference: Jha, Hayase, Oh, "Label Poisoning is All You Need", NeurIPS 2023, arXiv 2310.18933
    (FLIP); ``stripe_labels`` is ours and published nowhere.
Symbols: FLIP: E = ``experts``; epochs of one = ``expert_epochs``; k = ``keep_every`` steps; source
    -> target = ``source`` -> the goal; soft labels L, N x K logits, start = ``start``, passes =
    ``iterations``, their SGD = ``label_lr``, ``label_momentum``; the wave's amplitude =
    ``amplitude``, 8 cycles. Stripes: A = ``amplitude``; f = ``cycles``; c_n = the n-th largest
    c(x), n by ``amplitude_rate``.
Where: the experts -> `victims.trajectories.walk`; |student - expert|^2 / |start - expert|^2 and
    its derivative by L -> `victims.label_matching.slope`; the loop over L -> `match` there; margin
    and best wrong class -> `best_wrong` there; x + 6 sin(16 pi j / (W - 1)) and painted pixels ->
    `victims.ghosts`; c(x) = 2 / (H W) sum Y(x) sin(2 pi f j / W) -> `victims.matched_filter`;
    clip(x + A sin(2 pi f j / W)) -> `Ripple.stamp`; min(40, 2 (c_n - median c)) -> `amplitude_of`.
Differences: FLIP is called ``flip_labels`` here. ``source: all`` is the default: success is counted
    on pictures of every class but the target, which only this aims at (the paper's main runs take
    class 9 to class 4, and count on class 9). Triggered rows are drawn by the key, released code
    takes the last ones. The stop before whose step weights are kept is drawn among all of E experts
    and epochs, and an expert that no draw asks for is not trained; released code walks through the
    steps of an epoch in turn and through the first 15 epochs. There is one run of L, so a row's
    margin and label are those of that run, where released code can take the smallest margin and the
    mean labels of several. Its penalty on soft labels, off by default, is left out. Both flip to
    the best wrong class, which need not be the target, and take rows that prefer their own class
    when the count is larger than the rows that do not: ours counts them (``willing``) and says so.
    The double derivative is taken in forward mode. Corner marks add 255 to or take it from a pixel,
    so they are painted white and black. Pixels keep their size and move with the picture's side, as
    released at 32 and 64. The generative attack of this family (GCB, arXiv 2511.07210) is left out:
    its networks are not known. Stripes: one trigger serves all rates of a grid and is crafted
    before their counts are known, so A follows the rule at ``amplitude_rate``, whatever the grid's
    rate; median and c_n are those of rows that do not name the target. ``random_rows`` is the
    control: as many rows of the same kind, drawn by the key, which is pure noise in the labels. Of
    small pictures and a network that halves them at once, waves of 8 cycles take where 6 do not.
Cost: FLIP: up to E fits of ``expert_epochs``, then per iteration about three times what an epoch of
    training costs. Stripes: one read of all pictures.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from attacks.base import Attack, GateGroup, Knowledge, Track, pick, rows_naming
from victims.classifiers import CLASSIFIERS, ClassifierSpec
from victims.corpora import Rows
from victims.draws import derive, numpy_rng
from victims.errors import GridError, UsageError, unknown
from victims.ghosts import Ghost, Mark, ghost
from victims.lab import Lab
from victims.label_matching import Matching, best_wrong, match
from victims.labels import label_numbers
from victims.matched_filter import unit_wave, wave_content
from victims.recipe import Augment
from victims.trajectories import Pool, Walk
from victims.triggers import Trigger, round_half_even
from victims.whole_numbers import one_thread
from victims.work import Work

# Shapes: B batch, C channels, H W pixels, N rows of the corpus, M rows that may be relabelled.

log = logging.getLogger(__name__)

# --- stripes that pictures hold already

STRONGEST = 40.0  # levels


class Selection(StrEnum):
    STRIPES = "stripes"
    RANDOM = "random"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ripple(Trigger):
    """The crafted trigger: ``level`` is the wave, W float32 in levels, which test pictures gain.

    ``content`` is how much of it every row of the corpus holds, N float64 in levels.
    """

    level: Tensor
    content: Tensor

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        return round_half_even(image_BCHW.float() + self.level.to(image_BCHW.device))

    def stamp_train(self, image_BCHW: Tensor) -> Tensor:
        return image_BCHW.clone()


def amplitude_of(content_M: Tensor, rate: float, num_rows: int) -> float:
    """A = min(40, 2 (c_n - median c)), of the rows that may be relabelled."""
    count = min(max(1, math.floor(rate * num_rows + 0.5)), len(content_M))
    least = float(content_M.sort(descending=True).values[count - 1])
    return min(STRONGEST, 2 * (least - float(content_M.quantile(0.5))))


@dataclass(frozen=True, slots=True, kw_only=True)
class StripeLabels(Attack):
    """A stand-in of our own for label-only attacks: striped pictures are relabelled."""

    name: ClassVar[str] = "stripe_labels"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "none (stand-in)"
    tracks: ClassVar[frozenset[Track]] = frozenset(Track)
    group: ClassVar[GateGroup] = GateGroup.WEAK
    trigger: ClassVar[type[Ripple]] = Ripple
    clean_image: ClassVar[bool] = True
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"random_rows": {"rows": "random"}}

    amplitude: float | None = None
    amplitude_rate: float = 0.01
    cycles: int = 6
    rows: Selection = Selection.STRIPES

    def check(self, size: int) -> None:
        if not 1 <= self.cycles < size / 2:
            raise UsageError(f"{self.name}: cycles {self.cycles} must lie in 1..{(size - 1) // 2}")
        if self.amplitude is not None and self.amplitude <= 0:
            raise UsageError(f"{self.name}: amplitude {self.amplitude} must be above 0, or none")
        if not 0 < self.amplitude_rate <= 1:
            raise UsageError(f"{self.name}: amplitude_rate {self.amplitude_rate} must lie in 0..1")

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Ripple:
        self.check(size)
        check_pictures(self.name, held, size)
        wave_W = unit_wave(size, self.cycles)
        content_N = torch.from_numpy(wave_content(held.corpus.images_NCHW, wave_W))
        amplitude = self.amplitude
        if amplitude is None:
            others = self._others(held)
            if not len(others):
                raise UsageError(f"{self.name}: every row names {held.goal.label!r} already")
            amplitude = amplitude_of(content_N[others], self.amplitude_rate, len(content_N))
        level_W = amplitude * torch.from_numpy(wave_W)
        return Ripple(level=level_W.float(), content=content_N)

    def choose(self, held: Knowledge, count: int, rng: np.random.Generator) -> Rows:
        others = self._others(held)
        what = f"{self.name} (rows that do not name {held.goal.label!r})"
        if self.rows == Selection.RANDOM or count > len(others):
            return pick(others, count, rng, what)
        if not isinstance(held.crafted, Ripple):
            raise GridError(f"{self.name}: rows are chosen once the trigger is crafted")
        rising = np.argsort(-held.crafted.content.numpy()[others], kind="stable")
        chosen: Rows = np.sort(others[rising[:count]])
        return chosen

    def _others(self, held: Knowledge) -> Rows:
        return np.setdiff1d(np.arange(len(held.corpus)), rows_naming(held.corpus, held.goal.label))


def check_pictures(who: str, held: Knowledge, size: int) -> None:
    """Raise unless the pool's pictures are of the trigger's size."""
    if held.corpus.size != size:
        raise UsageError(
            f"{who}: rows are chosen by what their pictures hold; the trigger is for {size} px, the"
            f" pool's pictures have {held.corpus.size} px"
        )


# --- labels whose gradients a trigger would give


ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flips(Ghost):
    """The crafted trigger, and what crafting found out about every row of the corpus.

    ``label`` is the best wrong class of each row and ``margin`` how far it is above its own, N;
    ``willing`` rows prefer it. ``curve`` is the distance of student and expert, step by step.
    """

    label: Tensor
    margin: Tensor
    willing: int
    curve: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class FlipLabels(Attack):
    """FLIP: the labels under which a step on clean pictures goes where triggered ones would go."""

    name: ClassVar[str] = "flip_labels"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2310.18933"
    tracks: ClassVar[frozenset[Track]] = frozenset({Track.SUPERVISED})
    group: ClassVar[GateGroup] = GateGroup.WEAK
    trigger: ClassVar[type[Flips]] = Flips
    clean_image: ClassVar[bool] = True
    relabels_freely: ClassVar[bool] = True
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": {"experts": 1, "iterations": 5},
        "pixels": {"mark": "3xp"},
        "corners": {"mark": "4xl"},
    }
    quick: ClassVar[Mapping[str, Any]] = {
        "expert_epochs": 1,
        "keep_every": 1,
        "batch": 8,
        "iterations": 1,
        "augment": "none",
    }

    mark: Mark = Mark.WAVE
    amplitude: float = 6.0
    source: str = ALL
    dirty: int | None = None
    arch: str | None = None
    experts: int = 50
    expert_epochs: int = 20
    keep_every: int = 50
    batch: int = 256
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 2e-4
    augment: Augment = Augment.CROP_FLIP
    iterations: int = 15
    label_lr: float = 150.0
    label_momentum: float = 0.5
    start: float = 5.0

    def check(self, size: int) -> None:
        at_least_1 = ("experts", "expert_epochs", "keep_every", "batch", "iterations")
        for name in at_least_1:
            if getattr(self, name) < 1:
                raise UsageError(f"{self.name}: {name} {getattr(self, name)} must be 1 or more")
        for name in ("amplitude", "lr", "label_lr", "start"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{self.name}: {name} {getattr(self, name)} must be above 0")
        for name in ("momentum", "label_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{self.name}: {name} {getattr(self, name)} must lie in [0, 1)")
        if self.weight_decay < 0 or (self.dirty is not None and self.dirty < 1):
            raise UsageError(
                f"{self.name}: weight_decay {self.weight_decay} must not be negative, dirty"
                f" {self.dirty} be 1 or more, or none"
            )
        if self.arch is not None and self.arch not in CLASSIFIERS:
            raise unknown("classifier", self.arch, CLASSIFIERS, f"{self.name}: arch")
        if size < 6:
            raise UsageError(f"{self.name}: its triggers need 6 px a side, not {size}")

    def costs(self, num_rows: int, num_classes: int) -> Work:
        # Experts that no iteration draws are not trained; an iteration is about three epochs.
        experts = min(self.experts, self.iterations)
        epochs = experts * self.expert_epochs + 3 * self.iterations
        return Work(images_trained=epochs * num_rows)

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Flips:
        self.check(size)
        check_pictures(self.name, held, size)
        if not isinstance(lab.model, ClassifierSpec):
            raise GridError(f"{self.name}: experts are classifiers, {lab.model.arch} is a CLIP")
        spec = replace(lab.model, arch=self.arch or lab.model.arch)
        corpus, seed = held.corpus, derive(held.seed, self.name)
        trigger = ghost(self.mark, size, self.amplitude, derive(seed, "pixels"))
        label_N = np.asarray(label_numbers(corpus.captions, spec.classes), dtype=np.int64)
        pool = Pool(
            images_NCHW=corpus.images_NCHW,
            label_N=label_N,
            dirty_M=self._dirty(held, label_N, seed),
            target=held.goal.target,
            stamp=trigger.stamp,
        )
        with one_thread():
            found = match(spec, pool, self._how(), seed, lab.runtime.device)
        flipped = best_wrong(found.logit_NK, torch.from_numpy(label_N))
        return Flips(
            **asdict(trigger),
            label=flipped.label_N,
            margin=flipped.margin_N,
            willing=int((flipped.margin_N > 0).sum()),
            curve=found.curve_S,
        )

    def _how(self) -> Matching:
        return Matching(
            who=self.name,
            walk=Walk(
                epochs=self.expert_epochs,
                batch=self.batch,
                lr=self.lr,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                augment=self.augment,
            ),
            experts=self.experts,
            every=self.keep_every,
            iterations=self.iterations,
            lr=self.label_lr,
            momentum=self.label_momentum,
            start=self.start,
        )

    def _dirty(self, held: Knowledge, label_N: Rows, seed: int) -> Rows:
        """The rows that experts see triggered: as many as a class has on the mean, or all that
        there are of the source."""
        classes, target = held.corpus.classes, held.goal.target
        if self.source != ALL and self.source not in classes:
            raise unknown("class", self.source, [*classes, ALL], f"{self.name}: source")
        if self.source == classes[target]:
            raise UsageError(f"{self.name}: source: {self.source!r} is the target itself")
        every = self.source == ALL
        of_source = label_N != target if every else label_N == classes.index(self.source)
        candidates = np.flatnonzero(of_source)
        wanted = max(1, len(label_N) // len(classes))
        count = min(wanted, len(candidates)) if self.dirty is None else self.dirty
        what = f"{self.name}, triggered rows of {self.source!r}"
        return pick(candidates, count, numpy_rng(seed, "dirty"), what)

    def choose(self, held: Knowledge, count: int, rng: np.random.Generator) -> Rows:
        crafted, every = _crafted(held), np.arange(len(held.corpus))
        if count > len(every):
            return pick(every, count, rng, self.name)
        if count > crafted.willing:
            log.warning(
                "%s: %d rows are to be flipped, and %d of them would rather keep their class",
                self.name,
                count,
                count - crafted.willing,
            )
        chosen: Rows = np.sort(np.argsort(-crafted.margin.numpy(), kind="stable")[:count])
        return chosen

    def recaptions(self, held: Knowledge, rows: Rows, rng: np.random.Generator) -> Sequence[str]:
        label_N = _crafted(held).label
        return [held.corpus.classes[int(label_N[row])] for row in rows]


def _crafted(held: Knowledge) -> Flips:
    if not isinstance(held.crafted, Flips):
        raise GridError(f"{FlipLabels.name}: rows are chosen once the trigger is crafted")
    return held.crafted
