"""Results: from Parquet to tables, statistics, figures and reports. Imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.notebook import Results

__all__ = ["Results"]


def __getattr__(name: str) -> Any:
    """``from analysis import Results``, for notebooks: imported once it is asked for."""
    if name == "Results":
        from analysis.notebook import Results

        return Results
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
