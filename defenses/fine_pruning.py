"""Fine-pruning: cut the last channels that clean pictures leave dormant, then fine-tune.

Idea: a backdoor hides in channels that clean pictures hardly use; prune the last feature maps in
    the order of their mean activation on clean pictures, as far as clean accuracy allows it, and
    fine-tune what is left.
Reference: Liu, Dolan-Gavitt, Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep
    Neural Networks", RAID 2018, arXiv 1805.12185.
Symbols: the accuracy that may be lost = ``tolerance``, a share of the victim's.
Where: mean activations -> `MeanActivation`; the order and how far -> `accuracies`, `how_many`;
    pruning -> `PrunedChannels`; fine-tuning -> `PrunedCrossEntropy`.
Differences: the paper's networks rectify their last maps, those of a pre-activation network here
    are signed: the activation is a magnitude, or, by ``activation``, the positive part or the
    signed mean of public code. The maps of a residual block are a sum with what goes around it, so
    a channel is pruned where it is read, in its column of the linear layer, and the objective
    keeps it out while fine-tuning: it is as if its map were 0. Accuracy is that of rows of the
    clean data that are held out of the activations (``held_out``), not of the test set.
Cost: a forward pass over the clean data, and the fine-tune.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from defenses.base import (
    Between,
    Case,
    Defended,
    Defense,
    Fidelity,
    Knob,
    Need,
    OneOf,
    Phase,
    Recipes,
    Sizes,
    Space,
    Track,
    require,
)
from victims.batches import Batch
from victims.classifiers import classifier, labels
from victims.distributed import gather
from victims.draws import Draws, numpy_rng
from victims.errors import MethodFailure
from victims.lab import Lab
from victims.labels import augment_of, seen
from victims.models import Clip
from victims.recipe import Augment, Clock
from victims.selection import Penultimate
from victims.training import Objective
from victims.work import Work, fitted

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Activation(StrEnum):
    """What of a signed map counts as activity."""

    MAGNITUDE = "magnitude"
    POSITIVE = "positive"
    SIGNED = "signed"


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanActivation:
    """The mean activation of every channel of the last maps, ND."""

    name: ClassVar[str] = "mean_activation"
    version: ClassVar[int] = 1

    activation: Activation

    def __call__(self, model: Clip, batch: Batch) -> Tensor:
        net = classifier(model)
        net.meter.images_forward += len(batch)
        maps_BDHW = net.net.maps(net.normalise(batch.image))
        if self.activation == Activation.MAGNITUDE:
            maps_BDHW = maps_BDHW.abs()
        if self.activation == Activation.POSITIVE:
            maps_BDHW = maps_BDHW.relu()
        mean_BD: Tensor = maps_BDHW.mean((2, 3))
        return mean_BD


def accuracies(
    feature_ND: Floats, label_N: Ints, weight_KD: Floats, bias_K: Floats, order: Sequence[int]
) -> list[float]:
    """The share of right labels without the first 0, 1, ... of ``order``; one channel stays."""
    logit_NK, found = feature_ND @ weight_KD.T + bias_K, list[float]()
    for channel in order:
        found.append(float((logit_NK.argmax(1) == label_N).mean()))
        logit_NK = logit_NK - feature_ND[:, [channel]] * weight_KD[:, channel]
    return found


def how_many(accuracy: Sequence[float], tolerance: float) -> int:
    """How many channels can go, one after the other, before more than that share is lost."""
    least = accuracy[0] * (1 - tolerance)
    return next((n for n, found in enumerate(accuracy) if found < least), len(accuracy)) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedChannels:
    """These channels of the last maps set to 0 where they are read."""

    name: ClassVar[str] = "pruned_channels"
    version: ClassVar[int] = 1

    channels: tuple[int, ...]

    def edit(self, model: Clip) -> None:
        classifier(model).net.head.weight[:, list(self.channels)] = 0


class PrunedCrossEntropy(Objective):
    """CE of the labels, by the channels that were not pruned."""

    keep_D: Tensor

    def __init__(self, augment: Augment, keep_D: Tensor) -> None:
        super().__init__()
        self.augment = augment
        self.register_buffer("keep_D", keep_D, persistent=False)

    def views(self, batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
        return {"image": seen(self.augment, batch.image, draws)}

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        net = classifier(model)
        # Without a gradient, a column that is 0 stays 0.
        feature_BD = net.penultimate(batch.views["image"]) * self.keep_D
        logit_GK = gather(net.net.head(feature_BD).float())
        return {"cross_entropy": F.cross_entropy(logit_GK, gather(labels(batch.tokens)))}


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedCrossEntropySpec:
    name: ClassVar[str] = "pruned_cross_entropy"
    version: ClassVar[int] = 1

    augment: Augment
    channels: tuple[int, ...]

    def build(self, model: Clip) -> Objective:
        keep_D = torch.ones(classifier(model).net.head.in_features)
        keep_D[list(self.channels)] = 0
        return PrunedCrossEntropy(self.augment, keep_D)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinePruning(Defense):
    name: ClassVar[str] = "fine_pruning"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 1805.12185"
    phase: ClassVar[Phase] = Phase.FINETUNING
    tracks: ClassVar[frozenset[Track]] = frozenset({Track.SUPERVISED})
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VICTIM, Need.CLEAN_DATA})
    fidelity: ClassVar[Fidelity] = Fidelity.ADAPTED
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"signed": {"activation": "signed"}}
    knob: ClassVar[Knob | None] = Knob(name="tolerance", values=(0.0, 0.02, 0.05, 0.1, 0.2))
    space: ClassVar[Space] = {
        "tolerance": Between(low=0.0, high=0.3),
        "activation": OneOf(values=("magnitude", "positive", "signed")),
        "recipe.lr": Between(low=1e-4, high=0.1, log=True),
        "recipe.epochs": Between(low=1, high=20),
    }

    tolerance: float = 0.1
    activation: Activation = Activation.MAGNITUDE
    held_out: float = 0.2

    def check(self) -> None:
        require(
            self,
            tolerance=(0 <= self.tolerance < 1, "in [0, 1)"),
            held_out=(0 < self.held_out < 1, "in (0, 1)"),
        )

    def costs(self, recipes: Recipes, sizes: Sizes) -> Work:
        return Work(images=2 * sizes.clean) + fitted(recipes.repair, sizes.clean)

    def apply(self, lab: Lab, case: Case) -> Defended:
        self.check()
        data, recipe = case.clean_data, case.recipes.repair
        count = round(self.held_out * len(data))
        if not 0 < count < len(data):
            raise MethodFailure(
                f"fine_pruning: held_out {self.held_out:g} of {len(data)} clean rows leaves none"
                " on one side. Give more clean data."
            )
        mixed = numpy_rng(case.seed, "held_out", data.key).permutation(len(data))
        held, rest = np.sort(mixed[:count]), np.sort(mixed[count:])
        seen_ND = lab.score(MeanActivation(activation=self.activation), data, case.victim)[rest]
        order = np.argsort(seen_ND.mean(0, dtype=np.float64), kind="stable").tolist()
        feature_ND = lab.score(Penultimate(), data, case.victim)[held].astype(np.float64)
        head = classifier(lab.load(case.victim)).net.head
        weight_KD, bias_K = (t.detach().cpu().double().numpy() for t in (head.weight, head.bias))
        accuracy = accuracies(feature_ND, lab.labels(data)[held], weight_KD, bias_K, order)
        channels = tuple(sorted(order[: how_many(accuracy, self.tolerance)]))
        pruned = lab.edit(PrunedChannels(channels=channels), case.victim)
        spec = PrunedCrossEntropySpec(augment=augment_of(recipe), channels=channels)
        notes = {
            "pruned": float(len(channels)),
            "channels": float(len(order)),
            "held_out_before": accuracy[0],
            "held_out_pruned": accuracy[len(channels)],
        }
        return Defended(lab.train(spec, data, recipe, init=pruned), notes=notes)
