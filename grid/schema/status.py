"""What becomes of a cell, in words; and when all the cells of a grid have an outcome."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Status(StrEnum):
    """What became of a cell. A board finds what is ``missing``; it is written only of cells that
    are measured, with what they wait for as its detail.

    ``cancelled`` cells are not run until somebody asks for them; ``requeued`` ones are open again.
    """

    OK = "ok"
    FAILED_METHOD = "failed_method"
    FAILED_INFRASTRUCTURE = "failed_infrastructure"
    SKIPPED = "skipped"
    INERT = "inert"
    NOT_APPLICABLE = "not_applicable"
    INVALID_VICTIM = "invalid_victim"
    CANCELLED = "cancelled"
    REQUEUED = "requeued"
    MISSING = "missing"


# How the detail of a skipped cell begins whose start weights failed their gate.
NO_VICTIM = "no victim was trained"
MEASURED = frozenset({Status.OK, Status.INERT, Status.INVALID_VICTIM})
WITHOUT_OUTCOME = (
    Status.MISSING,
    Status.FAILED_INFRASTRUCTURE,
    Status.CANCELLED,
    Status.REQUEUED,
)
STATUS_WORDS: Mapping[str, str] = {
    Status.OK: "ok",
    Status.FAILED_METHOD: "failed (method)",
    Status.FAILED_INFRASTRUCTURE: "failed (infrastructure)",
    Status.SKIPPED: "skipped (gate not passed)",
    Status.INERT: "inert",
    Status.NOT_APPLICABLE: "not applicable",
    Status.INVALID_VICTIM: "invalid victim",
    Status.CANCELLED: "cancelled",
    Status.REQUEUED: "requeued",
    Status.MISSING: "missing",
}


def is_complete(counts: Mapping[str, int]) -> bool:
    """Every planned cell has an outcome; a method that failed is an outcome."""
    return not any(counts.get(status) for status in WITHOUT_OUTCOME)


def completeness_words(counts: Mapping[str, int], planned: int) -> str:
    """One line, of the planned cells by status: how much of a grid is there."""
    parts = [f"{counts.get(Status.OK, 0)} ok"] + [
        f"{counts[status]} {words}"
        for status, words in STATUS_WORDS.items()
        if status != Status.OK and counts.get(status)
    ]
    head = "Complete" if is_complete(counts) else "INCOMPLETE"
    return f"{head}: {planned} planned cells: {', '.join(parts)}"
