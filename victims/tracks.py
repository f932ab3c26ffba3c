"""The kinds of victims."""

from __future__ import annotations

from enum import StrEnum


class Track(StrEnum):
    """What is attacked: a CLIP, or an image classifier trained on a labelled set."""

    MULTIMODAL = "multimodal"
    SUPERVISED = "supervised"
