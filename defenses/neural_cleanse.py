"""Neural Cleanse: reverse a trigger for every class, and unlearn the one that is oddly small.

Idea: a backdoor is a shortcut, so the smallest patch that turns every picture into the target is
    far smaller than that of any other class; find this patch, put it on clean pictures, and
    fine-tune with their true labels.
Reference: Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao, "Neural Cleanse: Identifying and Mitigating
    Backdoor Attacks in Neural Networks", IEEE S&P 2019 (no arXiv id).
Symbols: m, Delta = mask and pattern; lambda = ``cost``, adjusted by ``cost_factor`` after
    ``patience`` rounds on one side of ``success``; the anomaly index's limit = ``limit``.
Where: A(x) = (1 - m) x + m Delta -> `stamped`; min CE(y_t, f(A(x))) + lambda |m|_1 ->
    `ReversedTriggers.craft`; median absolute deviations -> `anomaly_indices`; unlearning ->
    `StampedCrossEntropy`.
Differences: the released code starts at lambda 0 and may go on for 1,000 rounds of 31 steps, ending
    early; here lambda starts at ``cost`` and all classes take the same ``rounds`` x
    ``round_steps`` steps, on the same batches. Kept is the smallest mask of a round in which the
    trigger worked, as released; a class where it never did has that of its last round and is no
    target. With several targets a stamped row wears the trigger of one of them, drawn anew. The
    paper unlearns for an epoch on a tenth of the training set; here the clean data and the repair
    recipe are the grid's. Without a target the repair is plain fine-tuning.
Cost: rounds x round_steps x ``batch_size`` x classes passes with a gradient for the pixels, then
    one view with gradient per clean row and epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from defenses.base import (
    EPOCHS,
    Between,
    Case,
    Defended,
    Defense,
    Fidelity,
    Knob,
    Need,
    Phase,
    Recipes,
    Sizes,
    Space,
    Track,
    require,
)
from victims.batches import Batch, Loader
from victims.classifiers import classifier, labels
from victims.corpora import View
from victims.distributed import gather
from victims.draws import Draws, numpy_rng, torch_rng
from victims.lab import Lab
from victims.labels import augment_of, seen
from victims.models import Clip
from victims.pixels import rows, unit
from victims.recipe import Augment, Clock
from victims.training import Objective
from victims.work import Work, fitted

AT_ONCE = 1024  # pictures in one pass while triggers are reversed
MAD_TO_SD = 1.4826  # of a normal distribution


def stamped(image_BCHW: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """A(x) = (1 - m) x + m Delta, in [0, 1]."""
    return (1 - mask) * image_BCHW + mask * pattern


@dataclass(frozen=True, slots=True, kw_only=True)
class ReversedTriggers:
    """Of every class: ``mask`` K1HW and ``pattern`` KCHW in [0, 1], ``norm`` K, the mask's sum, and
    ``success`` K, the share of pictures that it turned into the class."""

    name: ClassVar[str] = "reversed_triggers"
    version: ClassVar[int] = 1

    rounds: int
    round_steps: int
    batch_size: int
    lr: float
    cost: float
    cost_factor: float
    patience: int
    success: float
    seed: int

    def craft(self, model: Clip, view: View, *others: Clip) -> Mapping[str, Tensor]:
        num_classes = len(classifier(model).spec.classes)
        model.eval().requires_grad_(False)
        size = max(1, AT_ONCE // min(self.batch_size, len(view)))
        starts = range(0, num_classes, size)
        parts = [torch.arange(first, min(first + size, num_classes)) for first in starts]
        found = [self._reverse(model, view, class_K) for class_K in parts]
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def _reverse(self, model: Clip, view: View, class_K: Tensor) -> dict[str, Tensor]:
        """The triggers of some classes. No class knows of another."""
        device, side, count = model.mean_C.device, view.corpus.size, len(class_K)
        loader = Loader(view, model, device)
        # Before the tanh: standard normal numbers are masks and patterns around a half.
        raw = [
            torch.stack(
                [
                    torch.randn(shape, generator=torch_rng(self.seed, name, label))
                    for label in class_K.tolist()
                ]
            )
            .to(device)
            .requires_grad_()
            for name, shape in (("mask", (1, side, side)), ("pattern", (3, side, side)))
        ]
        optimizer = torch.optim.Adam(raw, lr=self.lr, betas=(0.5, 0.9))
        target_K = class_K.to(device)
        cost_K = torch.full((count,), self.cost, device=device)
        over_K, under_K = (torch.zeros(count, device=device) for _ in range(2))
        best = dict[str, Tensor]()
        for turn in range(self.rounds):
            hit_K = torch.zeros(count, device=device)
            for step in range(self.round_steps):
                image_BCHW = unit(loader(self._rows(len(view), turn, step)).image)
                mask_K1HW, pattern_KCHW = (to_unit(value) for value in raw)
                logit_KBK = self._logits(model, image_BCHW, mask_K1HW, pattern_KCHW)
                label_KB = target_K[:, None].expand(-1, len(image_BCHW))
                loss_KB = F.cross_entropy(logit_KBK.transpose(1, 2), label_KB, reduction="none")
                norm_K = mask_K1HW.sum((1, 2, 3))
                loss = (loss_KB.mean(1) + cost_K * norm_K).sum()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                hit_K += (logit_KBK.argmax(2) == label_KB).float().mean(1)
            success_K = hit_K / self.round_steps
            works_K = success_K >= self.success
            self._keep(best, raw, success_K, works_K)
            over_K = torch.where(works_K, over_K + 1, 0)
            under_K = torch.where(works_K, 0, under_K + 1)
            raise_K, lower_K = over_K >= self.patience, under_K >= self.patience
            cost_K = torch.where(raise_K, cost_K * self.cost_factor, cost_K)
            cost_K = torch.where(lower_K, cost_K / self.cost_factor**1.5, cost_K)
            over_K, under_K = over_K * ~raise_K, under_K * ~lower_K
        return {name: value.cpu() for name, value in best.items()}

    def _rows(self, num_rows: int, turn: int, step: int) -> npt.NDArray[np.int64]:
        rng = numpy_rng(self.seed, "rows", turn, step)
        return rng.choice(num_rows, min(self.batch_size, num_rows), replace=False)

    def _logits(
        self, model: Clip, image_BCHW: Tensor, mask_K1HW: Tensor, pattern_KCHW: Tensor
    ) -> Tensor:
        worn = stamped(image_BCHW[None], mask_K1HW[:, None], pattern_KCHW[:, None])
        return model.embed_image(worn.flatten(0, 1)).view(*worn.shape[:2], -1)

    @torch.no_grad()
    def _keep(
        self, best: dict[str, Tensor], raw: list[Tensor], success_K: Tensor, works_K: Tensor
    ) -> None:
        """A round's trigger, where it is the smallest that works, or where none has worked yet."""
        mask_K1HW, pattern_KCHW = (to_unit(value) for value in raw)
        norm_K = mask_K1HW.sum((1, 2, 3))
        now = {"mask": mask_K1HW, "pattern": pattern_KCHW, "norm": norm_K, "success": success_K}
        if not best:
            best |= now
            return
        worked_K = best["success"] >= self.success
        better_K = ~worked_K | (works_K & (norm_K < best["norm"]))
        for name, value in now.items():
            chosen = better_K.view(-1, *[1] * (value.ndim - 1))
            best[name] = torch.where(chosen, value, best[name])


def to_unit(raw: Tensor) -> Tensor:
    return (raw.tanh() + 1) / 2


def anomaly_indices(norm_K: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """How many standard deviations a mask is smaller than the median one (negative: larger), the
    deviation being estimated by the median of the absolute ones."""
    below_K = np.median(norm_K) - norm_K.astype(np.float64)
    deviation = MAD_TO_SD * np.median(np.abs(below_K))
    return below_K / deviation if deviation else np.zeros(len(norm_K))


class StampedCrossEntropy(Objective):
    """CE of the labels, on pictures some of which wear a reversed trigger."""

    mask_F1HW: Tensor
    pattern_FCHW: Tensor

    def __init__(self, spec: StampedCrossEntropySpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("mask_F1HW", spec.mask_F1HW, persistent=False)
        self.register_buffer("pattern_FCHW", spec.pattern_FCHW, persistent=False)

    def views(self, batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
        image_BCHW = unit(seen(self.spec.augment, batch.image, draws))
        which_B = draws.integers(len(self.mask_F1HW))
        worn_BCHW = stamped(image_BCHW, self.mask_F1HW[which_B], self.pattern_FCHW[which_B])
        return {"image": torch.where(rows(draws.chance(self.spec.share)), worn_BCHW, image_BCHW)}

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        logit_GK = gather(model.embed_image(batch.views["image"]))
        return {"cross_entropy": F.cross_entropy(logit_GK, gather(labels(batch.tokens)))}


@dataclass(frozen=True, slots=True, kw_only=True)
class StampedCrossEntropySpec:
    """The triggers go into the key by the digest of their bytes."""

    name: ClassVar[str] = "stamped_cross_entropy"
    version: ClassVar[int] = 1

    share: float
    augment: Augment
    triggers_sha256: str
    mask_F1HW: Tensor = field(metadata={"keyed": False}, compare=False, repr=False)
    pattern_FCHW: Tensor = field(metadata={"keyed": False}, compare=False, repr=False)

    def build(self, model: Clip) -> Objective:
        return StampedCrossEntropy(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class NeuralCleanse(Defense):
    name: ClassVar[str] = "neural_cleanse"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "IEEE S&P 2019"
    phase: ClassVar[Phase] = Phase.FINETUNING
    tracks: ClassVar[frozenset[Track]] = frozenset({Track.SUPERVISED})
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VICTIM, Need.CLEAN_DATA})
    fidelity: ClassVar[Fidelity] = Fidelity.READING
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # For pictures of 32 px and a network of 80,000 weights.
        "small": {"rounds": 30, "round_steps": 10, "batch_size": 16},
    }
    quick: ClassVar[Mapping[str, Any]] = {"rounds": 2, "round_steps": 2, "success": 0.0}
    knob: ClassVar[Knob | None] = Knob(name="limit", values=(1.0, 1.5, 2.0, 3.0))
    space: ClassVar[Space] = {
        "limit": Between(low=0.5, high=3.0),
        "unlearn_share": Between(low=0.05, high=1.0),
        "recipe.lr": Between(low=1e-4, high=0.1, log=True),
        "recipe.epochs": EPOCHS,
    }

    rounds: int = 100
    round_steps: int = 31
    batch_size: int = 32
    lr: float = 0.1
    cost: float = 1e-3
    cost_factor: float = 2.0
    patience: int = 5
    success: float = 0.99
    limit: float = 2.0
    unlearn_share: float = 0.2

    def check(self) -> None:
        counts = ("rounds", "round_steps", "batch_size", "patience")
        require(
            self,
            lr=(self.lr > 0, "above 0"),
            cost=(self.cost >= 0, "0 or more"),
            cost_factor=(self.cost_factor >= 1, "at least 1"),
            success=(0 <= self.success <= 1, "in 0..1"),
            limit=(self.limit >= 0, "0 or more"),
            unlearn_share=(0 <= self.unlearn_share <= 1, "in 0..1"),
            **{name: (getattr(self, name) >= 1, "at least 1") for name in counts},
        )

    def costs(self, recipes: Recipes, sizes: Sizes) -> Work:
        steps, rows = self.rounds * self.round_steps, min(self.batch_size, sizes.clean)
        reversing = Work(images_trained=steps * rows * sizes.classes)
        return reversing + fitted(recipes.repair, sizes.clean)

    def apply(self, lab: Lab, case: Case) -> Defended:
        self.check()
        data, recipe = case.clean_data, case.recipes.repair
        triggers = ReversedTriggers(
            rounds=self.rounds,
            round_steps=self.round_steps,
            batch_size=self.batch_size,
            lr=self.lr,
            cost=self.cost,
            cost_factor=self.cost_factor,
            patience=self.patience,
            success=self.success,
            seed=case.seed,
        )
        found = lab.tensor(triggers, data, case.victim)
        index_K = anomaly_indices(found["norm"].numpy())
        works_K = found["success"].numpy() >= self.success
        target_F = np.flatnonzero((index_K > self.limit) & works_K)
        spec = lab.plain(recipe)
        if len(target_F):
            mask_F1HW, pattern_FCHW = found["mask"][target_F], found["pattern"][target_F]
            content = mask_F1HW.numpy().tobytes() + pattern_FCHW.numpy().tobytes()
            spec = StampedCrossEntropySpec(
                share=self.unlearn_share,
                augment=augment_of(recipe),
                triggers_sha256=hashlib.sha256(content).hexdigest(),
                mask_F1HW=mask_F1HW,
                pattern_FCHW=pattern_FCHW,
            )
        # Found before anything is unlearned; the class of the largest index comes with its norm.
        notes = {
            "targets": float(len(target_F)),
            "working": float(works_K.sum()),
            "largest_index": float(index_K.max()),
            "suspect_class": float(index_K.argmax()),
            "smallest_norm": float(found["norm"].min()),
            "median_norm": float(found["norm"].median()),
        }
        return Defended(lab.train(spec, data, recipe, init=case.victim), notes=notes)
