"""Image classifiers as victims: behind the two calls that a CLIP has, and so in the same loop.

A classifier is a CLIP whose joint space has one axis per class. The feature of a picture are its
logits; that of a caption, the name of a class, is the unit vector of this class. Zero-shot scores
are then logits, a label is a caption, and relabelling a row is giving it another caption.
Shapes: B batch, C channels, H W pixels, T tokens (one), K classes, D penultimate features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from victims.errors import GridError, near
from victims.models import Clip, Meter, Tokens
from victims.recompute import Passes


class Shape(NamedTuple):
    """Blocks and channels of each stage; every stage but the first halves the picture."""

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    stem_stride: int = 1


CLASSIFIERS: Mapping[str, Shape] = {
    # For the embedded world: the stem's stride makes it four times as fast.
    "preact_tiny": Shape((1, 1, 1), (16, 32, 64), stem_stride=2),
    "preact18": Shape((2, 2, 2, 2), (64, 128, 256, 512)),
}
# What a labelled pair is captioned: the name of its class and nothing else.
LABEL_TEMPLATES = ("{}",)
MEAN, STD = 0.5, 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierSpec:
    """Architecture by name, the side of its pictures, and the classes in order."""

    name: ClassVar[str] = "classifier"
    version: ClassVar[int] = 1

    arch: str = "preact_tiny"
    size: int = 32
    classes: tuple[str, ...]

    @property
    def label(self) -> str:
        """The network in a word, for rows and boards."""
        return f"{self.arch}-{self.size}"

    def empty(self) -> Classifier:
        return Classifier(self)


class ClassTokenizer:
    """A class's name to its number, counted from 1: 0 pads."""

    context = 1

    def __init__(self, classes: Sequence[str]) -> None:
        self.ids = {name: index + 1 for index, name in enumerate(classes)}

    def __call__(self, captions: Sequence[str]) -> Tokens:
        unknown = [caption for caption in captions if caption not in self.ids]
        if unknown:
            raise GridError(
                f"a classifier reads the names of its classes, and {unknown[0]!r} is none."
                f"{near(unknown[0], self.ids)}"
            )
        return np.array([[self.ids[caption]] for caption in captions], dtype=np.int32)


class PreActBlock(nn.Module):
    """Two 3 x 3 convolutions, each behind its own normalisation, and the way around them."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.around: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            self.around = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        active_BCHW = F.relu(self.bn1(x_BCHW))
        around_BCHW = x_BCHW if self.around is None else self.around(active_BCHW)
        inner_BCHW: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active_BCHW))))
        return inner_BCHW + around_BCHW


class PreActResNet(nn.Module):
    """The pre-activation residual network for small pictures (He et al. 2016): a 3 x 3 stem,
    stages of blocks, a mean over the picture and one linear layer."""

    def __init__(self, shape: Shape, num_classes: int) -> None:
        super().__init__()
        before = shape.widths[0]
        self.stem = nn.Conv2d(3, before, 3, shape.stem_stride, padding=1, bias=False)
        stages = list[nn.Module]()
        for stage, (depth, width) in enumerate(zip(shape.blocks, shape.widths, strict=True)):
            for block in range(depth):
                stride = 2 if stage and not block else 1
                stages.append(PreActBlock(before, width, stride))
                before = width
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(before, num_classes)

    def maps(self, x_BCHW: Tensor) -> Tensor:
        """The last feature maps."""
        maps_BDHW: Tensor = self.blocks(self.stem(x_BCHW))
        return maps_BDHW

    def features(self, x_BCHW: Tensor) -> Tensor:
        """What the linear layer reads, BD."""
        return self.maps(x_BCHW).mean((2, 3))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logit_BK: Tensor = self.head(self.features(x_BCHW))
        return logit_BK


class Classifier(Clip):
    """A PreAct-ResNet with its normalisation, its class names and a meter."""

    spec: ClassifierSpec

    def __init__(self, spec: ClassifierSpec) -> None:
        nn.Module.__init__(self)
        self.spec = spec
        self.net = PreActResNet(CLASSIFIERS[spec.arch], len(spec.classes))
        self.tokenizer = ClassTokenizer(spec.classes)
        self.register_buffer("mean_C", torch.full((3, 1, 1), MEAN), persistent=False)
        self.register_buffer("std_C", torch.full((3, 1, 1), STD), persistent=False)
        self.meter, self.passes = Meter(), Passes()
        self.to(memory_format=torch.channels_last)

    @property
    def scale(self) -> Tensor:
        """Logits are read as they are."""
        return torch.ones((), device=self.mean_C.device)

    def clamp_scale(self) -> None:
        return None

    def embed_image(self, image_BCHW: Tensor) -> Tensor:
        """The logits, BK, float32."""
        logit_BK: Tensor = self.net.head(self.penultimate(image_BCHW))
        return logit_BK.float()

    def penultimate(self, image_BCHW: Tensor) -> Tensor:
        """What the linear layer reads, BD."""
        self.meter.images_forward += len(image_BCHW)
        self.meter.images_backward += len(image_BCHW) * torch.is_grad_enabled()
        return self.pass_through(self._features, image_BCHW)

    def _features(self, image_BCHW: Tensor) -> Tensor:
        return self.net.features(self.normalise(image_BCHW))  # type: ignore[no-any-return]

    def embed_text(self, tokens_BT: Tensor) -> Tensor:
        """The unit vector of the class that a caption names, BK."""
        return F.one_hot(labels(tokens_BT), len(self.spec.classes)).float()

    def text_tower(self) -> set[str]:
        return set()

    @property
    def width(self) -> int:
        return len(self.spec.classes)


def labels(tokens_BT: Tensor) -> Tensor:
    """The class that each caption names, B."""
    return tokens_BT[:, 0].long() - 1


def classifier(model: Clip) -> Classifier:
    """The model, if it is a classifier: what an objective of the supervised track asks for."""
    if not isinstance(model, Classifier):
        raise GridError(f"this needs an image classifier, and {model.spec.arch} is a CLIP")
    return model
