"""What all forms of sources come down to: candidate pairs, each with its picture and its caption or
the reason why it has none; and the request that they were asked for with.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal

Form = Literal["webdataset", "csv", "folder", "coco", "parquet"]
FORMS: Final[tuple[Form, ...]] = ("webdataset", "csv", "folder", "coco", "parquet")
MAX_PICTURE_BYTES: Final = 256 << 20


class Reason(StrEnum):
    """Why a candidate became no pair."""

    CORRUPT_IMAGE = "corrupt_image"
    MISSING_IMAGE = "missing_image"
    UNREADABLE_IMAGE = "unreadable_image"
    UNSUPPORTED_IMAGE = "unsupported_image"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_LARGE = "too_large"
    OUTSIDE_ROOT = "outside_root"
    MISSING_CAPTION = "missing_caption"
    CAPTION_NOT_UTF8 = "caption_not_utf8"
    MALFORMED_ROW = "malformed_row"
    UNREADABLE_SHARD = "unreadable_shard"
    DUPLICATE = "duplicate"
    DUPLICATE_MEMBER = "duplicate_member"


@dataclass(frozen=True, slots=True)
class Item:
    """A candidate: where it comes from, its picture's bytes or their path below the root, and its
    caption. With a ``reason`` it is none."""

    source: str
    image: bytes | str | None = None
    caption: str | None = None
    reason: Reason | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked for, apart from how fast: another request makes another corpus.

    ``source`` is a file, a folder or a pattern; ``root`` the folder that paths are below; empty
    columns and separator are found out. ``limit`` is the most pairs that are kept.
    """

    source: str
    form: Form
    root: str
    size: int
    image_column: str = ""
    caption_column: str = ""
    separator: str = ""
    captions: Literal["all", "first"] = "all"
    limit: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A piece of the source that is worked on as one: a shard, or some rows of a file.

    ``path`` is its file (of a table's rows nothing: they are in the listing), ``name`` what people
    call it, ``weight`` its share of the work (rows or bytes), ``fault`` why the file cannot be read
    at all. Of a table ``start`` and ``stop`` are rows; of Parquet groups of rows, of which
    ``skip`` rows are passed over and ``take`` are read (0: all).
    """

    index: int
    path: str
    name: str
    start: int = 0
    stop: int = 0
    skip: int = 0
    take: int = 0
    weight: int = 1
    fault: str = ""


def shown(text: str) -> str:
    """A name that may hold bytes which are no text, as text."""
    return text.encode("utf-8", "backslashreplace").decode()


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:300] if lines else type(error).__name__
