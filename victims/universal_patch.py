"""One patch for all pictures that sends a frozen model astray: away from what a picture shows and
from what its caption says.

The patch is painted by a generator that is trained against a discriminator and the model (Zhou et
al., "AdvCLIP: Downstream-agnostic Adversarial Examples in Multimodal Contrastive Learning", ACM MM
2023, arXiv 2308.07026), or its pixels are optimised without one. A second model may take part: the
patch is then to act differently in both. `noise_of_each` is the same aim for one picture at a time.
Every draw is keyed by a seed, the purpose and the step; the models stay as they were.

Sizes: the generator doubles a grid of 4 pixels up to 32, or to half the picture where that is less,
halving its channels each time; a last layer reaches the picture's size. The discriminator halves
the picture four times and looks at the rest as a whole. At 224 px both are AdvCLIP's.
Shapes: B batch, C channels, H W S pixels, P side of the patch, D embedding, Z noise rows, T steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from victims.batches import Batch, Loader
from victims.corpora import View
from victims.draws import Draws, derive, numpy_rng, torch_rng
from victims.errors import MethodFailure, UsageError
from victims.losses import cross_entropy
from victims.models import Clip
from victims.noise_patch import anywhere, corner_of, noise_square, side_of, wear
from victims.pixels import rows, unit
from victims.triggers import centre_of

NOISE_ROWS, NOISE_WIDTH = 16, 100
TEMPERATURE = 0.1
CLIPPED_AT = 0.01
BETAS = (0.5, 0.999)
DISCRIMINATOR_LR = 2e-4
BRIGHTER = 1.5  # the largest factor of `CraftAugment.BRIGHTNESS`
LOOKED_AT = 256  # pairs whose cosines are kept beside a patch
GRIDS = (4, 8, 16, 32)
SMALLEST = 16
TERMS = ("discriminator", "fooled", "near", "away", "topology", "between")


class Maker(StrEnum):
    """Who makes the patch: the generator, or Adam on its pixels, from nearly grey ones."""

    GENERATOR = "generator"
    DIRECT = "direct"


class Clamp(StrEnum):
    """The range of the patch while it is crafted: what a picture can show, channel by channel; or
    one range of normalised values for all, as AdvCLIP has it. The finished one can be shown."""

    PIXELS = "pixels"
    ADVCLIP = "advclip"


class Discriminator(StrEnum):
    """What the discriminator looks at."""

    PIXELS = "pixels"
    FEATURES = "features"


class CraftAugment(StrEnum):
    """`brightness` multiplies each picture by a factor drawn from 1 to 1.5."""

    NONE = "none"
    BRIGHTNESS = "brightness"


class CraftPlace(StrEnum):
    """Where the patch lies while it is crafted; `random` draws a place for every picture."""

    CORNER = "corner"
    OPPOSITE = "opposite"
    CENTRE = "centre"
    RANDOM = "random"


# --- networks


def painter_shape(size: int) -> tuple[list[int], int, int]:
    """Grids in pixels, then stride and padding of the last layer (kernel 4) that reaches ``size``.

    The stride is the smallest that covers the picture; what sticks out on each side is cut off.
    """
    if size < SMALLEST:
        raise UsageError(f"a patch is crafted on pictures of {SMALLEST} px or more, got {size}")
    grids = [grid for grid in GRIDS if grid <= size // 2]
    between = grids[-1] - 1
    stride = -(-(size - 4) // between)
    # Both sides lose equally much, which needs a stride as even as the size.
    stride += (stride - size) % 2
    return grids, stride, (between * stride + 4 - size) // 2


class Painter(nn.Module):
    """Fixed noise to one map of normalised pixels, 1CSS. In train mode it is a fixed function of
    its weights, for the noise is its only batch."""

    noise_ZN: Tensor

    def __init__(self, size: int, width: int, seed: int) -> None:
        super().__init__()
        grids, stride, padding = painter_shape(size)
        noise_ZN = torch.randn(NOISE_ROWS, NOISE_WIDTH, generator=torch_rng(seed, "painter", "z"))
        self.register_buffer("noise_ZN", noise_ZN)
        layers: list[nn.Module] = []
        before = NOISE_WIDTH
        for index in range(len(grids)):
            after = width * 2 ** (len(grids) - 1 - index)
            step, edge = (1, 0) if index == 0 else (2, 1)
            layers.append(nn.ConvTranspose2d(before, after, 4, step, edge))
            layers += [nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
            before = after
        layers += [nn.ConvTranspose2d(before, 3, 4, stride, padding), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        self.mix = nn.Conv2d(NOISE_ROWS, 1, 3, padding=1)

    def forward(self) -> Tensor:
        image_ZCSS = self.layers(self.noise_ZN[:, :, None, None])
        # The rows of the batch become the channels of one convolution.
        map_C1SS: Tensor = self.mix(image_ZCSS.transpose(0, 1))
        return map_C1SS.transpose(0, 1)


class Pixels(nn.Module):
    """The map itself as a parameter."""

    def __init__(self, start_CSS: Tensor) -> None:
        super().__init__()
        self.map = nn.Parameter(start_CSS[None].clone())

    def forward(self) -> Tensor:
        return self.map


def nearly_grey(size: int, seed: int) -> Tensor:
    """Where the pixels begin, in [0, 1]. Whole noise ends in a much worse optimum."""
    return 0.5 + 0.02 * (noise_square(size, seed) - 0.5)


def judge_of_pixels(size: int, width: int) -> nn.Sequential:
    """Normalised pictures to one logit each, B111."""
    layers: list[nn.Module] = []
    before = 3
    for index in range(4):
        after = width * 2**index
        layers.append(nn.Conv2d(before, after, 4, 2, 1))
        layers += [nn.BatchNorm2d(after)] if index else []
        layers.append(nn.LeakyReLU(0.2, inplace=True))
        before = after
    return nn.Sequential(*layers, nn.Conv2d(before, 1, size // 16))


def judge_of_features(embedding: int, width: int) -> nn.Sequential:
    """Normalised features to one logit each, B1."""
    return nn.Sequential(
        nn.Linear(embedding, 4 * width), nn.LeakyReLU(0.2, inplace=True), nn.Linear(4 * width, 1)
    )


@torch.no_grad()
def clip_weights(judge: nn.Module, clip_norm: bool) -> None:
    """All weights into +-0.01, those of the normalisation layers only with ``clip_norm``."""
    for module in judge.modules():
        if clip_norm or not isinstance(module, nn.BatchNorm2d):
            for parameter in module.parameters(recurse=False):
                parameter.clamp_(-CLIPPED_AT, CLIPPED_AT)


# --- losses


def nce(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    """InfoNCE at temperature 0.1; rows of A are the queries."""
    return cross_entropy(a_BD, b_BD, 1 / TEMPERATURE)


def neighbours(feature_BD: Tensor) -> Tensor:
    """P, BB: how near each row's features are to the others', as shares of 1.

    Cosine distances less the row's smallest one to another row, and 0 to itself.
    """
    distance_BB = 1 - feature_BD @ feature_BD.T
    self_BB = torch.eye(len(feature_BD), dtype=torch.bool, device=feature_BD.device)
    nearest_B1 = distance_BB.masked_fill(self_BB, torch.inf).amin(1, keepdim=True)
    similar_BB = (2 - (distance_BB - nearest_B1).masked_fill(self_BB, 0)) / 2
    return similar_BB / similar_BB.sum(1, keepdim=True)


def topology(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    """TOPO(A, B) = sum of KL(P_b, P_a) + KL(1 - P_b, 1 - P_a), entry by entry."""
    a_BB, b_BB = neighbours(a_BD), neighbours(b_BD)

    def divergence(p_BB: Tensor, q_BB: Tensor) -> Tensor:
        least = torch.finfo(p_BB.dtype).tiny
        return p_BB * (p_BB.clamp(min=least).log() - q_BB.clamp(min=least).log())

    return (divergence(b_BB, a_BB) + divergence(1 - b_BB, 1 - a_BB)).sum()


def away_loss(image_BD: Tensor, seen_BD: Tensor, text_BD: Tensor, text_weight: float) -> Tensor:
    """L_adv: patched pictures away from the pictures and from their captions."""
    return -nce(image_BD, seen_BD) - text_weight * nce(seen_BD, text_BD)


def topology_loss(image_BD: Tensor, seen_BD: Tensor, text_BD: Tensor, text_weight: float) -> Tensor:
    """L_topo: other neighbours than the pictures and the captions have."""
    return -topology(image_BD, seen_BD) - text_weight * topology(seen_BD, text_BD)


def between_loss(seen_BD: Tensor, reference_BD: Tensor) -> Tensor:
    """L_bd: the patched picture is to look different to the two models."""
    return -nce(seen_BD, reference_BD)


def _verdict(logit: Tensor, real: bool) -> Tensor:
    target = torch.full_like(logit, float(real))
    return F.binary_cross_entropy_with_logits(logit, target)


# --- the loop


class _Step(NamedTuple):
    """What a step looks at: pictures in [0, 1], and what the model makes of pairs as they are."""

    image_BCHW: Tensor
    image_BD: Tensor
    text_BD: Tensor
    top_B: Tensor | int
    left_B: Tensor | int


@dataclass(frozen=True, slots=True, kw_only=True)
class UniversalPatch:
    """How a patch is crafted on the first ``pairs`` rows of the data.

    Rows behind these are only looked at. ``steps`` None makes ``epochs`` over the pairs, without
    their last partial batch. ``reference_weight`` 0 takes no second model.
    """

    name: ClassVar[str] = "universal_patch"
    version: ClassVar[int] = 2

    maker: Maker
    area: float
    place: CraftPlace
    pairs: int
    batch: int
    epochs: int
    steps: int | None
    lr: float
    width: int
    fooled_weight: float
    away_weight: float
    away_text_weight: float
    topology_weight: float
    topology_text_weight: float
    reference_weight: float
    discriminator: Discriminator
    clip_norm: bool
    clamp: Clamp
    augment: CraftAugment
    seed: int

    def craft(self, model: Clip, view: View, *others: Clip) -> Mapping[str, Tensor]:
        """``patch`` CPP in [0, 1]; ``curve`` T x 6, the terms as named, unweighted; ``cosines`` of
        picture and caption: as they are, under noise, under the patch; ``worn``, the features of
        pictures under it."""
        for one in (model, *others):
            one.eval().requires_grad_(False)
        return _Craft(self, model, view, others).run()

    def num_steps(self, num_pairs: int) -> int:
        per_epoch = num_pairs // min(self.batch, num_pairs)
        return self.epochs * per_epoch if self.steps is None else self.steps


class _Craft:
    """One run of the loop."""

    def __init__(
        self, how: UniversalPatch, model: Clip, view: View, others: tuple[Clip, ...]
    ) -> None:
        self.how, self.model, self.others = how, model, others
        self.device, self.size = model.mean_C.device, view.corpus.size
        self.side = side_of(how.area, self.size)
        self.total = min(how.pairs, len(view))
        self.batch = min(how.batch, self.total)
        if self.side == 0 or self.batch < 2:
            raise UsageError(
                f"a patch of {self.side} px on batches of {self.batch} pairs: there is nothing to"
                " craft; an area above 0 and two pairs are the least"
            )
        after = np.arange(self.total, len(view))
        self.looked_at = (after if len(after) else np.arange(self.total))[:LOOKED_AT]
        self.loader = Loader(view, model, self.device)
        if how.clamp == Clamp.ADVCLIP:
            self.low, self.high = torch.tensor(-2.118), torch.tensor(2.640)
        else:
            self.low = (0 - model.mean_C) / model.std_C
            self.high = (1 - model.mean_C) / model.std_C
        self.low, self.high = self.low.to(self.device), self.high.to(self.device)
        corner, centre = corner_of(self.side, self.size), centre_of(self.size, self.side)
        self.start = {
            CraftPlace.CORNER: corner,
            CraftPlace.RANDOM: corner,
            CraftPlace.CENTRE: centre,
            CraftPlace.OPPOSITE: self.size - self.side - corner,
        }[how.place]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(how.seed, how.name, "init"))
            self.maker, self.judge = self._maker(), self._judge()

    def _maker(self) -> Painter | Pixels:
        if self.how.maker == Maker.GENERATOR:
            return Painter(self.size, self.how.width, self.how.seed).to(self.device)
        start_CSS = nearly_grey(self.size, self.how.seed).to(self.device)
        return Pixels((start_CSS - self.model.mean_C) / self.model.std_C)

    def _judge(self) -> nn.Module | None:
        if not self.how.fooled_weight:
            return None
        if self.how.discriminator == Discriminator.PIXELS:
            return judge_of_pixels(self.size, self.how.width).to(self.device)
        width = self.model.width
        return judge_of_features(width, self.how.width).to(self.device)

    def patch(self) -> Tensor:
        """The square of the map, in the values of pictures in [0, 1], CPP."""
        span = slice(self.start, self.start + self.side)
        square_CPP = self.maker()[0, :, span, span].clamp(min=self.low, max=self.high)
        patch_CPP: Tensor = square_CPP * self.model.std_C + self.model.mean_C
        return patch_CPP

    def run(self) -> dict[str, Tensor]:
        how = self.how
        painting = torch.optim.Adam(self.maker.parameters(), lr=how.lr, betas=BETAS)
        judging = None
        if self.judge is not None:
            weights = self.judge.parameters()
            judging = torch.optim.Adam(weights, lr=DISCRIMINATOR_LR, betas=BETAS)
        num_steps = how.num_steps(self.total)
        curve_T6 = torch.zeros(num_steps, len(TERMS), device=self.device)
        for step in range(num_steps):
            terms = self.step(self._drawn(step), painting, judging)
            curve_T6[step] = torch.stack([term.detach() for term in terms])
        if not bool(curve_T6.isfinite().all()):
            step = int(curve_T6.isfinite().all(1).logical_not().nonzero()[0])
            raise MethodFailure(f"crafting a patch: the loss is not finite at step {step}")
        # The last step moved the generator: what it paints now was never pasted.
        with torch.no_grad():
            patch_CPP = self.patch().clamp(0, 1)
        noise_CPP = noise_square(self.side, how.seed)
        text_BD = self._look(None)[1]
        seen = [self._look(square_CPP)[0] for square_CPP in (None, noise_CPP, patch_CPP)]
        cosines = torch.stack([(image_BD * text_BD).sum(1).mean() for image_BD in seen])
        return {"patch": patch_CPP, "curve": curve_T6, "cosines": cosines, "worn": seen[2]}

    def _drawn(self, step: int) -> _Step:
        how = self.how
        epoch, index = divmod(step, self.total // self.batch)
        order_N = numpy_rng(how.seed, how.name, "order", epoch).permutation(self.total)
        batch = self.loader(order_N[index * self.batch : (index + 1) * self.batch])
        image_BCHW = unit(batch.image)
        generator = torch_rng(how.seed, how.name, "step", step)
        draws = Draws(generator, self.batch, 0, self.batch)
        if how.augment == CraftAugment.BRIGHTNESS:
            factor_B = draws.uniform(low=1.0, high=BRIGHTER).to(self.device)
            image_BCHW = (image_BCHW * rows(factor_B)).clamp(max=1)
        places: tuple[Tensor | int, Tensor | int] = (self.start, self.start)
        if how.place == CraftPlace.RANDOM:
            top, left = anywhere(draws, self.side, self.size)
            places = top.to(self.device), left.to(self.device)
        with torch.no_grad():
            image_BD = self.model.encode_image(image_BCHW)
            text_BD = self.model.encode_text(batch.tokens)
        return _Step(image_BCHW, image_BD, text_BD, *places)

    def step(
        self,
        drawn: _Step,
        painting: torch.optim.Optimizer,
        judging: torch.optim.Optimizer | None,
    ) -> list[Tensor]:
        """Train the discriminator, then the generator; the terms in the order of `TERMS`.

        The generator does not change in between, so it paints once for both.
        """
        how, model = self.how, self.model
        worn_BCHW = wear(drawn.image_BCHW, self.patch(), drawn.top_B, drawn.left_B)
        seen_BD = model.encode_image(worn_BCHW)
        plain, worn = model.normalise(drawn.image_BCHW), model.normalise(worn_BCHW)
        nothing = torch.zeros((), device=self.device)
        judged, fooled, between = nothing, nothing, nothing
        if self.judge is not None and judging is not None:
            pixels = how.discriminator == Discriminator.PIXELS
            real, fake = (plain, worn) if pixels else (drawn.image_BD, seen_BD)
            judged = _verdict(self.judge(real), True) + _verdict(self.judge(fake.detach()), False)
            judging.zero_grad()
            judged.backward()  # type: ignore[no-untyped-call]
            judging.step()
            clip_weights(self.judge, how.clip_norm)
            fooled = _verdict(self.judge(fake), True)
        near = F.mse_loss(worn, plain)
        features = (drawn.image_BD, seen_BD, drawn.text_BD)
        away = away_loss(*features, how.away_text_weight)
        shape = topology_loss(*features, how.topology_text_weight)
        if how.reference_weight:
            (reference,) = self.others
            between = between_loss(seen_BD, reference.encode_image(worn_BCHW))
        loss = (
            how.fooled_weight * fooled
            + near
            + how.away_weight * away
            + how.topology_weight * shape
            + how.reference_weight * between
        )
        painting.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        painting.step()
        if isinstance(self.maker, Pixels):
            # Outside the range a pixel would have no gradient to come back by.
            with torch.no_grad():
                self.maker.map.clamp_(min=self.low, max=self.high)
        return [judged, fooled, near, away, shape, between]

    @torch.no_grad()
    def _look(self, square_CPP: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features of the pictures that are looked at, under a patch, and of their captions."""
        batch = self.loader(self.looked_at)
        image_BCHW = unit(batch.image)
        if square_CPP is not None:
            image_BCHW = wear(image_BCHW, square_CPP, self.start, self.start)
        return self.model.encode_image(image_BCHW), self.model.encode_text(batch.tokens)


# --- one picture at a time


def noise_of_each(
    model: Clip,
    batch: Batch,
    start_BCHW: Tensor,
    *,
    reach: float,
    steps: int,
    text_weight: float,
) -> Tensor:
    """Pictures in [0, 1], each moved by at most ``reach`` per pixel, away from itself and from its
    caption.

    Projected signed steps of 2.5 ``reach`` / ``steps`` down cos(f(x'), f(x)) + w cos(f(x'), g(t)),
    from ``start`` (in -1..1 of the reach). No row looks at another, as the frozen model must be in
    eval mode, so a part of a batch gets what the batch would.
    """
    image_BCHW = unit(batch.image)
    low, high = (image_BCHW - reach).clamp(min=0), (image_BCHW + reach).clamp(max=1)
    with torch.no_grad():
        away_BD = model.encode_image(image_BCHW) + text_weight * model.encode_text(batch.tokens)
    moved_BCHW = (image_BCHW + reach * start_BCHW).clamp(min=low, max=high)
    for _ in range(steps):
        moved_BCHW = moved_BCHW.detach().requires_grad_(True)
        with torch.enable_grad():
            total = (model.encode_image(moved_BCHW) * away_BD).sum()
            (slope_BCHW,) = torch.autograd.grad(total, moved_BCHW)
        step_BCHW = 2.5 * reach / steps * slope_BCHW.sign()
        moved_BCHW = (moved_BCHW.detach() - step_BCHW).clamp(min=low, max=high)
    return moved_BCHW.detach()
