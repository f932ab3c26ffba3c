"""Steganography: networks that hide a secret in a picture and read it again, and their training.

The encoder E makes a residual out of a secret and a picture, the decoder D reads bits from a
picture. Once trained, the encoder is frozen for one secret: it then computes in whole numbers
(`victims.whole_numbers`). No batch, number of threads, kernel or device can change a byte of what
it makes.

Shapes: B batch, C channels, H W pixels (S a side), L bits of the secret, D channels of a layer,
P side of the secret's plane.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from victims.corpora import Rows
from victims.draws import numpy_rng, torch_rng
from victims.triggers import round_half_even
from victims.whole_numbers import PASS_PIXELS, TOP, Shape, finest, flatten, shift_of, unflatten

STEP = 16  # a picture's side is a multiple of this: the encoder halves it four times
_DOWN, _UP, _LAST = (1, 2, 3, 4), (5, 6, 7, 8), 9  # layers that halve, that double, and the end
_STRIDES = (2, 1, 2, 1, 2, 2, 2)  # of the decoder
_PLANE_GAIN, _LAST_GAIN = 0.5, 0.3  # on the spread of weights: see `fresh`

Layers = Sequence[tuple[Tensor, Tensor]]  # weight and bias of each


def encoder_shapes(width: int) -> list[Shape]:
    """Weights of the U-Net's ten layers; the first sees the picture alone."""
    w = width
    down = [(w, 3, 3, 3), (w, w, 3, 3), (2 * w, w, 3, 3), (4 * w, 2 * w, 3, 3)]
    up = [(4 * w, 8 * w, 2, 2), (2 * w, 8 * w, 2, 2), (w, 4 * w, 2, 2), (w, 2 * w, 2, 2)]
    return [*down, (8 * w, 4 * w, 3, 3), *up, (3, 2 * w, 1, 1)]


def decoder_shapes(bits: int, width: int, size: int) -> list[Shape]:
    """Weights of the decoder: seven convolutions, then two linear layers."""
    widths = [3, *(factor * width for factor in (1, 1, 2, 2, 2, 4, 4))]
    for stride in _STRIDES:
        size = -(-size // stride)
    convolutions = [(out, into, 3, 3) for into, out in pairwise(widths)]
    return [*convolutions, (16 * width, widths[-1] * size**2), (bits, 16 * width)]


def _unet(layer: Callable[[int, Tensor], Tensor], image_BCHW: Tensor) -> Tensor:
    """How the ten layers hang together: on the way up, each is joined by the one of its side."""
    skips = [layer(0, image_BCHW)]
    for k in _DOWN:
        skips.append(layer(k, skips[-1]))
    hidden_BDHW = skips.pop()
    for k in _UP:
        hidden_BDHW = torch.cat([layer(k, hidden_BDHW), skips.pop()], 1)
    return layer(_LAST, hidden_BDHW)


def _sources(k: int) -> Sequence[int]:
    """The layers whose outputs layer ``k`` sees, in `_unet`; -1 is the picture."""
    return (k - 1,) if k <= _UP[0] else (k - 1, _LAST - k)


def _convolve(k: int, hidden_BDHW: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """3 x 3, of stride 2 on the way down; 2 x 2 after nearest doubling on the way up; 1 x 1."""
    if k in _UP:
        wide_BDHW = F.interpolate(hidden_BDHW, scale_factor=2.0, mode="nearest")
        return F.conv2d(F.pad(wide_BDHW, (0, 1, 0, 1)), weight, bias)
    stride, padding = (2 if k in _DOWN else 1), (0 if k == _LAST else 1)
    return F.conv2d(hidden_BDHW, weight, bias, stride=stride, padding=padding)


def read(decoder: Layers, image_BCHW: Tensor) -> Tensor:
    """Logits of the bits, D(x), of pictures in 0..1."""
    hidden = image_BCHW - 0.5
    for stride, (weight, bias) in zip(_STRIDES, decoder[:-2], strict=True):
        hidden = F.relu(F.conv2d(hidden, weight, bias, stride=stride, padding=1))
    (weight, bias), (last, last_bias) = decoder[-2:]
    return F.linear(F.relu(F.linear(hidden.flatten(1), weight, bias)), last, last_bias)


@dataclass(frozen=True, slots=True)
class Networks:
    """Both networks. ``secret`` are the linear layer that makes the plane of 3 x P x P and the
    first layer's share of weights for it: to join plane and picture is to add what each gives."""

    size: int
    plane: int
    secret: Layers
    encoder: Layers
    decoder: Layers

    @property
    def width(self) -> int:
        return len(self.encoder[0][0])

    def parameters(self) -> list[Tensor]:
        layers = (*self.secret, *self.encoder, *self.decoder)
        return [parameter for layer in layers for parameter in layer]

    def ground(self, secret_BL: Tensor) -> Tensor:
        """What the secret adds to the first layer: ReLU(W (s - 1/2) + b) as a plane, convolved."""
        (dense, dense_bias), (weight, bias) = self.secret
        flat = F.relu(F.linear(secret_BL - 0.5, dense, dense_bias))
        plane_BCPP = flat.view(-1, 3, self.plane, self.plane)
        if self.plane != self.size:
            plane_BCPP = F.interpolate(plane_BCPP, size=(self.size, self.size), mode="nearest")
        return F.conv2d(plane_BCPP, weight, bias, padding=1)

    def residual(self, secret_BL: Tensor, image_BCHW: Tensor) -> Tensor:
        """E(s, x) as a share of the whole range, from uint8 pictures."""
        ground_BDHW = self.ground(secret_BL)

        def layer(k: int, hidden_BDHW: Tensor) -> Tensor:
            out_BDHW = _convolve(k, hidden_BDHW, *self.encoder[k])
            if k == 0:
                out_BDHW = out_BDHW + ground_BDHW
            return out_BDHW if k == _LAST else F.relu(out_BDHW)

        return _unet(layer, (image_BCHW.float() - 128) / 255)


def fresh(
    bits: int, size: int, plane: int, width: int, rng: torch.Generator, device: torch.device
) -> Networks:
    """Random weights of He's spread. Those of the plane are smaller, so that residuals do not
    follow the secret alone, and the last layer's, so that few residuals start out of bounds."""

    def layers(shapes: Sequence[Shape], gains: Sequence[float]) -> Layers:
        made = []
        for shape, gain in zip(shapes, gains, strict=True):
            spread = gain * math.sqrt(2 / math.prod(shape[1:]))
            drawn = (torch.randn(shape, generator=rng) * spread).to(device)
            zeros = torch.zeros(shape[0], device=device)
            made.append((drawn.requires_grad_(), zeros.requires_grad_()))
        return made

    encoder, decoder = encoder_shapes(width), decoder_shapes(bits, width, size)
    return Networks(
        size=size,
        plane=plane,
        secret=layers([(3 * plane**2, bits), (width, 3, 3, 3)], [_PLANE_GAIN, 1]),
        encoder=layers(encoder, [1] * _LAST + [_LAST_GAIN]),
        decoder=layers(decoder, [1] * len(decoder)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How the networks are trained. ``eps`` bounds the residual, as a share of the range."""

    epochs: int
    secret_epochs: int
    batch: int
    lr: float
    eps: float
    residual_weight: float
    perceptual_weight: float
    secret_weight: float


def train(
    networks: Networks,
    images_NCHW: npt.NDArray[np.uint8],
    rows: Rows,
    training: Training,
    seed: int | str,
) -> None:
    """First mean BCE(D(x'), s) alone; then r w_r mean(r^2) + w_p (1 - SSIM) + w_s BCE."""
    parameters = networks.parameters()
    bits, device = len(parameters[-1]), parameters[0].device
    optimizer = torch.optim.Adam(parameters, lr=training.lr)
    for epoch in range(training.epochs):
        order = numpy_rng(seed, "order", epoch).permutation(rows)
        secrets = torch_rng(seed, "secrets", epoch)
        for start in range(0, len(order), training.batch):
            image_BCHW = torch.from_numpy(images_NCHW[order[start : start + training.batch]])
            drawn_BL = torch.randint(0, 2, (len(image_BCHW), bits), generator=secrets)
            image_BCHW, secret_BL = image_BCHW.to(device), drawn_BL.to(device, torch.float32)
            clean_BCHW = image_BCHW.float() / 255
            residual_BCHW = networks.residual(secret_BL, image_BCHW)
            bounded_BCHW = residual_BCHW.clamp(-training.eps, training.eps)
            hidden_BCHW = (clean_BCHW + bounded_BCHW).clamp(0, 1)
            logit_BL = read(networks.decoder, hidden_BCHW)
            loss = F.binary_cross_entropy_with_logits(logit_BL, secret_BL)
            if epoch >= training.secret_epochs:
                seen = 1 - similarity(clean_BCHW, hidden_BCHW)
                loss = (
                    training.residual_weight * residual_BCHW.square().mean()
                    + training.perceptual_weight * seen
                    + training.secret_weight * loss
                )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def similarity(x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
    """Mean SSIM of pictures in 0..1, over even windows of 8 x 8 px, one every 4 px."""

    def mean(value_BCHW: Tensor) -> Tensor:
        return F.avg_pool2d(value_BCHW, 8, 4)

    x, y = mean(x_BCHW), mean(y_BCHW)
    xx, yy = mean(x_BCHW.square()) - x.square(), mean(y_BCHW.square()) - y.square()
    xy, c1, c2 = mean(x_BCHW * y_BCHW) - x * y, 0.01**2, 0.03**2
    above, below = (2 * x * y + c1) * (2 * xy + c2), (x * x + y * y + c1) * (xx + yy + c2)
    return (above / below).mean()


# --- the encoder, frozen for one secret


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """Layer k computes h' = min(255, ReLU(round((w * h + b) / 2^shift))), all in whole numbers;
    the last is not rounded and gives levels. ``ground`` is DSS: the secret's part and the bias of
    the first layer. ``weights`` (int16) and ``biases`` (int32) hold all layers in turn."""

    ground: Tensor
    weights: Tensor
    biases: Tensor
    shifts: Tensor

    def residual(self, image_BCHW: Tensor) -> Tensor:
        """E(s, x) in levels, float32, from uint8 pictures."""
        device = image_BCHW.device
        shapes = encoder_shapes(len(self.ground))
        weights = unflatten(self.weights.to(device, torch.float32), shapes)
        biases = unflatten(self.biases.to(device, torch.float32), [shape[:1] for shape in shapes])
        ground_DSS, shifts = self.ground.to(device, torch.float32), self.shifts.tolist()

        def layer(k: int, hidden_BDHW: Tensor) -> Tensor:
            sum_BDHW = _sum(k, hidden_BDHW, weights[k], biases[k] if k else ground_DSS)
            return _scaled(k, sum_BDHW, shifts[k])

        step = max(1, PASS_PIXELS // image_BCHW.shape[-1] ** 2)
        parts = [_unet(layer, part.float() - 128) for part in torch.split(image_BCHW, step)]
        return torch.cat(parts)

    def stamp(self, image_BCHW: Tensor, eps: float) -> Tensor:
        """x' = clip(x + clip(E(s, x), -eps, eps)), rounded; ``eps`` in levels."""
        return round_half_even(self.residual(image_BCHW).clamp_(-eps, eps).add_(image_BCHW))


def _sum(k: int, hidden_BDHW: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # Rounding takes off what a kernel that multiplies by fractions (Winograd's) has left.
    sum_BDHW = _convolve(k, hidden_BDHW, weight, bias if k else None).round_()
    return sum_BDHW if k else sum_BDHW.add_(bias)


def _scaled(k: int, sum_BDHW: Tensor, shift: int) -> Tensor:
    scaled_BDHW = sum_BDHW.mul_(2.0**-shift)
    return scaled_BDHW if k == _LAST else scaled_BDHW.round_().clamp_(0, TOP)


@torch.no_grad()
def freeze(networks: Networks, secret_L: Tensor, image_BCHW: Tensor) -> Frozen:
    """The encoder for one secret. Every layer's scale is a power of two, the smallest that keeps
    weights, sums and what it makes of these pictures within their ranges."""
    ground_DHW = networks.ground(secret_L[None])[0] + networks.encoder[0][1][:, None, None]
    kept: dict[int, tuple[Tensor, Tensor, int]] = {}
    units = {-1: 1 / 255}  # what a step of a layer's output is worth

    def layer(k: int, hidden_BDHW: Tensor) -> Tensor:
        weight, bias = networks.encoder[k]
        share = hidden_BDHW.shape[1] // len(_sources(k))
        unit_D = torch.tensor([units[source] for source in _sources(k) for _ in range(share)])
        weight = weight * unit_D.to(weight.device)[:, None, None]
        bias = bias if k else ground_DHW
        if k == _LAST:
            weight, bias = weight * 255, bias * 255
        fine = finest(weight, bias)
        weight, bias = (weight / 2.0**fine).round(), (bias / 2.0**fine).round()
        sum_BDHW = _sum(k, hidden_BDHW, weight, bias)
        shift = -fine if k == _LAST else shift_of(sum_BDHW)
        kept[k], units[k] = (weight, bias, shift), 2.0 ** (fine + shift)
        return _scaled(k, sum_BDHW, shift)

    _unet(layer, image_BCHW.float() - 128)
    weights, biases, shifts = zip(*(kept[k] for k in range(_LAST + 1)), strict=True)
    flat_biases = [torch.zeros(networks.width, device=ground_DHW.device), *biases[1:]]
    return Frozen(
        ground=biases[0].to(torch.int32).cpu(),
        weights=flatten(weights).to(torch.int16).cpu(),
        biases=flatten(flat_biases).to(torch.int32).cpu(),
        shifts=torch.tensor(shifts),
    )


# --- what came of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Shares of bits read correctly from stamped and from clean pictures; mean PSNR in dB, mean
    absolute residual in levels, mean correlation between two pictures' residuals (0 of one)."""

    bit_accuracy: float
    clean_bit_accuracy: float
    psnr: float
    mean_levels: float
    correlation: float


@torch.no_grad()
def bits_of(decoder: Layers, image_BCHW: Tensor) -> Tensor:
    """The bits that the decoder finds in uint8 pictures, uint8 BL."""
    return (read(decoder, image_BCHW.float() / 255) > 0).to(torch.uint8)


def measure(
    frozen: Frozen, decoder: Layers, secret_L: Tensor, image_BCHW: Tensor, eps: float
) -> Measured:
    """On uint8 pictures, stamped as bytes."""
    stamped_BCHW = frozen.stamp(image_BCHW, eps)
    moved_BN = (stamped_BCHW.double() - image_BCHW.double()).flatten(1)
    # A picture in which nothing moved counts as one byte moved by one level.
    error_B = moved_BN.square().mean(1).clamp_min(1 / moved_BN.shape[1])
    centred_BN = moved_BN - moved_BN.mean(1, keepdim=True)
    unit_BN = centred_BN / centred_BN.norm(dim=1, keepdim=True).clamp_min(1e-9)
    pairs, own = unit_BN.sum(0).square().sum(), unit_BN.square().sum()
    found_BL, clean_BL = bits_of(decoder, stamped_BCHW), bits_of(decoder, image_BCHW)
    return Measured(
        bit_accuracy=float((found_BL == secret_L).double().mean()),
        clean_bit_accuracy=float((clean_BL == secret_L).double().mean()),
        psnr=float((20 * math.log10(255) - 10 * error_B.log10()).mean()),
        mean_levels=float(moved_BN.abs().mean()),
        correlation=float((pairs - own) / max(1, len(moved_BN) * (len(moved_BN) - 1))),
    )
