"""The ``model`` of a grid file: an architecture, its size, and the weights it starts from.

``pretrained`` is a tag of open_clip's registry or a file. What the weights were trained with, the
activation and the colours of a picture, follows the tag; of a file it is what the file's author
knows, so `quick_gelu`, `mean` and `std` can be written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from grid.decode import decode
from grid.nodes import Raw, Where
from grid.weights_file import notes_of, read_beside, weights_file
from victims.architectures import (
    OPENAI_MEAN,
    OPENAI_STD,
    Colour,
    Tag,
    agreed_colours,
    architectures,
    config_of,
    fetched,
    has_quick_gelu,
    refusal,
    resampling_doubts,
    tag_names,
    tag_of,
)
from victims.errors import GridError, near
from victims.fingerprints import remembered_sha256
from victims.models import EMBEDDED, EMBEDDED_MEAN, EMBEDDED_STD, ModelSpec
from victims.pretrained import Weights

_TINY = Raw.of("tiny", Where())


class Model(NamedTuple):
    """A network, and the weights it starts from where the grid does not fit them itself."""

    spec: ModelSpec
    weights: Weights | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    arch: str = "tiny"
    size: int
    pretrained: str | None = None
    quick_gelu: Raw | None = None
    mean: Colour | None = None
    std: Colour | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is a number of pixels, got {self.size}")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std belong together: give both, or neither")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std must be above 0, got {list(self.std)}")


def check_model_keys(raw: Raw) -> None:
    """Refuse keys that no `model` has, whatever the files are that it names."""
    if isinstance(raw.node.data, Mapping):
        raw.check_keys([f.name for f in fields(_Given)])


def read_model(raw: Raw | None, size: int) -> Model:
    """An architecture's name, or its fields; its size is the pictures' unless it says another."""
    raw = _TINY if raw is None else raw
    if isinstance(raw.node.data, str):
        raw = Raw.of({"arch": raw.node.data}, raw.where)
    given, places = decode(_Given, raw.over({"size": size})), raw.items()
    at_arch = places.get("arch", raw)
    _check_arch(given.arch, at_arch)
    wanted = _quick_gelu(given, raw)
    own = given.arch not in EMBEDDED and has_quick_gelu(given.arch)
    spec = ModelSpec(arch=given.arch, size=given.size)
    if given.pretrained is None:
        activation = own if wanted is None else wanted
        return Model(_finished(spec, activation, own, (given.mean, given.std)), None)
    at = places["pretrained"]
    tag = None if given.arch in EMBEDDED else tag_of(given.arch, given.pretrained)
    if tag is not None:
        return _tagged(spec, tag, given, own, wanted, raw)
    path = weights_file(given.pretrained, given.arch, at)
    beside = read_beside(path, spec)
    notes = notes_of(path, beside, activation=wanted is None, colours=given.mean is None)
    if wanted is None:
        wanted = beside.quick_gelu
    colours = given.mean, given.std
    if given.mean is None:
        agreed = None if given.arch in EMBEDDED else agreed_colours(given.arch)
        colours = beside.colours or agreed or (None, None)
        if colours == (None, None):
            notes += _colour_doubts(given.arch)
    activation = own if wanted is None else wanted
    notes += _doubts(given.arch, activation) if wanted is None else []
    weights = Weights(sha256=remembered_sha256(path), path=str(path), notes=tuple(notes))
    return Model(_finished(spec, activation, own, colours), weights)


def _check_arch(arch: str, at: Raw) -> None:
    if arch in EMBEDDED:
        return
    every = [*EMBEDDED, *architectures()]
    if arch not in every:
        raise at.error(
            f"no architecture called {arch!r}.{near(arch, every)} Known: {', '.join(EMBEDDED)} and"
            " those of open_clip; `grid models` lists them."
        )
    if why := refusal(arch):
        raise at.error(
            f"{arch} cannot be used: {why}. Take an architecture with open_clip's own text tower"
            " and tokenizer; `grid models` lists them."
        )


def _quick_gelu(given: _Given, raw: Raw) -> bool | None:
    """What a file says of the activation; None: as the weights want it."""
    if given.quick_gelu is None:
        return None
    value = given.quick_gelu.node.data
    if value == "auto":
        return None
    if not isinstance(value, bool):
        raise given.quick_gelu.error(f"expected auto, true or false, got {given.quick_gelu.show()}")
    return value


def _finished(
    spec: ModelSpec, activation: bool, own: bool, colours: tuple[Colour | None, Colour | None]
) -> ModelSpec:
    """The network with what differs from its architecture's own, and nothing else spelled out."""
    usual = (OPENAI_MEAN, OPENAI_STD)
    if spec.arch in EMBEDDED:
        usual = (EMBEDDED_MEAN, EMBEDDED_STD)
    mean, std = (None, None) if colours == usual else colours
    return replace(spec, quick_gelu=None if activation == own else activation, mean=mean, std=std)


def _tagged(
    spec: ModelSpec, tag: Tag, given: _Given, own: bool, wanted: bool | None, raw: Raw
) -> Model:
    places = raw.items()
    named = {True: "QuickGELU", False: "GELU"}
    if wanted is not None and wanted != tag.quick_gelu:
        raise places["quick_gelu"].error(
            f"the weights {tag.name} of {tag.arch} were trained with {named[tag.quick_gelu]}, and"
            " under another activation they are other, worse models: leave quick_gelu out"
        )
    if given.mean is not None and (given.mean, given.std) != (tag.mean, tag.std):
        raise places["mean"].error(
            f"the weights {tag.name} of {tag.arch} expect mean {list(tag.mean)} and std"
            f" {list(tag.std)}: leave both out"
        )
    _check_size(spec, tag, places.get("size", raw))
    notes = []
    if tag.quick_gelu != own:
        notes.append(
            f"model: {tag.arch} gets {named[tag.quick_gelu]} in place of {named[own]}: its weights"
            f" {tag.name} were trained with it"
        )
    whose = f"the weights {tag.name} of {tag.arch}"
    notes += resampling_doubts(whose, tag.interpolation, tag.resize_mode)
    try:
        path = fetched(tag)
    except GridError as error:
        raise places["pretrained"].error(str(error)) from error
    weights = Weights(
        sha256=remembered_sha256(path), path=str(path), tag=tag.name, notes=tuple(notes)
    )
    return Model(_finished(spec, tag.quick_gelu, own, (tag.mean, tag.std)), weights)


def _check_size(spec: ModelSpec, tag: Tag, at: Raw) -> None:
    vision = config_of(spec.arch)["vision_cfg"]
    trained = vision.get("image_size", 224)
    if isinstance(vision.get("layers"), Sequence) and trained != spec.size:
        raise at.error(
            f"the weights {tag.name} of {spec.arch} are for pictures of {trained} px, and the"
            f" positions of a ResNet's attention do not stretch to {spec.size} px: give `data`"
            f" pictures of {trained} px, or take a ViT"
        )


def _doubts(arch: str, activation: bool) -> list[str]:
    """What to look at where a file does not say which activation it was trained with."""
    if arch in EMBEDDED:
        return []
    tags = [tag for name in tag_names(arch) if (tag := tag_of(arch, name))]
    other = [tag.name for tag in tags if tag.quick_gelu != activation]
    if not other:
        return []
    named = {True: "QuickGELU", False: "GELU"}
    return [
        f"model: the file's weights are run with {named[activation]}, {arch}'s own activation, and"
        f" {', '.join(other[:3])}{', ...' if len(other) > 3 else ''} were trained with"
        f" {named[not activation]}. If these were too, write quick_gelu:"
        f" {str(not activation).lower()}."
    ]


def _colour_doubts(arch: str) -> list[str]:
    """What to look at where a file does not say how pixels are normalised and tags disagree."""
    if arch in EMBEDDED:
        return []
    tags = [tag for name in tag_names(arch) if (tag := tag_of(arch, name))]
    other = [tag.name for tag in tags if (tag.mean, tag.std) != (OPENAI_MEAN, OPENAI_STD)]
    if not other:
        return []
    return [
        f"model: the file's weights get pixels by OpenAI's mean and std, and {', '.join(other[:3])}"
        f"{', ...' if len(other) > 3 else ''} of {arch} expect others. If these do, too, write"
        " `mean` and `std`."
    ]
