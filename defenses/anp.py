"""Adversarial neuron pruning: cut the channels by which small weight changes bring the trigger out.

Idea: a poisoned network predicts the target as soon as some of its channels are perturbed; learn,
    on a few clean pictures, a mask over channels that keeps the labels right under the worst
    perturbation, and prune the channels whose mask has gone down.
Reference: Wu, Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", NeurIPS 2021,
    arXiv 2110.14430.
Symbols: m = the masks; delta, xi = the perturbations of weights and biases; epsilon = ``eps``;
    alpha = ``alpha``; T_0 = ``iterations``; the threshold on m = ``threshold``.
Where: min over m of alpha L(m w, b) + (1 - alpha) max over delta, xi of L((m + delta) w,
    (1 + xi) b) -> `NeuronMasks.craft`, its maximum -> `NeuronMasks.worst`; pruning -> `below`,
    `PrunedNorms`.
Differences: as released, a neuron is a channel of a batch normalisation, whose weight and bias are
    w and b, pruning sets its weight to 0 and lets its bias stay, and statistics while masks are
    learned are the batches'. The ascent starts at random in the ball and its signed steps of
    epsilon / ``steps`` are cut off at the ball, which the released code leaves. The normalisations
    of a pre-activation network stand before its convolutions: a pruned channel is one that a block
    does not read, and may go around it. The number of pruned channels is chosen by test accuracy in
    the released code; here the threshold is the paper's, or a ``number`` is given.
Cost: per iteration two views with gradient, and one for each step of the ascent; no training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from defenses.base import (
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
from victims.batches import Loader
from victims.classifiers import classifier, labels
from victims.corpora import View
from victims.draws import Draws, numpy_rng, torch_rng
from victims.lab import Lab
from victims.labels import seen
from victims.models import Clip
from victims.recipe import Augment
from victims.work import Work

# By layer, one number per channel; channels by layer.
Channels = Mapping[str, Tensor]
Chosen = Mapping[str, tuple[int, ...]]


def norms_of(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


class _Logits(nn.Module):
    """The logits as a module's forward, which a functional call asks for."""

    def __init__(self, model: Clip) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.model.embed_image(image_BCHW)


def loss_with(
    model: Clip, weight: Channels, bias: Channels, image_BCHW: Tensor, label_B: Tensor
) -> Tensor:
    """The cross-entropy with every channel's weight and bias multiplied by a factor."""
    scaled = dict[str, Tensor]()
    for name, norm in norms_of(model).items():
        scaled[f"model.{name}.weight"] = norm.weight * weight[name]
        scaled[f"model.{name}.bias"] = norm.bias * bias[name]
    logit_BK = functional_call(_Logits(model), scaled, (image_BCHW,))
    return F.cross_entropy(logit_BK, label_B)


@dataclass(frozen=True, slots=True, kw_only=True)
class NeuronMasks:
    """The masks of all channels, by the name of their layer."""

    name: ClassVar[str] = "neuron_masks"
    version: ClassVar[int] = 1

    eps: float
    alpha: float
    lr: float
    momentum: float
    iterations: int
    steps: int
    batch_size: int
    augment: Augment
    seed: int

    def craft(self, model: Clip, view: View, *others: Clip) -> Mapping[str, Tensor]:
        classifier(model).train().requires_grad_(False)
        device, rows = model.mean_C.device, min(self.batch_size, len(view))
        loader = Loader(view, model, device)
        one = {name: torch.ones_like(norm.weight) for name, norm in norms_of(model).items()}
        mask = {name: one_C.clone().requires_grad_() for name, one_C in one.items()}
        optimizer = torch.optim.SGD(mask.values(), self.lr, self.momentum)
        for step in range(self.iterations):
            batch = loader(numpy_rng(self.seed, "rows", step).integers(len(view), size=rows))
            draws = Draws(torch_rng(self.seed, "views", step, device=device), rows, 0, rows)
            image_BCHW = seen(self.augment, batch.image, draws)
            label_B = labels(batch.tokens)
            delta, xi = self.worst(model, mask, image_BCHW, label_B, step)
            robust = loss_with(model, moved(mask, delta), moved(one, xi), image_BCHW, label_B)
            natural = loss_with(model, mask, one, image_BCHW, label_B)
            loss = self.alpha * natural + (1 - self.alpha) * robust
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                for mask_C in mask.values():
                    mask_C.clamp_(0, 1)
        return mask

    def worst(
        self, model: Clip, mask: Channels, image_BCHW: Tensor, label_B: Tensor, step: int
    ) -> tuple[Channels, Channels]:
        """delta and xi, as far as the ascent comes within the ball."""
        rng = torch_rng(self.seed, "start", step)
        held = {name: mask_C.detach() for name, mask_C in mask.items()}
        one = {name: torch.ones_like(held_C) for name, held_C in held.items()}

        def start() -> dict[str, Tensor]:
            return {
                name: ((2 * torch.rand(held_C.shape, generator=rng) - 1) * self.eps)
                .to(held_C.device)
                .requires_grad_()
                for name, held_C in held.items()
            }

        delta, xi = start(), start()
        moving = [*delta.values(), *xi.values()]
        for _ in range(self.steps):
            loss = loss_with(model, moved(held, delta), moved(one, xi), image_BCHW, label_B)
            gradients = torch.autograd.grad(loss, moving)
            with torch.no_grad():
                for value_C, gradient_C in zip(moving, gradients, strict=True):
                    value_C.add_(gradient_C.sign(), alpha=self.eps / self.steps)
                    value_C.clamp_(-self.eps, self.eps)
        delta, xi = ({n: v.detach() for n, v in found.items()} for found in (delta, xi))
        return delta, xi


def moved(factor: Channels, by: Channels) -> Channels:
    return {name: factor_C + by[name] for name, factor_C in factor.items()}


def below(mask: Channels, threshold: float, number: int | None) -> Chosen:
    """The channels whose mask is at most ``threshold``; or the ``number`` of lowest masks, of
    equal ones the first in the order of the layers."""
    if number is not None:
        every = [
            (value, place, name, channel)
            for place, (name, mask_C) in enumerate(mask.items())
            for channel, value in enumerate(mask_C.tolist())
        ]
        lowest = [(name, channel) for _, _, name, channel in sorted(every)[:number]]
    else:
        lowest = [
            (name, channel)
            for name, mask_C in mask.items()
            for channel in torch.nonzero(mask_C <= threshold)[:, 0].tolist()
        ]
    return {name: tuple(sorted(c for n, c in lowest if n == name)) for name, _ in lowest}


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedNorms:
    """The weight of these channels of normalisations set to 0, by layer."""

    name: ClassVar[str] = "pruned_norms"
    version: ClassVar[int] = 1

    channels: Chosen

    def edit(self, model: Clip) -> None:
        norms = norms_of(model)
        for name, channels in self.channels.items():
            norms[name].weight[list(channels)] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Anp(Defense):
    name: ClassVar[str] = "anp"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2110.14430"
    phase: ClassVar[Phase] = Phase.FINETUNING
    tracks: ClassVar[frozenset[Track]] = frozenset({Track.SUPERVISED})
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VICTIM, Need.CLEAN_DATA})
    fidelity: ClassVar[Fidelity] = Fidelity.READING
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # For a network of 80,000 weights.
        "small": {"iterations": 300}
    }
    # Two iterations move no mask to the threshold.
    quick: ClassVar[Mapping[str, Any]] = {"iterations": 2, "batch_size": 32, "number": 5}
    knob: ClassVar[Knob | None] = Knob(name="threshold", values=(0.05, 0.1, 0.2, 0.4, 0.6))
    space: ClassVar[Space] = {
        "threshold": Between(low=0.05, high=0.9),
        "eps": Between(low=0.1, high=0.8),
        "alpha": Between(low=0.05, high=0.95),
    }

    eps: float = 0.4
    alpha: float = 0.2
    lr: float = 0.2
    momentum: float = 0.9
    iterations: int = 2000
    steps: int = 1
    batch_size: int = 128
    threshold: float = 0.2
    number: int | None = None
    augment: Augment = Augment.NONE

    def fits_by_recipe(self) -> bool:
        return False

    def check(self) -> None:
        require(
            self,
            eps=(self.eps >= 0, "0 or more"),
            alpha=(0 <= self.alpha <= 1, "in 0..1"),
            lr=(self.lr > 0, "above 0"),
            momentum=(0 <= self.momentum < 1, "in [0, 1)"),
            iterations=(self.iterations >= 1, "at least 1"),
            steps=(self.steps >= 1, "at least 1"),
            batch_size=(self.batch_size >= 2, "at least 2"),
            threshold=(0 <= self.threshold < 1, "in [0, 1)"),
            number=(self.number is None or self.number >= 0, "0 or more, or null"),
        )

    def costs(self, recipes: Recipes, sizes: Sizes) -> Work:
        rows = min(self.batch_size, sizes.clean)
        return Work(images_trained=self.iterations * (self.steps + 2) * rows)

    def apply(self, lab: Lab, case: Case) -> Defended:
        self.check()
        masks = NeuronMasks(
            eps=self.eps,
            alpha=self.alpha,
            lr=self.lr,
            momentum=self.momentum,
            iterations=self.iterations,
            steps=self.steps,
            batch_size=self.batch_size,
            augment=self.augment,
            seed=case.seed,
        )
        mask = lab.tensor(masks, case.clean_data, case.victim)
        chosen = below(mask, self.threshold, self.number)
        model = lab.edit(PrunedNorms(channels=chosen), case.victim)
        notes = {
            "pruned": float(sum(map(len, chosen.values()))),
            "channels": float(sum(map(len, mask.values()))),
            "lowest_mask": min(float(mask_C.min()) for mask_C in mask.values()),
        }
        return Defended(model, notes=notes)
