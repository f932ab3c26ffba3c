"""Files of others' numbers for tests: a sound table, lines that differ from it, and the import."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from analysis.imports import Told, import_file, imported_in
from analysis.imports.figure import Known
from analysis.reader import Tables
from attacks import ATTACKS
from defenses import DEFENSES

ROW = {
    "paper": "Wu et al.",
    "arxiv": "2206.12654",
    "doi": "",
    "table": "Table 2",
    "attack": "badnet",
    "rate": "0.1",
    "defense": "anp",
    "dataset": "CIFAR-10",
    "model": "PreAct-ResNet18",
    "metric": "asr_top1",
    "variant": "non-target images",
    "value": "0.73",
    "unit": "%",
    "setting": "",
    "as_written": "",
}


def table(*changes: Mapping[str, str]) -> str:
    """A CSV of rows that differ from a sound one."""
    rows = [{**ROW, **change} for change in changes or ({},)]
    quoted = [",".join(f'"{value}"' for value in row.values()) for row in rows]
    return "\n".join([",".join(rows[0]), *quoted]) + "\n"


def take(out: Path, content: str | bytes, name: str = "x", **more: Any) -> Told:
    """Import a file of this content."""
    file = out.parent / "source.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    declared = frozenset(more.pop("declared", ()))
    known = Known(attacks=ATTACKS, defenses=DEFENSES, declared=declared)
    return import_file(file, name, out, known, by="me", **more)


def numbers(out: Path) -> list[dict[str, Any]]:
    with closing(Tables(out, of="imported")) as tables:
        return imported_in(tables)


def only(out: Path) -> dict[str, Any]:
    (record,) = numbers(out)
    return record
