"""What BackdoorBench writes and prints: a run's metrics by epoch, tables of attack x defense.

A run's ``attack_df.csv`` has a line per epoch with ``test_acc``, ``test_asr`` and ``test_ra`` as
shares; ``*_df_summary.csv`` has the lines ``last``, ``valid_max`` and ``exist_nan_value``. The last
epoch is taken: ``valid_max`` is the maximum of every column by itself, which no model ever had.

A leaderboard has C-Acc, ASR and R-Acc in percent: a line per attack and defense, or two lines of
headings, of which the first names a defense over each column; as CSV or as a Markdown table.

Its ASR and R-Acc are counted over test images that are not of the target class; where every class
has another one for its target, that is all of them.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence

from analysis.imports.figure import Raw, from_mapping
from grid.schema.errors import SchemaError
from victims.errors import near

ABOUT = (
    *("attack", "defense", "rate", "count", "dataset", "model", "setting"),
    *("unit", "paper", "arxiv", "doi", "table"),
)
"""What may be said of a file that does not say it itself."""
DEFAULTS = {"paper": "BackdoorBench", "arxiv": "2206.12654"}
RUN = {"test_acc": "clean_top1", "test_asr": "asr_top1", "test_ra": "r_acc"}
PRINTED = {"cacc": "clean_top1", "asr": "asr_top1", "racc": "r_acc", "ra": "r_acc"}
COLUMNS = {
    "model": ("targetedmodel", "model"),
    "attack": ("backdoorattack", "attack", "attackmethod"),
    "defense": ("backdoordefense", "defense", "defensemethod"),
    "dataset": ("dataset", "data"),
    "rate": ("pratio", "poisonratio", "poisoningratio", "rate"),
}
OURS = {
    "attack": {
        **{"badnets": "badnet", "badnet": "badnet", "blended": "blended", "sig": "sig"},
        **{"lc": "label_consistent_adversarial"},
        **{"ssba": "ssba", "wanet": "wanet", "inputaware": "input_aware", "bpp": "bpp"},
        **{"trojannn": "trojannn", "ctrl": "ctrl", "ftrojann": "ftrojan", "ftrojan": "ftrojan"},
    },
    "defense": {
        **dict.fromkeys(("nodefense", "none"), "none"),
        **{"ft": "finetune", "fp": "fine_pruning", "nc": "neural_cleanse", "anp": "anp"},
        **{"abl": "abl", "spectral": "spectral_signatures", "ss": "spectral_signatures"},
    },
}
"""Its names of methods of the same papers; others are declared to be as written."""
EMPTY = {"", "-", "–", "n/a", "na", "nan"}
VARIANTS = {"clean_top1": "top-1", "asr_top1": "non-target images", "r_acc": "non-target images"}


def is_backdoorbench(header: Sequence[str]) -> bool:
    """Whether a file's first line is one of its."""
    plain = {_plain(name) for name in header}
    return {"test_acc", "test_asr"} <= {*header} or bool(
        plain & {"backdoordefense", "backdoorattack", "targetedmodel", "cacc"}
    )


def read_backdoorbench(lines: Sequence[str], about: Mapping[str, str], where: str) -> Iterator[Raw]:
    """The numbers of the file, with what is said about it."""
    for name in about:
        if name not in ABOUT:
            raise SchemaError(
                f"--about {name}: not known.{near(name, ABOUT)} Allowed: {', '.join(ABOUT)}."
            )
    said = {**DEFAULTS, "table": where, **about}
    rows = list(_rows(lines, where))
    if not rows:
        raise SchemaError(f"{where}: there are no numbers in it")
    if {"test_acc", "test_asr"} <= {*rows[0][1]}:
        return _run(rows, said, where)
    return _leaderboard(rows, said, where)


def _rows(lines: Sequence[str], where: str) -> Iterator[tuple[int, list[str]]]:
    """Lines of CSV or of a Markdown table, without the rule under a heading."""
    if lines and lines[0].lstrip().startswith("|"):
        for number, line in enumerate(lines, 1):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if any(cells) and not all(re.fullmatch(r":?-+:?", cell) for cell in cells):
                yield number, cells
        return
    reader = csv.reader(lines, strict=True)
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield reader.line_num, [cell.strip() for cell in row]
    except csv.Error as error:
        raise SchemaError(f"{where}: line {reader.line_num}: {error}") from error


def _run(
    rows: Sequence[tuple[int, list[str]]], said: Mapping[str, str], where: str
) -> Iterator[Raw]:
    """The last epoch of a run."""
    (_, header), *body = rows
    lasts = [row for row in body if row[1][0] == "last"]
    for name, metric in RUN.items():
        if name not in header:
            continue
        place = header.index(name)
        # Not every metric is measured in every epoch: the last that was, as its summary does.
        measured = [(n, r[place]) for n, r in lasts or body if len(r) > place and r[place]]
        if not measured:
            raise SchemaError(f"{where}: {name} was never measured")
        line, value = measured[-1]
        setting = said.get("setting") or "a run of its code, last epoch"
        row = {**said, "setting": setting, "unit": said.get("unit", "share")}
        yield _raw(line, {**row, "metric": metric, "value": value}, where)


def _leaderboard(
    rows: Sequence[tuple[int, list[str]]], said: Mapping[str, str], where: str
) -> Iterator[Raw]:
    """A line per attack and defense, or defenses over the columns."""
    first, second = rows[0][1], rows[1][1] if len(rows) > 1 else []
    is_wide = not any(_metric(name) for name in first) and any(map(_metric, second))
    header, body = (second, rows[2:]) if is_wide else (first, rows[1:])
    over = _filled(first, header) if is_wide else []
    named = {field: place for place, name in enumerate(header) if (field := _field(name))}
    metrics = {place: metric for place, name in enumerate(header) if (metric := _metric(name))}
    if not metrics:
        raise SchemaError(
            f"{where}: line {rows[0][0]}: no column of C-Acc (%), ASR (%) or R-Acc (%), and none"
            f" called test_acc; found {', '.join(filter(None, header)) or 'nothing'}"
        )
    unit = said.get("unit") or _unit(header, metrics, body, where)
    for line, row in body:
        if len(row) != len(header):
            raise SchemaError(
                f"{where}: line {line}: {len(header)} fields are wanted, found {len(row)}"
            )
        texts = {field: row[place] for field, place in named.items() if row[place]}
        for place, metric in metrics.items():
            if row[place].lower() in EMPTY:
                continue
            found = {**said, **texts, "metric": metric, "value": row[place], "unit": unit}
            if is_wide:
                found["defense"] = over[place]
            yield _raw(line, found, where)


def _filled(first: Sequence[str], header: Sequence[str]) -> list[str]:
    """The defense over each column; a spreadsheet gives it once for the columns that it spans."""
    found, last = [], ""
    for place, column in enumerate(header):
        last = (first[place] if place < len(first) else "") or last
        found.append(last if _metric(column) else "")
    return found


def _raw(line: int, row: Mapping[str, str], where: str) -> Raw:
    """A number with our names where the methods are the same, and the variant of its metric."""
    lacking = [name for name in ("attack", "defense", "dataset", "model") if not row.get(name)]
    lacking += [] if row.get("rate") or row.get("count") else ["rate"]
    if lacking:
        example = " ".join(f"{name}=..." for name in lacking)
        raise SchemaError(
            f"{where}: line {line} does not tell its {', '.join(lacking)}: say --about"
            f" '{example}' (rate='not stated' if nobody knows it)"
        )
    names = {name: OURS[name].get(_plain(row[name]), row[name]) for name in OURS}
    return from_mapping(line, {**row, **names, "variant": VARIANTS[row["metric"]]}, frozenset())


def _unit(
    header: Sequence[str],
    metrics: Mapping[int, str],
    body: Sequence[tuple[int, list[str]]],
    where: str,
) -> str:
    """Percent, if a heading says it or a value can be nothing else."""
    if all("%" in header[place] for place in metrics):
        return "%"
    for _, row in body:
        for place in metrics:
            if (
                place < len(row)
                and re.fullmatch(r"\d+(\.\d+)?", row[place])
                and float(row[place]) > 1
            ):
                return "%"
    raise SchemaError(
        f"{where}: no heading says (%), and no value is above 1: say --about 'unit=share' or"
        " 'unit=%'"
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _metric(name: str) -> str | None:
    return PRINTED.get(_plain(name))


def _field(name: str) -> str | None:
    return next((field for field, names in COLUMNS.items() if _plain(name) in names), None)
