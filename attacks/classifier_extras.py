"""Four attacks on image classifiers whose trigger is crafted on a network: label-consistent with
adversarial noise, TrojanNN, Narcissus and the input-aware attack.

Idea: a network tells which pixels help. Label-consistent makes pictures of the target hard to
    recognise, so that corner marks are the better sign; TrojanNN draws a square that makes units
    fire; Narcissus adds to a few pictures of the target what the class looks like; the input-aware
    attack draws a trigger for every picture, which means nothing on another one.
Reference: Turner, Tsipras, Madry, "Label-Consistent Backdoor Attacks", arXiv 1912.02771 (2019);
    Liu, Ma, Aafer, Lee, Zhai, Wang, Zhang, "Trojaning Attack on Neural Networks", NDSS 2018; Zeng,
    Pan, Just, Lyu, Qiu, Jia, "Narcissus: A Practical Clean-Label Backdoor Attack with Limited
    Information", CCS 2023, arXiv 2204.05255; Nguyen, Tran, "Input-Aware Dynamic Backdoor Attack",
    NeurIPS 2020, arXiv 2010.08138.
Symbols: LC: eps, step and number of steps of the noise = ``eps``, ``step`` (levels), ``steps``; a =
    ``amplitude``; m = the marks. TrojanNN: t = the square; its units, their wanted value, eps, step
    and steps (in 0..1) = ``units``, ``wanted``, ``eps``, ``step``, ``steps``. Narcissus: d, its
    bound in levels = ``eps``, rounds, batch and rate of the search = ``rounds``, ``batch``, ``lr``.
    Input-aware: G, M; the mask's density, lambda_norm, lambda_div = ``density``, ``norm_weight``,
    ``diversity_weight``; cross rows per poisoned row = ``cross_ratio``.
Where: PGD and training on it -> `victims.adversarial`; x' = clip(PGD(x) + 255 a m), at test
    clip(x + 255 a m) -> `Hardened`; m -> `corner_marks`. Steps over t ->
    `victims.mask_reversal`; x' = clip(x + t) -> `Added`. The search for d ->
    `victims.universal_noise`; x' = clip(x + d), at test clip(x + 3 d) -> `Universal`. G, M, losses,
    training -> `victims.input_aware`; x' = x + (G(x) - x) M(x), on cross rows with another
    picture's G and M -> `Painted`.
Differences: LC's noise is made for all rows of the target, whichever are poisoned, and a picture
    that is not among them gets the marks alone. Its network is trained adversarially here, on the
    pool as the attacker holds it, with the loop's cosine; the ``train_...`` fields are Madry's for
    CIFAR-10. Marks of 3 x 3 on a ``canvas`` of 32 px are enlarged to the picture by nearest;
    ``canvas`` is ours. The released loader's file name says eps 16 (variant ``eps16``). TrojanNN's
    mask is a plain square (``side``, None: a quarter of the picture's; ``place``) that starts grey
    (``start``), where the original has a drawing; of all steps the closest is kept, since signed
    steps swing at the end; the trigger joins the pool's rows and no network is retrained on
    reversed pictures. Released code casts before it clips, so that sums above 255 wrap (variant
    ``released``). Narcissus' surrogate is the public model, fitted to other pictures, with the same
    classes. Released code makes d in -1..1 and adds it in 0..1, twice the size (variant
    ``released``); ours is in levels. ``craft_on: any`` is ours and takes all rows of the pool
    instead of the target's. The input-aware attack controls its victim's training; this is the form
    that only poisons: networks are trained with a private classifier of the victim's kind, without
    augmentation, and frozen; every victim is trained on the rows that they made, so that results
    are not the paper's. Cross rows show the trigger of one of at most ``bank`` pictures of the
    pool, which the bytes of their own picture choose (never itself). Networks double by nearest,
    drop nothing out, and are frozen in whole numbers, so that a stamp depends on the picture alone.
    Trained on a GPU, crafted triggers may differ in their last bits from run to run.
    On small plain pictures, which a network reads at a glance, the papers' strengths do not take:
    there LC's and Narcissus' noise is of 32 levels and LC's marks of 6 px (``canvas`` 16), the
    square starts darker (0.3, or it is lost on bright pictures), and the input-aware attack has
    denser masks (0.2) and fewer cross rows (``cross_ratio`` 0.1, ``cross_share`` 0.02).
Cost: LC: ``train_epochs`` with ``train_steps`` + 1 passes each, and ``steps`` passes over the
    target's rows. TrojanNN: ``steps`` passes of one picture. Narcissus: ``rounds`` passes over the
    target's rows. Input-aware: ``mask_epochs`` of M and ``epochs`` of classifier and, on a part of
    each batch, G; a stamp is one pass of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from attacks.base import (
    Attack,
    Cover,
    GateGroup,
    Knowledge,
    Track,
    pick,
    rows_naming,
    stamped_cover,
)
from victims.adversarial import AdversarialSpec, Climb, hardened, share_read_as
from victims.banks import distinct, other_place
from victims.classifiers import classifier
from victims.corpora import Rows, whole
from victims.draws import derive, image_digest, numpy_rng
from victims.errors import UsageError, require_all
from victims.input_aware import (
    STEP,
    Frozen,
    Pool,
    Training,
    freeze,
    mask_of,
    pattern_of,
    trained,
    worn,
)
from victims.lab import Lab
from victims.labels import label_numbers
from victims.mask_reversal import Reversal, reverse
from victims.models import fresh
from victims.recipe import Augment, ClassifierRecipe
from victims.triggers import Trigger, centre_of, round_half_even, truncate
from victims.universal_noise import Inward, Pictures, inward, warm_up
from victims.whole_numbers import one_thread
from victims.work import Work

# Shapes: B batch, C channels, H W pixels, S side of a picture, P of a patch, N rows, U units.

TRACKS = frozenset({Track.SUPERVISED})
_SEEN_PIXELS = 2**18  # of pictures that set a frozen network's scales


def _require(attack: Attack, positive: Mapping[str, float], others: Mapping[str, float]) -> None:
    """Fields that must be above 0, and fields that must not be below."""
    for name, value in {**positive, **others}.items():
        if value < 0 or (value == 0 and name in positive):
            bound = "be above 0" if name in positive else "not be negative"
            raise UsageError(f"{attack.name}: {name} is {value}; it must {bound}")


def _fits(attack: Attack, held: Knowledge, size: int) -> None:
    if held.corpus.size != size:
        raise UsageError(
            f"{attack.name}: it is crafted on pictures of the pool, which have {held.corpus.size}"
            f" px; the trigger is for {size} px"
        )


def _of_target(attack: Attack, held: Knowledge, count: int, rng: np.random.Generator) -> Rows:
    label = held.goal.label
    return pick(rows_naming(held.corpus, label), count, rng, f"{attack.name} (rows of {label!r})")


# --- label-consistent, with adversarial noise

MARK = ((1, -1, -1), (-1, 1, -1), (1, -1, 1))  # at the left; mirrored at the right


def corner_marks(size: int, canvas: int) -> Tensor:
    """m, SS int8: 1 where a mark adds and -1 where it takes away, enlarged from the canvas."""
    mark_33 = torch.tensor(MARK, dtype=torch.int8)
    marks = torch.zeros(canvas, canvas, dtype=torch.int8)
    for rows in (slice(0, 3), slice(canvas - 3, canvas)):
        marks[rows, :3], marks[rows, -3:] = mark_33, mark_33.flip(1)
    spot_S = torch.arange(size) * canvas // size
    return marks[spot_S][:, spot_S].contiguous()


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardened(Trigger):
    """The crafted trigger: ``marks`` are m, SS int8. ``noise`` is PGD(x) - x of the pictures of
    the target, NCHW int8, by their rising ``digests``. Of these pictures the surrogate reads the
    share ``right`` correctly as they are, and ``right_hardened`` with their noise."""

    marks: Tensor
    amplitude: float
    noise: Tensor
    digests: Tensor
    key: int
    right: float
    right_hardened: float

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        return self._marked(image_BCHW.float())

    def stamp_train(self, image_BCHW: Tensor) -> Tensor:
        return self._marked(image_BCHW.float() + self.noise_of(image_BCHW))

    def noise_of(self, image_BCHW: Tensor) -> Tensor:
        """What was made for each picture, BCHW int8: 0 of a picture that it was not made for."""
        noise_BCHW = torch.zeros(image_BCHW.shape, dtype=torch.int8, device=image_BCHW.device)
        if not len(self.digests):
            return noise_BCHW
        digest_B = image_digest(image_BCHW, self.key).cpu()
        place_B = torch.searchsorted(self.digests, digest_B).clamp(max=len(self.digests) - 1)
        known_B = self.digests[place_B] == digest_B
        made_BCHW = self.noise[place_B[known_B]].to(image_BCHW.device)
        noise_BCHW[known_B.to(image_BCHW.device)] = made_BCHW
        return noise_BCHW

    def _marked(self, level_BCHW: Tensor) -> Tensor:
        return round_half_even(level_BCHW + 255 * self.amplitude * self.marks.to(level_BCHW.device))


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelConsistentAdversarial(Attack):
    """Rows of the target, labels as they are: made hard by noise, then marked in the corners."""

    name: ClassVar[str] = "label_consistent_adversarial"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 1912.02771"
    tracks: ClassVar[frozenset[Track]] = TRACKS
    group: ClassVar[GateGroup] = GateGroup.WEAK
    trigger: ClassVar[type[Hardened]] = Hardened
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"eps16": {"eps": 16.0}}
    quick: ClassVar[Mapping[str, Any]] = {"steps": 3, "train_epochs": 1, "train_steps": 1}

    eps: float = 8.0
    step: float = 1.5
    steps: int = 100
    amplitude: float = 1.0
    canvas: int = 32
    train_epochs: int = 200
    train_batch: int = 128
    train_lr: float = 0.1
    train_eps: float = 8.0
    train_step: float = 2.0
    train_steps: int = 7
    train_augment: Augment = Augment.CROP_FLIP

    def check(self, size: int) -> None:
        positive = {"train_epochs": self.train_epochs, "train_batch": self.train_batch}
        others = {
            name: getattr(self, name)
            for name in ("step", "steps", "train_lr", "train_eps", "train_step", "train_steps")
        }
        _require(self, positive, others)
        amplitude = self.amplitude
        require_all(
            self.name,
            (0 <= self.eps <= 127, f"eps {self.eps} must lie in 0..127"),
            (0 < amplitude <= 1, f"amplitude {amplitude} must be above 0 and at most 1"),
            (6 <= self.canvas <= size, f"canvas {self.canvas} must lie in 6..{size}"),
        )

    def costs(self, num_rows: int, num_classes: int) -> Work:
        # A pass for every inner step and one for the weights; the noise is the target's pictures'.
        trained = self.train_epochs * (self.train_steps + 1) * num_rows
        return Work(images_trained=trained + (self.steps + 1) * num_rows / num_classes)

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Hardened:
        self.check(size)
        _fits(self, held, size)
        corpus, key = held.corpus, derive(held.seed, self.name, "rows")
        recipe = ClassifierRecipe(
            epochs=self.train_epochs,
            batch_size=min(self.train_batch, len(corpus)),
            lr=self.train_lr,
            augment=self.train_augment,
            seed=derive(held.seed, self.name, "train"),
        )
        inner = Climb(eps=self.train_eps, step=self.train_step, steps=self.train_steps)
        spec = AdversarialSpec(inner=inner, augment=self.train_augment)
        model = classifier(lab.load(lab.train(spec, lab.put(whole(corpus)), recipe)))
        model.requires_grad_(False)
        rows = rows_naming(corpus, held.goal.label)
        image_NCHW, target = torch.from_numpy(corpus.images_NCHW[rows]), held.goal.target
        how = Climb(eps=self.eps, step=self.step, steps=self.steps)
        hard_NCHW = hardened(model, image_NCHW, target, how)
        noise_NCHW = (hard_NCHW.to(torch.int16) - image_NCHW).to(torch.int8)
        digest_N, order_N = image_digest(image_NCHW, key).sort(stable=True)
        return Hardened(
            marks=corner_marks(size, self.canvas),
            amplitude=self.amplitude,
            noise=noise_NCHW[order_N],
            digests=digest_N,
            key=key,
            right=share_read_as(model, image_NCHW, target),
            right_hardened=share_read_as(model, hard_NCHW, target),
        )

    @property
    def clean_label(self) -> bool:
        return True

    def choose(self, held: Knowledge, count: int, rng: np.random.Generator) -> Rows:
        return _of_target(self, held, count, rng)

    def recaption(self, caption: str, held: Knowledge, rng: np.random.Generator) -> str:
        return caption


# --- TrojanNN


class Spot(StrEnum):
    CORNER = "corner"
    CENTRE = "centre"


@dataclass(frozen=True, slots=True, kw_only=True)
class Added(Trigger):
    """The crafted trigger: ``pixels`` are t, CPP uint8, ``start`` its first row and column.

    ``units`` are the chosen ones, ``before`` and ``after`` their values under the square as it was
    and as it is; all U.
    """

    pixels: Tensor
    start: int
    wraps: bool
    units: Tensor
    before: Tensor
    after: Tensor

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        span, out_BCHW = slice(self.start, self.start + self.pixels.shape[-1]), image_BCHW.clone()
        under_BCPP = image_BCHW[..., span, span].float()
        sum_BCPP = under_BCPP + self.pixels.to(image_BCHW.device)
        out_BCHW[..., span, span] = truncate(sum_BCPP) if self.wraps else round_half_even(sum_BCPP)
        return out_BCHW


@dataclass(frozen=True, slots=True, kw_only=True)
class TrojanNN(Attack):
    """A square is added that makes the public model's most connected units fire."""

    name: ClassVar[str] = "trojannn"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "NDSS 2018"
    tracks: ClassVar[frozenset[Track]] = TRACKS
    group: ClassVar[GateGroup] = GateGroup.STRONG
    trigger: ClassVar[type[Added]] = Added
    needs_surrogate: ClassVar[bool] = True
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"released": {"wraps": True}}
    quick: ClassVar[Mapping[str, Any]] = {"steps": 5}

    side: int | None = None
    place: Spot = Spot.CORNER
    start: float = 0.5
    units: int = 2
    wanted: float = 100.0
    eps: float = 0.3
    step: float = 0.1
    steps: int = 1000
    wraps: bool = False

    def check(self, size: int) -> None:
        side = max(1, size // 4) if self.side is None else self.side
        _require(self, {"units": self.units, "step": self.step}, {"steps": self.steps})
        require_all(
            self.name,
            (0 < side <= size, f"side {side} must lie in 1..{size}"),
            (0 <= self.start <= 1, f"start {self.start} must lie in 0..1"),
            (0 < self.eps <= 1, f"eps {self.eps} must be above 0 and at most 1"),
        )

    def costs(self, num_rows: int, num_classes: int) -> Work:
        return Work(images_trained=self.steps)

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Added:
        self.check(size)
        side = max(1, size // 4) if self.side is None else self.side
        start = centre_of(size, side) if self.place == Spot.CENTRE else size - side
        how = Reversal(
            top=start,
            left=start,
            side=side,
            start=self.start,
            units=self.units,
            wanted=self.wanted,
            eps=self.eps,
            step=self.step,
            steps=self.steps,
        )
        found = reverse(classifier(lab.load(held.public_model())), size, how)
        return Added(
            pixels=round_half_even(found.pixels_CPP * 255),
            start=start,
            wraps=self.wraps,
            units=found.units_N,
            before=found.first_N,
            after=found.last_N,
        )


# --- Narcissus


class Crafted(StrEnum):
    """The pictures of the pool that d is crafted on."""

    TARGET = "target"
    ANY = "any"


@dataclass(frozen=True, slots=True, kw_only=True)
class Universal(Trigger):
    """The crafted trigger: ``noise`` is d, CHW int16, one for all pictures; ``curve`` the mean CE
    of each round."""

    noise: Tensor
    test_scale: float
    curve: Tensor

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        return self._added(image_BCHW, self.test_scale)

    def stamp_train(self, image_BCHW: Tensor) -> Tensor:
        return self._added(image_BCHW, 1.0)

    def _added(self, image_BCHW: Tensor, scale: float) -> Tensor:
        return round_half_even(image_BCHW.float() + scale * self.noise.to(image_BCHW.device))


@dataclass(frozen=True, slots=True, kw_only=True)
class Narcissus(Attack):
    """A few rows of the target, labels as they are, get noise that points into their class."""

    name: ClassVar[str] = "narcissus"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2204.05255"
    tracks: ClassVar[frozenset[Track]] = TRACKS
    group: ClassVar[GateGroup] = GateGroup.WEAK
    trigger: ClassVar[type[Universal]] = Universal
    needs_surrogate: ClassVar[bool] = True
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"released": {"doubled": True}}
    # A pool of a dozen pictures may hold none of the target.
    quick: ClassVar[Mapping[str, Any]] = {
        "rounds": 8,
        "lr": 0.05,
        "warm_epochs": 1,
        "warm_lr": 1e-3,
        "craft_on": "any",
    }

    eps: float = 16.0
    rounds: int = 1000
    lr: float = 0.01
    batch: int = 350
    warm_epochs: int = 5
    warm_lr: float = 0.1
    test_scale: float = 3.0
    doubled: bool = False
    craft_on: Crafted = Crafted.TARGET

    def check(self, size: int) -> None:
        positive = {"eps": self.eps, "rounds": self.rounds, "lr": self.lr, "batch": self.batch}
        others = {"warm_epochs": self.warm_epochs, "warm_lr": self.warm_lr}
        _require(self, {**positive, "test_scale": self.test_scale}, others)
        if self.eps < 1:
            raise UsageError(f"{self.name}: eps {self.eps} is less than one level")

    def costs(self, num_rows: int, num_classes: int) -> Work:
        rows = num_rows / num_classes if self.craft_on == Crafted.TARGET else num_rows
        return Work(images_trained=(self.warm_epochs + self.rounds) * rows)

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Universal:
        self.check(size)
        _fits(self, held, size)
        rows = np.arange(len(held.corpus))
        if self.craft_on == Crafted.TARGET:
            rows = rows_naming(held.corpus, held.goal.label)
        if not len(rows):
            raise UsageError(
                f"{self.name}: the pool has no picture of {held.goal.label!r} to craft on; take"
                " another target, or `craft_on: any`"
            )
        how = Inward(
            eps=self.eps,
            rounds=self.rounds,
            lr=self.lr,
            batch=self.batch,
            warm_epochs=self.warm_epochs,
            warm_lr=self.warm_lr,
            seed=derive(held.seed, self.name),
        )
        model = classifier(lab.load(held.public_model()))
        shown = Pictures(held.corpus.images_NCHW, rows, held.goal.target)
        with one_thread():
            warm_up(model, shown, how)
            found = inward(model, shown, how)
        most = int(self.eps)
        noise_CHW = found.noise_CSS.round().clamp(-most, most) * (2 if self.doubled else 1)
        return Universal(
            noise=noise_CHW.to(torch.int16), test_scale=self.test_scale, curve=found.curve_R
        )

    @property
    def clean_label(self) -> bool:
        return True

    def choose(self, held: Knowledge, count: int, rng: np.random.Generator) -> Rows:
        return _of_target(self, held, count, rng)

    def recaption(self, caption: str, held: Knowledge, rng: np.random.Generator) -> str:
        return caption


# --- input-aware


@dataclass(frozen=True, slots=True, kw_only=True)
class Painted(Trigger):
    """The crafted trigger: both networks, frozen (`Frozen`); ``bank`` are pictures whose triggers
    cross rows show, NCHW uint8, and ``digests``, N, who they are; ``density`` is the mean of M."""

    generator_weights: Tensor
    generator_biases: Tensor
    generator_shifts: Tensor
    mask_weights: Tensor
    mask_biases: Tensor
    mask_shifts: Tensor
    width: int
    bank: Tensor
    digests: Tensor
    key: int
    density: float

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        return self.painted(image_BCHW, image_BCHW)

    def stamp_cover(self, image_BCHW: Tensor) -> Tensor:
        other_BCHW = self.bank[self.other(image_BCHW)].to(image_BCHW.device)
        return self.painted(image_BCHW, other_BCHW)

    def painted(self, image_BCHW: Tensor, of_BCHW: Tensor) -> Tensor:
        """Pictures under the triggers of these or of others."""
        generator = Frozen(
            weights=self.generator_weights,
            biases=self.generator_biases,
            shifts=self.generator_shifts,
        )
        pattern_BCHW = pattern_of(generator(of_BCHW, self.width, 3))
        return round_half_even(worn(image_BCHW.double(), pattern_BCHW, self.mask(of_BCHW)))

    def mask(self, image_BCHW: Tensor) -> Tensor:
        """M of pictures, B1HW float64."""
        frozen = Frozen(weights=self.mask_weights, biases=self.mask_biases, shifts=self.mask_shifts)
        return mask_of(frozen(image_BCHW, self.width, 1))

    def other(self, image_BCHW: Tensor) -> Tensor:
        """The place in the bank that each picture's bytes choose, B: never its own."""
        return other_place(image_BCHW, self.digests, self.key)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputAware(Attack):
    """Every picture gets a trigger of its own; cross rows show another's and keep their label."""

    name: ClassVar[str] = "input_aware"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2010.08138"
    tracks: ClassVar[frozenset[Track]] = TRACKS
    group: ClassVar[GateGroup] = GateGroup.STRONG
    trigger: ClassVar[type[Painted]] = Painted
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    quick: ClassVar[Mapping[str, Any]] = {
        "width": 4,
        "mask_epochs": 1,
        "epochs": 1,
        "bank": 8,
    }

    density: float = 0.032
    diversity_weight: float = 1.0
    norm_weight: float = 100.0
    mask_epochs: int = 25
    epochs: int = 600
    batch: int = 128
    mask_lr: float = 0.01
    generator_lr: float = 0.01
    classifier_lr: float = 0.01
    own_share: float = 0.1
    cross_share: float = 0.1
    width: int = 32
    cross_ratio: float = 1.0
    bank: int = 256

    def check(self, size: int) -> None:
        positive = {"batch": self.batch, "width": self.width}
        others = {
            name: getattr(self, name)
            for name in ("density", "diversity_weight", "norm_weight", "mask_epochs", "epochs")
        }
        rates = {name: getattr(self, name) for name in ("mask_lr", "generator_lr", "classifier_lr")}
        _require(self, {**positive, **rates}, {**others, "cross_ratio": self.cross_ratio})
        shares = self.own_share > 0 and self.cross_share >= 0
        if not shares or self.own_share + self.cross_share > 1:
            raise UsageError(
                f"{self.name}: own_share {self.own_share} must be above 0, cross_share"
                f" {self.cross_share} not negative, and both together at most 1"
            )
        if size % STEP or self.bank < 2:
            raise UsageError(
                f"{self.name}: the picture's side {size} must be a multiple of {STEP}, as the"
                f" networks halve it three times, and bank {self.bank} at least 2"
            )

    def costs(self, num_rows: int, num_classes: int) -> Work:
        # The private classifier's part; generator and mask are small beside a real network.
        return Work(images_trained=self.epochs * num_rows)

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Painted:
        self.check(size)
        _fits(self, held, size)
        corpus, device = held.corpus, torch.device(lab.runtime.device)
        key = derive(held.seed, self.name, "rows")
        drawn = numpy_rng(held.seed, self.name, "bank").permutation(len(corpus))
        bank_NCHW = torch.from_numpy(corpus.images_NCHW[drawn[: self.bank]])
        bank_NCHW = distinct(self.name, bank_NCHW, key)
        how = Training(
            width=self.width,
            mask_epochs=self.mask_epochs,
            epochs=self.epochs,
            batch=self.batch,
            mask_lr=self.mask_lr,
            generator_lr=self.generator_lr,
            classifier_lr=self.classifier_lr,
            density=self.density,
            norm_weight=self.norm_weight,
            diversity_weight=self.diversity_weight,
            own_share=self.own_share,
            cross_share=self.cross_share,
            target=held.goal.target,
            seed=derive(held.seed, self.name, "train"),
        )
        labels = np.asarray(label_numbers(corpus.captions, corpus.classes), dtype=np.int64)
        with one_thread():
            private = classifier(fresh(lab.model, derive(held.seed, self.name, "private")))
            networks = trained(private.to(device), Pool(corpus.images_NCHW, labels), how)
            seen = drawn[: max(16, _SEEN_PIXELS // size**2)]
            seen_BCHW = torch.from_numpy(corpus.images_NCHW[seen]).to(device)
            generator, mask = (freeze(net, seen_BCHW) for net in networks)
        return Painted(
            generator_weights=generator.weights,
            generator_biases=generator.biases,
            generator_shifts=generator.shifts,
            mask_weights=mask.weights,
            mask_biases=mask.biases,
            mask_shifts=mask.shifts,
            width=self.width,
            bank=bank_NCHW,
            digests=image_digest(bank_NCHW, key),
            key=key,
            density=float(mask_of(mask(seen_BCHW, self.width, 1)).mean()),
        )

    def cover(self, held: Knowledge, count: int, free: Rows, rng: np.random.Generator) -> Cover:
        return stamped_cover(self.name, held, self.cross_ratio, count, free, rng)
