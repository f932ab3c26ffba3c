"""Numbers that others measured, imported from files and kept apart from what was measured here."""

from __future__ import annotations

from analysis.imports.reading import imported_frame, imported_in
from analysis.imports.storing import Told, import_file

__all__ = ["Told", "import_file", "imported_frame", "imported_in"]
