"""Others' numbers as a section of the report, apart from everything that was measured here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from analysis.imports.reading import name_words
from analysis.page import Cell, Column, Prose, Section, Shown, Table
from analysis.words import amount

SAYS = (
    "Imported from files, and measured by others on other models, data and victims. Nothing here is"
    " in a mean, a rank, a tier, a comparison or a front of this page."
)
WORDS = {"clean_top1": "CA", "asr_top1": "ASR", "r_acc": "R-Acc", "auroc": "AUROC"}


def others_section(records: Sequence[Mapping[str, Any]]) -> Iterator[Section]:
    """The section, where anything was imported."""
    if not records:
        return
    columns = [
        *(Column(name=name, heading=heading) for name, heading in HEADINGS),
        Column(name="value", heading="Value", is_number=True),
        *(Column(name=name, heading=heading) for name, heading in ABOUT),
    ]
    table = Table(
        name="others",
        caption="Others' numbers",
        columns=columns,
        rows=[_row(record) for record in records],
        filters=["attack", "defense", "import"],
    )
    yield Section(name="others", title="Others' numbers", blocks=[Prose(SAYS), table])


HEADINGS = (
    *(("defense", "Defense"), ("attack", "Attack"), ("rate", "Poisoned"), ("metric", "Metric")),
    ("over", "Counted over"),
)
ABOUT = (
    *(("dataset", "Data"), ("model", "Model"), ("setting", "Setting"), ("source", "Source")),
    *(("import", "Import"), ("file", "File")),
)


def _row(record: Mapping[str, Any]) -> list[Cell]:
    unit = "" if record["unit"] == "share" else f" {record['unit']}"
    bound = "" if record["relation"] == "=" else f"{record['relation']} "
    return [
        name_words(record, "defense"),
        name_words(record, "attack"),
        amount(record["rate"], record["count"]),
        WORDS.get(record["metric"], record["metric"]),
        record["variant"],
        Shown(f"{bound}{record['printed']}{unit}", record["value"], "muted"),
        record["dataset"],
        record["model"],
        record["setting"],
        f"{record['paper']}, {record['table']} ({record['identifier']})",
        record["import_name"],
        f"{record['source_file']}, sha256 {record['source_sha256'][:12]},"
        f" {record['written_at']:%Y-%m-%d}, {record['imported_by']}",
    ]
