"""The laws that rows obey before they are written: what is refused, as sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from grid.schema.columns import ROW
from grid.schema.errors import SchemaError
from grid.schema.status import MEASURED, Status
from victims.errors import near

# What a metric that is a share of something begins with.
SHARES = (
    *("clean_top", "asr_", "target_rate_top", "r_acc", "true_class_accuracy", "psr_"),
    *("text_hit_", "text_control_", "image_to_text_", "text_to_image_", "probe_"),
)


def validate(rows: Sequence[Mapping[str, object]]) -> None:
    """Raise one SchemaError naming the first five faults of the rows of some whole cells."""
    faults: list[str] = []
    seen: dict[tuple[object, ...], int] = {}
    for row in rows:
        key = (row.get("cell"), row.get("eval_set"), row.get("metric"))
        where = f"cell {key[0]}, eval_set {key[1]!r}, metric {key[2]!r}"
        seen[key] = seen.get(key, 0) + 1
        faults += [f"{where}: {fault}" for fault in _faults(row)]
    for (cell, eval_set, metric), times in seen.items():
        if times > 1:
            faults.append(f"cell {cell}, {eval_set!r}, {metric!r}: {times} rows; one is allowed")
        if (cell, "", "cell") not in seen:
            faults.append(f'cell {cell}: no row with metric "cell"; every cell needs its outcome')
    if faults:
        unique = list(dict.fromkeys(faults))
        more = f"\n... and {len(unique) - 5} more" if len(unique) > 5 else ""
        raise SchemaError("These rows cannot be written:\n" + "\n".join(unique[:5]) + more)


def _faults(row: Mapping[str, object]) -> Iterator[str]:
    """The laws of one row, as sentences about what is broken."""
    names = [column.name for column in ROW]
    for name in row:
        if name not in names:
            yield f"unknown column {name!r}.{near(name, names)}"
    for column in ROW:
        filled = column.name in ("schema_version", "written_at")
        if column.required and not filled and row.get(column.name) is None:
            yield f"column {column.name!r} is missing ({column.meaning})"
    status, metric, value = row.get("status"), str(row.get("metric")), row.get("value")
    allowed = [s.value for s in Status if s is not Status.MISSING]
    waits = status == Status.MISSING and metric == "cell" and row.get("detail")
    if status not in allowed and not waits:
        yield f"status {status!r}; allowed: {', '.join(allowed)}"
    if (row.get("rate") is None) != (row.get("rate_text") is None):
        yield "rate and rate_text go together: give both, or neither for targeted poisoning"
    if metric == "cell":
        if value is not None:
            yield f"a cell's outcome has no value, found {value!r}"
        if row.get("eval_set"):
            yield "a cell's outcome belongs to no evaluation set: eval_set must be ''"
        return
    if value is None:
        if status != Status.NOT_APPLICABLE:
            yield f"no value, but status is {status!r}; only not_applicable may lack one"
        return
    if status == Status.NOT_APPLICABLE:
        yield f"value {value!r} of a metric that is not applicable; leave it null"
    elif status in allowed and status not in MEASURED:
        yield f"a measured value in a cell that is {status!r}; metric rows are for measured cells"
    yield from _value_faults(row, metric)


def _value_faults(row: Mapping[str, object], metric: str) -> Iterator[str]:
    """The laws of a row that holds a number."""
    value, n, successes = (row.get(name) for name in ("value", "n", "successes"))
    is_share = successes is not None or metric.startswith(SHARES)
    for name in ("value", "low", "high", "clean_victim", "init_model"):
        number = row.get(name)
        if number is None:
            continue
        if not isinstance(number, int | float) or not math.isfinite(number):
            yield f"{name} is {number!r}, which is not a finite number"
        elif is_share and not 0 <= number <= 1:
            yield f"{name} is {number!r}; a share lies in 0 to 1 (not percent)"
    if not isinstance(n, int) or n <= 0:
        yield f"n is {n!r}; a value needs its denominator, at least 1"
    elif isinstance(successes, int) and isinstance(value, int | float):
        if not 0 <= successes <= n:
            yield f"successes {successes} of n {n}"
        elif abs(value - successes / n) > 1e-6:
            yield f"value {value!r} is not successes / n = {successes} / {n}"
    if metric.startswith("asr_top"):
        if row.get("clean_victim") is None:
            yield "an ASR is refused without clean_victim: the same stamped images, no backdoor"
        if row.get("rate") is None:
            yield "ASR does not apply to targeted poisoning; write status not_applicable, no value"
    # Rate 0 is the clean cell, where the same pictures are asked about.
    if metric.startswith("psr_top") and row.get("rate"):
        yield "a targeted attack has per-target and total rates, no bare rate; leave rate null"
