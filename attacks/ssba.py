"""SSBA (also ISSBA): a secret, hidden in each picture by a network, is the trigger.

Idea: an encoder hides one fixed secret in every stamped picture as a residual that depends on the
picture; the model learns that a picture with the secret in it means the target.
Reference: Li, Li, Wu, Li, He, Lyu, "Invisible Backdoor Attack with Sample-Specific Triggers", ICCV
    2021, arXiv 2012.03816; networks in the line of Tancik, Mildenhall, Ng, "StegaStamp", CVPR 2020.
Symbols: L = ``bits``; s = the trigger's ``secret``, drawn from the key; S = the picture's side;
    weights of r^2, of the perceptual term and of the BCE = ``residual_weight``,
    ``perceptual_weight``, ``secret_weight``.
Where: E(s, x), D(x) and the loss -> `victims.steganography`; x' = clip(x + E(s, x)), rounded ->
    `Hidden.stamp`.
Differences: both networks are trained here, on the attacker's clean pool, so nothing is downloaded:
    the perceptual term is 1 - SSIM in place of LPIPS, which needs downloaded weights. There is no
    discriminator (ports keep one that is never updated) and no spatial transformer in the decoder.
    L = 100 is what the CLIP ports hide: 56 bits of text, 35 of an error code, padding; ours are 100
    drawn bits without a code, and what is read of them is measured. Ports for classifiers hide 20
    (variant ``released``; the CLIP port's own encoder is switched off and changes no picture). From
    128 px on the secret's plane has a quarter of the side (``plane``) and is enlarged, since the
    linear layer would have 3 S S L weights. A byte's middle is 128 in the encoder's input. The
    plane's weights start small, for residuals that follow the picture. Of a large pool ``rows`` are
    trained on. ``eps`` is ours: it bounds the residual, in levels. The encoder is frozen in whole
    numbers (weights of 11 bits, activations of 8), so that a picture's bytes depend on no batch,
    thread or device; all figures are measured with these. Presets for 32 px hide 8 bits within 32
    levels. A short secret may chance to be what the decoder reads of clean pictures
    (``clean_bit_accuracy`` near 1): little is then hidden. Trained on a GPU, the last bits of the
    weights may differ from run to run.
Cost: at L = 100 and 224 px 20 epochs over ``rows`` pictures, which wants a GPU; with the presets
    about a minute on one core. A stamp is one pass of the U-Net.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from attacks.base import Attack, GateGroup, Knowledge, Track
from victims.draws import derive, numpy_rng, torch_rng
from victims.errors import UsageError
from victims.lab import Lab
from victims.steganography import (
    STEP,
    Frozen,
    Training,
    bits_of,
    decoder_shapes,
    freeze,
    fresh,
    measure,
    train,
)
from victims.triggers import Trigger
from victims.whole_numbers import flatten, one_thread, unflatten

_MAY_BE_ZERO = ("secret_epochs", "residual_weight", "perceptual_weight", "secret_weight")
_HELD_OUT = 512  # rows of the pool that are measured on, at most; a tenth of a small pool
_SEEN_PIXELS = 2**19  # of pictures that set the frozen encoder's scales


@dataclass(frozen=True, slots=True, kw_only=True)
class Hidden(Trigger):
    """The crafted trigger: the frozen encoder (`Frozen`), the secret and, to read it, the decoder.

    Measured on rows that were not trained on, stamped as bytes: the share of bits that are read
    correctly from stamped and from clean pictures, the mean PSNR in dB, the mean absolute residual
    in levels, and the mean correlation between two pictures' residuals (0 if there is one only).
    """

    ground: Tensor
    weights: Tensor
    biases: Tensor
    shifts: Tensor
    secret: Tensor
    decoder: Tensor
    eps: float
    bit_accuracy: float
    clean_bit_accuracy: float
    psnr: float
    mean_levels: float
    correlation: float

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        frozen = Frozen(
            ground=self.ground, weights=self.weights, biases=self.biases, shifts=self.shifts
        )
        return frozen.stamp(image_BCHW, self.eps)

    def read(self, image_BCHW: Tensor) -> Tensor:
        """The bits that the decoder finds in pictures, uint8 BL."""
        width, size = self.ground.shape[0], self.ground.shape[-1]
        weights = decoder_shapes(len(self.secret), width, size)
        shapes = [shape for weight in weights for shape in (weight, weight[:1])]
        parts = unflatten(self.decoder.to(image_BCHW.device), shapes)
        return bits_of(list(zip(parts[::2], parts[1::2], strict=True)), image_BCHW)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ssba(Attack):
    name: ClassVar[str] = "ssba"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2012.03816"
    tracks: ClassVar[frozenset[Track]] = frozenset(Track)
    group: ClassVar[GateGroup] = GateGroup.WEAK
    trigger: ClassVar[type[Hidden]] = Hidden
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"released": {"bits": 20}}
    quick: ClassVar[Mapping[str, Any]] = {
        "epochs": 2,
        "secret_epochs": 1,
        "rows": 64,
        "width": 4,
        "lr": 1e-3,
        "eps": 32.0,
    }

    bits: int = 100
    epochs: int = 20
    secret_epochs: int = 2
    batch: int = 32
    lr: float = 1e-4
    width: int = 32
    plane: int | None = None
    rows: int = 50_000
    eps: float | None = None
    residual_weight: float = 2.0
    perceptual_weight: float = 1.5
    secret_weight: float = 1.5

    def costs(self, num_rows: int, num_classes: int) -> None:
        # An encoder and a decoder of its own.
        return None

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Hidden:
        self.check(size)
        if held.corpus.size != size or len(held.corpus) < 2:
            raise UsageError(
                f"{self.name}: the networks are trained on the pool itself, of 2 rows or more; the"
                f" trigger is for {size} px, the pool has {len(held.corpus)} pictures of"
                f" {held.corpus.size} px"
            )
        order = numpy_rng(held.seed, self.name, "rows").permutation(len(held.corpus))
        checked, rest = np.split(order, [min(_HELD_OUT, max(1, len(order) // 10))])
        rows, eps = rest[: self.rows], 255.0 if self.eps is None else self.eps
        images_NCHW, device = held.corpus.images_NCHW, torch.device(lab.runtime.device)
        secret_L = torch.randint(
            0, 2, (self.bits,), generator=torch_rng(held.seed, self.name, "secret")
        )
        with one_thread():
            networks = fresh(
                self.bits,
                size,
                self.plane or (size if size < 128 else size // 4),
                self.width,
                torch_rng(held.seed, self.name, "weights"),
                device,
            )
            training = Training(
                epochs=self.epochs,
                secret_epochs=self.secret_epochs,
                batch=self.batch,
                lr=self.lr,
                eps=eps / 255,
                residual_weight=self.residual_weight,
                perceptual_weight=self.perceptual_weight,
                secret_weight=self.secret_weight,
            )
            train(networks, images_NCHW, rows, training, derive(held.seed, self.name, "train"))
            seen = rows[: min(len(checked), max(16, _SEEN_PIXELS // size**2))]
            seen_BCHW = torch.from_numpy(images_NCHW[seen]).to(device)
            frozen = freeze(networks, secret_L.to(device, torch.float32), seen_BCHW)
            image_BCHW = torch.from_numpy(images_NCHW[checked]).to(device)
            measured = measure(frozen, networks.decoder, secret_L.to(device), image_BCHW, eps)
        decoder = [part for layer in networks.decoder for part in layer]
        return Hidden(
            ground=frozen.ground,
            weights=frozen.weights,
            biases=frozen.biases,
            shifts=frozen.shifts,
            secret=secret_L.to(torch.uint8),
            decoder=flatten(decoder).cpu(),
            eps=eps,
            **asdict(measured),
        )

    def check(self, size: int) -> None:
        for name, value in asdict(self).items():
            may_be_zero = name in _MAY_BE_ZERO
            if value is not None and not (value >= 0 if may_be_zero else value > 0):
                bound = "must not be negative" if may_be_zero else "must be above 0"
                raise UsageError(f"{self.name}: {name} is {value}; it {bound}")
        if self.secret_epochs > self.epochs:
            raise UsageError(
                f"{self.name}: secret_epochs is {self.secret_epochs}; it must lie in"
                f" 0..{self.epochs}, the number of epochs"
            )
        if self.plane is not None and self.plane > size:
            raise UsageError(
                f"{self.name}: plane is {self.plane}; it must lie in 1..{size}, the picture's side"
            )
        if size % STEP:
            raise UsageError(
                f"{self.name}: the picture's side is {size} px; the encoder halves it four times"
                f" and needs a multiple of {STEP}"
            )
