"""Results: from Parquet to tables, statistics, figures and reports. Imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.notebook import Results
    from analysis.theme import NothingToDraw

__all__ = ["NothingToDraw", "Results"]


def __getattr__(name: str) -> Any:
    """``from analysis import NothingToDraw, Results``, for notebooks: imported once asked for."""
    if name == "Results":
        from analysis.notebook import Results

        return Results
    if name == "NothingToDraw":
        from analysis.theme import NothingToDraw

        return NothingToDraw
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
