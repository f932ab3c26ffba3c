"""Files below the root of a source: none elsewhere, wherever links lead, and none without end."""

from __future__ import annotations

import os
from pathlib import Path

from victims.ingest.items import MAX_PICTURE_BYTES, Reason


class Unusable(Exception):
    """Why a file gives no picture, or no caption."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def read_below(root: str, path: str) -> bytes:
    """The bytes of a file below the root."""
    joined = os.path.join(root, path)  # noqa: PTH118 - a path may hold bytes that are no text
    real, above = os.path.realpath(joined), os.path.realpath(root)
    if os.path.commonpath([real, above]) != above:
        raise Unusable(Reason.OUTSIDE_ROOT, f"{path} leads out of {root}")
    found = Path(real)
    size = found.stat().st_size
    if size > MAX_PICTURE_BYTES:
        raise Unusable(Reason.TOO_LARGE, f"{size} bytes")
    if not found.is_file():
        raise Unusable(Reason.MISSING_IMAGE, f"{path} is no file")
    return found.read_bytes()
