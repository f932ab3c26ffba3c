"""Prompts of zero-shot classifiers by name: a template has ``{}`` where a class's name goes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Final

from victims.errors import GridError, UsageError, unknown

IMAGENET80: Final = "imagenet80"
# SHA-256 of the 80 templates with the class X, joined by newlines, in the order of the published
# code that figures are compared with.
_IMAGENET80_SHA256: Final = "594f98a56e7af82b48805f2801515b385496071266ec194bc78fb0fdf2ee3377"
_LISTS: Final[Mapping[str, tuple[str, ...]]] = {
    "label": ("{}",),
    "photo": ("a photo of a {}.",),
    "photo2": ("a photo of a {}.", "a photo of the {}."),
    "aircraft": ("a photo of a {}, a type of aircraft.", "a photo of the {}, a type of aircraft."),
    "car": (
        *(f"a photo of {word} {{}}." for word in ("a", "the", "my")),
        "i love my {}!",
        *(f"a photo of my {kind} {{}}." for kind in ("dirty", "clean", "new", "old")),
    ),
    "cifar": tuple(
        f"a {kind}photo of {word} {{}}."
        for word in ("a", "the")
        for kind in ("", "blurry ", "black and white ", "low contrast ", "high contrast ")
    )
    + tuple(f"a {kind} photo of {word} {{}}." for word in ("a", "the") for kind in ("bad", "good"))
    + tuple(
        f"a photo of {word} {size} {{}}." for word in ("a", "the") for size in ("small", "big")
    ),
    "flower": ("a photo of a {}, a type of flower.",),
    "food": ("a photo of {}, a type of food.",),
    "land": tuple(f"a centered satellite photo of {word}{{}}." for word in ("", "a ", "the ")),
    "pet": ("a photo of a {}, a type of pet.",),
    "review": ("a {} review of a movie.",),
    "sign": tuple(
        f'a {view} photo of a "{{}}" traffic sign.'
        for view in ("zoomed in", "centered", "close up")
    ),
    "texture": tuple(
        f"a photo of {word} {{}} {what}."
        for word in ("a", "the")
        for what in ("texture", "pattern", "thing", "object")
    ),
}
TEMPLATE_LISTS: Final = (IMAGENET80, *_LISTS)

# What CLIP's authors asked of each set (Radford et al., 2021; data/prompts.md of their code). Of
# the sets that are not here, and of Caltech 101, whose list is long, one plain prompt is asked.
_OF_SETS: Final[Mapping[str, str]] = {
    **{"imagenet": IMAGENET80, "cifar10": "cifar", "cifar100": "cifar", "gtsrb": "sign"},
    **{"food101": "food", "oxford_pets": "pet", "flowers102": "flower", "dtd": "texture"},
    **{"fgvc_aircraft": "aircraft", "eurosat": "land", "sun397": "photo2", "stl10": "photo2"},
    **{"stanford_cars": "car", "rendered_sst2": "review"},
}
_PLAIN: Final = "photo"


def default_templates(dataset: str) -> str:
    """The name of the list that a set's classes are asked with unless another is given."""
    return _OF_SETS.get(dataset, _PLAIN)


def prompt_templates(given: str | Sequence[str]) -> tuple[str, ...]:
    """The templates of a list by its name, or a list of one's own, checked."""
    if isinstance(given, str):
        if given == IMAGENET80:
            return _imagenet80()
        if given not in _LISTS:
            raise unknown("list of templates", given, TEMPLATE_LISTS)
        return _LISTS[given]
    if not given:
        raise UsageError("templates: the list is empty")
    for template in given:
        if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
            raise UsageError(
                f"templates: {template!r} must have {{}} once, where a class's name goes"
            )
    if len(set(given)) < len(given):
        raise UsageError("templates: one is there twice, which would count double")
    return tuple(given)


def _imagenet80() -> tuple[str, ...]:
    """OpenAI's 80 templates, in their order."""
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES  # slow to import

    # They are functions there; a class called {} gives the template back.
    found = tuple(str(template("{}")) for template in OPENAI_IMAGENET_TEMPLATES)
    said = "\n".join(template.replace("{}", "X") for template in found)
    if hashlib.sha256(said.encode()).hexdigest() != _IMAGENET80_SHA256:
        raise GridError(
            f"open_clip's {len(found)} templates of ImageNet are not OpenAI's 80 in their order:"
            " another version of open_clip has changed them. Install the one of constraints.txt, or"
            " write your own list of templates."
        )
    return found
