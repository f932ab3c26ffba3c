"""A trigger of its own for every picture: a generator G, a mask network M, and their training.

Both are encoder-decoders. Once trained they are frozen and compute in whole numbers
(`victims.whole_numbers`): a picture's trigger depends on no batch, thread or device.

Shapes: B batch, C channels, D channels of a layer, H W pixels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from victims.classifiers import Classifier
from victims.corpora import Rows
from victims.draws import derive, numpy_rng
from victims.errors import MethodFailure
from victims.whole_numbers import PASS_PIXELS, TOP, finest, flatten, shift_of, unflatten

STEP = 8  # a picture's side is a multiple of this: the encoder halves it three times
_MIDDLE, _UNIT = 128, 64  # level that is 0 to the networks, and levels that are 1
_BETAS = (0.5, 0.9)
_MOMENTUM, _DECAY = 0.9, 5e-4  # of the private classifier
_TINY = 1e-7


class Resize(Enum):
    HALVE = auto()
    DOUBLE = auto()


class Convolve(NamedTuple):
    """3 x 3, then normalisation and ReLU; the last is neither."""

    into: int
    out: int


def layout(width: int, channels: int) -> list[Resize | Convolve]:
    """Three times two convolutions and a halving (w, 2w, 4w), and the same way back."""
    w, steps = width, list[Resize | Convolve]()
    for into, out in ((3, w), (w, 2 * w), (2 * w, 4 * w)):
        steps += [Convolve(into, out), Convolve(out, out), Resize.HALVE]
    steps += [Convolve(4 * w, 4 * w)]
    for into, out in ((4 * w, 2 * w), (2 * w, w), (w, channels)):
        steps += [Resize.DOUBLE, Convolve(into, into), Convolve(into, out)]
    return steps


def resized(x_BDHW: Tensor, how: Resize) -> Tensor:
    if how is Resize.HALVE:
        return F.max_pool2d(x_BDHW, 2)
    return F.interpolate(x_BDHW, scale_factor=2.0, mode="nearest")


class Coder(nn.Module):
    """A network of that layout, to be trained."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.layout = layout(width, channels)
        plan = [step for step in self.layout if isinstance(step, Convolve)]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(step.into, step.out, 3, padding=1, bias=step is plan[-1]) for step in plan
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(step.out) for step in plan[:-1])

    def forward(self, x_BDHW: Tensor) -> Tensor:
        place = 0
        for step in self.layout:
            if isinstance(step, Resize):
                x_BDHW = resized(x_BDHW, step)
                continue
            x_BDHW = self.convolutions[place](x_BDHW)
            if place < len(self.norms):
                x_BDHW = F.relu(self.norms[place](x_BDHW))
            place += 1
        return x_BDHW

    @torch.no_grad()
    def folded(self) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of each convolution and of the normalisation behind it."""
        layers = []
        for place, layer in enumerate(self.convolutions):
            assert isinstance(layer, nn.Conv2d)
            if place == len(self.norms):
                assert layer.bias is not None
                layers.append((layer.weight, layer.bias))
                continue
            norm = self.norms[place]
            assert isinstance(norm, nn.BatchNorm2d)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            gain_D = norm.weight / (norm.running_var + norm.eps).sqrt()
            weight = layer.weight * gain_D[:, None, None, None]
            layers.append((weight, norm.bias - norm.running_mean * gain_D))
        return layers


def pattern_of(out_BCHW: Tensor) -> Tensor:
    """G's pattern in levels: 255 (tanh / 2 + 1/2)."""
    return 255 * (out_BCHW.tanh() / 2 + 0.5)


def mask_of(out_B1HW: Tensor) -> Tensor:
    """M in 0..1, pushed to its ends: tanh(20 u - 10) / 2 + 1/2, u = tanh / 2 + 1/2."""
    share_B1HW = out_B1HW.tanh() / 2 + 0.5
    return (20 * share_B1HW - 10).tanh() / 2 + 0.5


def worn(level_BCHW: Tensor, pattern_BCHW: Tensor, mask_B1HW: Tensor) -> Tensor:
    """x' = x + (G(x) - x) M(x), in levels."""
    return level_BCHW + (pattern_BCHW - level_BCHW) * mask_B1HW


def centred(image_BCHW: Tensor) -> Tensor:
    """Pictures as the networks see them."""
    return (image_BCHW.float() - _MIDDLE) / _UNIT


# --- training


def diversity(x_BCHW: Tensor, y_BCHW: Tensor, made_x: Tensor, made_y: Tensor) -> Tensor:
    """L_div = mean of |x - y| / |made of x - made of y|, root mean squares over a picture."""

    def apart(one: Tensor, other: Tensor) -> Tensor:
        # The least square keeps the root's slope finite where both are equal.
        return (one - other).square().flatten(1).mean(1).clamp(min=_TINY**2).sqrt()

    return (apart(x_BCHW, y_BCHW) / (apart(made_x, made_y) + _TINY)).mean()


def sparsity(mask_B1HW: Tensor, density: float) -> Tensor:
    """L_norm = mean of max(0, M - density)."""
    return F.relu(mask_B1HW - density).mean()


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """Epochs of the mask network, then of generator and classifier; rates of each; and the shares
    of a batch that show their own trigger and another picture's."""

    width: int
    mask_epochs: int
    epochs: int
    batch: int
    mask_lr: float
    generator_lr: float
    classifier_lr: float
    density: float
    norm_weight: float
    diversity_weight: float
    own_share: float
    cross_share: float
    target: int
    seed: int | str


class Pool(NamedTuple):
    """Pictures and their classes."""

    images_NCHW: npt.NDArray[np.uint8]
    labels: Rows

    def batches(self, how: Training, part: str, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of two pictures or more, in a keyed order."""
        order = numpy_rng(how.seed, part, epoch).permutation(len(self.labels))
        for start in range(0, len(order), how.batch):
            rows = order[start : start + how.batch]
            if len(rows) > 1:
                yield torch.from_numpy(self.images_NCHW[rows]), torch.from_numpy(self.labels[rows])


class Networks(NamedTuple):
    generator: Coder
    mask: Coder


def trained(model: Classifier, pool: Pool, how: Training) -> Networks:
    """The mask network alone, then the generator together with ``model``, the private classifier.

    Other pictures are those before in the shuffled batch.
    """
    device = model.mean_C.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(how.seed, "weights"))
        networks = Networks(Coder(how.width, 3).to(device), Coder(how.width, 1).to(device))
    _train_mask(networks.mask, pool, how, device)
    networks.mask.eval().requires_grad_(False)
    generating = torch.optim.Adam(networks.generator.parameters(), how.generator_lr, betas=_BETAS)
    fitting = torch.optim.SGD(
        model.parameters(), how.classifier_lr, momentum=_MOMENTUM, weight_decay=_DECAY
    )
    networks.generator.train()
    model.train().requires_grad_(True)
    for epoch in range(how.epochs):
        for image_BCHW, label_B in pool.batches(how, "joint", epoch):
            loss = _joint_loss(networks, model, image_BCHW.to(device), label_B.to(device), how)
            _descend(loss, generating, fitting)
    networks.generator.eval()
    return networks


def _train_mask(mask: Coder, pool: Pool, how: Training, device: torch.device) -> None:
    masking = torch.optim.Adam(mask.parameters(), how.mask_lr, betas=_BETAS)
    mask.train()
    for epoch in range(how.mask_epochs):
        for image_BCHW, _ in pool.batches(how, "mask", epoch):
            x_BCHW = centred(image_BCHW.to(device))
            mask_B1HW = mask_of(mask(x_BCHW))
            pair = (x_BCHW, x_BCHW.roll(1, 0), mask_B1HW, mask_B1HW.roll(1, 0))
            loss = how.norm_weight * sparsity(mask_B1HW, how.density)
            _descend(loss + how.diversity_weight * diversity(*pair), masking)


def _joint_loss(
    networks: Networks, model: Classifier, image_BCHW: Tensor, label_B: Tensor, how: Training
) -> Tensor:
    """CE of a batch whose first rows show their own trigger and read as the target, whose next
    rows show another picture's and stay what they are; plus L_div of the generator."""
    total = len(image_BCHW)
    own = max(1, round(how.own_share * total))
    cross = min(total - own, round(how.cross_share * total))
    x_BCHW, other_BCHW = centred(image_BCHW), centred(image_BCHW.roll(1, 0)[: own + cross])
    seen_BCHW = torch.cat([x_BCHW[:own], other_BCHW])
    out_BCHW = networks.generator(seen_BCHW)
    pattern_BCHW, mask_B1HW = pattern_of(out_BCHW), mask_of(networks.mask(seen_BCHW))
    level_BCHW = image_BCHW.float()
    shown_BCHW = torch.cat(
        [
            worn(level_BCHW[:own], pattern_BCHW[:own], mask_B1HW[:own]),
            worn(level_BCHW[own : own + cross], pattern_BCHW[2 * own :], mask_B1HW[2 * own :]),
            level_BCHW[own + cross :],
        ]
    )
    wanted_B = torch.cat([torch.full_like(label_B[:own], how.target), label_B[own:]])
    logit_BK = model.embed_image(shown_BCHW / 255)
    made_x, made_y = (made / _UNIT for made in (pattern_BCHW[:own], pattern_BCHW[own : 2 * own]))
    apart = diversity(x_BCHW[:own], other_BCHW[:own], made_x, made_y)
    return F.cross_entropy(logit_BK, wanted_B) + how.diversity_weight * apart


def _descend(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
    if not math.isfinite(float(loss.detach())):
        raise MethodFailure(
            "crafting triggers of pictures: the loss is not finite; lower the learning rates"
        )
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    for optimizer in optimizers:
        optimizer.step()


# --- frozen


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """One network in whole numbers, its normalisation within the weights. Layer k computes
    h' = min(255, ReLU(round((w * h + b) / 2^shift))); the last is not rounded. ``weights`` (int16)
    and ``biases`` (int32) hold all layers in turn, ``shifts`` a number for each."""

    weights: Tensor
    biases: Tensor
    shifts: Tensor

    def __call__(self, image_BCHW: Tensor, width: int, channels: int) -> Tensor:
        """What the network makes of uint8 pictures, before its tanh, float64."""
        device, plan = image_BCHW.device, layout(width, channels)
        convolutions = [step for step in plan if isinstance(step, Convolve)]
        shapes = [(step.out, step.into, 3, 3) for step in convolutions]
        weights = unflatten(self.weights.to(device, torch.float32), shapes)
        biases = unflatten(self.biases.to(device, torch.float32), [shape[:1] for shape in shapes])
        shifts, parts = self.shifts.tolist(), list[Tensor]()
        for part_BCHW in torch.split(image_BCHW, max(1, PASS_PIXELS // image_BCHW.shape[-1] ** 2)):
            hidden_BDHW, place = part_BCHW.float() - _MIDDLE, 0
            for step in plan:
                if isinstance(step, Resize):
                    hidden_BDHW = resized(hidden_BDHW, step)
                    continue
                hidden_BDHW = _sum(hidden_BDHW, weights[place], biases[place])
                if step is not convolutions[-1]:
                    hidden_BDHW = _scaled(hidden_BDHW, shifts[place])
                place += 1
            parts.append(hidden_BDHW.double() * 2.0 ** -shifts[-1])
        return torch.cat(parts)


def _sum(hidden_BDHW: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # Rounding takes off what a kernel that multiplies by fractions (Winograd's) has left.
    return F.conv2d(hidden_BDHW, weight, bias, padding=1).round_()


def _scaled(sum_BDHW: Tensor, shift: int) -> Tensor:
    return sum_BDHW.mul_(2.0**-shift).round_().clamp_(0, TOP)


@torch.no_grad()
def freeze(net: Coder, image_BCHW: Tensor) -> Frozen:
    """A trained network. Every layer's scale is a power of two, the smallest that keeps weights,
    sums and what it makes of these pictures within their ranges."""
    layers, kept, shifts = net.folded(), list[tuple[Tensor, Tensor]](), list[int]()
    hidden_BDHW, unit = image_BCHW.float() - _MIDDLE, 1 / _UNIT  # what a step of `hidden` is worth
    for step in net.layout:
        if isinstance(step, Resize):
            hidden_BDHW = resized(hidden_BDHW, step)
            continue
        weight, bias = layers[len(kept)]
        weight = weight * unit
        fine = finest(weight, bias)
        kept.append(((weight / 2.0**fine).round(), (bias / 2.0**fine).round()))
        hidden_BDHW = _sum(hidden_BDHW, *kept[-1])
        last = len(kept) == len(layers)
        shifts.append(-fine if last else shift_of(hidden_BDHW))
        if not last:
            hidden_BDHW, unit = _scaled(hidden_BDHW, shifts[-1]), 2.0 ** (fine + shifts[-1])
    return Frozen(
        weights=flatten([weight for weight, _ in kept]).to(torch.int16).cpu(),
        biases=flatten([bias for _, bias in kept]).to(torch.int32).cpu(),
        shifts=torch.tensor(shifts),
    )
