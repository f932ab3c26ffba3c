"""The words and columns of a results directory: what a run writes and a board reads.

DIR holds ``rows/ samples/ stages/ attempts/ trials/`` as Parquet, where exhibits were asked for
``fits/ rocs/ features/ pictures/``, in ``imported/`` what others measured, and ``grid.json``.
Writers only ever add files, under a scratch name that is renamed when complete; of several rows of
one (cell, eval_set, metric) the newest ``written_at`` wins. Nothing heavy is imported here.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from victims.errors import GridError, UsageError, near

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 1
MAX_ROW_FILES = 256
MERGED_BYTES = 4 << 20
KIND_KEY, VERSION_KEY = "backdoor_grid_kind", "backdoor_grid_schema_version"
REPLACES_KEY = "backdoor_grid_replaces"
"""In the footer of a file that others were put into: their names, with slashes between. Who sees
the file does not read those again, so nothing is ever seen twice or not at all."""


class SchemaError(GridError):
    """A row, a file or a grid file does not obey the schema."""


class ResultsError(GridError):
    """A results directory cannot be read as asked."""


class AskedError(ResultsError):
    """What was asked of results cannot be meant; the results are not at fault."""

    code = UsageError.code


def no_such(what: str, name: str, known: Iterable[str], where: str = "") -> AskedError:
    """The error for a name that results do not have, or that nothing here is called."""
    there = list(known)
    return AskedError(
        f"no {what} {name!r}{where}.{near(name, there)} There are: {', '.join(there)}."
    )


def home() -> Path:
    """Where results go by default. A Ray job's working directory is temporary: not there."""
    if "GRID_HOME" in os.environ:
        return Path(os.environ["GRID_HOME"])
    inside_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return Path.home() / ".backdoor-grid" / "runs" if inside_job else Path("runs")


def results_directory(named: str | Path) -> Path:
    """A results directory by its path, or by the name of what ran."""
    path = Path(named)
    if not str(named).strip():
        raise AskedError("no results were named: give a directory such as runs/demo, or a name.")
    if path.is_dir():
        return path
    if path.is_file():
        raise AskedError(f"{path} is a file: give the directory of the results, such as runs/demo.")
    if (home() / path).is_dir():
        return home() / path
    there = sorted(home().glob("*")) if home().is_dir() else []
    names = [p.name for p in there if any((p / mark).exists() for mark in MARKS)]
    told = f" In {home()}: {', '.join(names)}." if names else f" Nothing has run in {home()} yet."
    raise AskedError(
        f"No results at {home() / path}: there is no such directory.{near(path.name, names)}{told}"
    )


MARKS = ("grid.json", "campaign.yaml", "rows", "trials")
"""What a results directory holds, a run's or a campaign's."""


class Status(StrEnum):
    """What became of a cell. ``missing`` is never written: a board computes it.

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


class Column(NamedTuple):
    """One column: its type word, whether null is refused, and what it means."""

    name: str
    type: str
    required: bool
    meaning: str


def _columns(text: str) -> tuple[Column, ...]:
    """Lines ``name type meaning``; ``!`` after the type refuses null."""
    split = (line.split(maxsplit=2) for line in text.strip().splitlines())
    return tuple(Column(n, t.rstrip("!"), t.endswith("!"), m) for n, t, m in split)


CELL = _columns("""
    cell            string!   cell key
    label           string!   the cell's name on the command line
    track           string!   clip fine-tune, clip from scratch, classifier, ...
    regime          string!   F (from the reference weights) or S (from scratch)
    attack          string!   label on the board
    rate            float64   poisoned share of all rows; null for targeted poisoning
    rate_text       string    the rate as exact decimal text, as the user wrote it
    count           int64     realised poisoned rows
    defense         string!   label on the board; "none" is a defense
    needs           strings!  what the defender is given
    phase           string!   pretraining, filtering, finetuning, inference, control
    fidelity        string!   exact, reading, adapted
    is_control      bool!     a control of the experiment, not a proposal
    victim_seed     int64!    the replicate
    defense_seed    int64!    nested inside the victim seed
    model           string!   architecture
    target          string!   target class name, or a rule such as label + 1
""")

ROW = (
    _columns("""
    schema_version  int16!    filled by the writer
    written_at      timestamp! filled by the writer when absent
    grid            string!   name of the grid
    grid_hash       string!   hash of the grid file
    added_later     bool!     the cell joined the grid after its first run
""")
    + CELL
    + _columns("""
    attack_params   string!   JSON
    defense_params  string!   JSON
    cover_count     int64     cover rows, never inside count
    num_rows        int64     rows of the clean corpus
    corpus_digest   string    the corpus
    eval_set        string!   report, shifted, tuning, ...; empty for metric "cell"
    eval_digest     string    the evaluation images
    preprocess_digest string  the preprocessing object
    templates_digest string   the prompt templates
    metric          string!   "cell" carries the outcome; clean_top1, asr_top1, r_acc, ...
    value           float64   the metric; shares as 0 to 1
    n               int64     denominator
    successes       int64     numerator of a share, otherwise null
    low             float64   Wilson 95 %
    high            float64   Wilson 95 %
    clean_victim    float64   the same metric of the same stamped images on the clean victim
    init_model      float64   the same on the weights the recipe starts from
    status          string!   see Status
    detail          string    why, in one line
    attempts        int32     the most at the victim, its defense or a measurement
    reused          bool      nothing had to be computed
    victim_key      string    store key
    data_key        string    store key
    trigger_key     string    store key
    defended_key    string    store key
    measure_key     string    store key
    cost_seconds    float64   device seconds of the defense's own training
    victim_seconds  float64   device seconds of its victim's training
    relative_cost   float64   cost_seconds / victim_seconds
    pair_views      int64     pairs forwarded by the defense
    lr              float64   learning rate of the defense's fits; null where it trains nothing
    lr_rule         string    fixed, select (chosen on held-out pairs), or own: the method's fields
    lr_curve        string    JSON: the choices, each with its rates and their metric
    tuned           string    JSON: the campaign that chose the settings, its cost, what it saw
    knob            string    JSON: of which settings of a defense this is one, by which field
    notes           string    JSON: numbers that the defense tells about its run
    peak_memory_bytes int64   of the defense's training
    wall_seconds    float64   of the defense's training
    device          string    cpu, cuda:NVIDIA ..., ...
    threads         int32     CPU threads of the process
    commit          string    of this project
    versions        string    JSON: package to version
""")
)

STAGE = _columns("""
    schema_version  int16!    filled by the writer
    written_at      timestamp! filled by the writer when absent
    key             string!   store key
    kind            string!   what the stage makes
    name            string!   for people
    inputs          strings!  keys of the stages it reads
    seconds         float64!  wall seconds
    started_at      timestamp! UTC
    ended_at        timestamp! UTC
    reused          bool!     found in the store
    device_seconds  float64   the part spent training
    pair_views      int64     pairs forwarded
    peak_memory_bytes int64   of the stage
    device          string    cpu, cuda:..., ...
    threads         int32     CPU threads
    host            string    machine
    pid             int64     process
    attempt         int32     counted from 1
    commit          string    of this project
    versions        string    JSON: package to version
""")

ATTEMPT = _columns("""
    schema_version  int16!    filled by the writer
    written_at      timestamp! filled by the writer when absent
    key             string!   store key of the stage
    attempt         int32!    counted from 1
    outcome         string!   ok, failed_method, failed_infrastructure
    error           string    first line of the error
    seconds         float64   wall seconds
    host            string    machine
    pid             int64     process
    started_at      timestamp! UTC
""")

SAMPLE = _columns("""
    schema_version  int16!    filled by the writer
    written_at      timestamp! filled by the writer when absent
    cell            string!   cell key
    eval_set        string!   report, shifted, ...
    image           int64!    row of the evaluation set
    label           int32!    true class
    clean_prediction int32!   on the untouched image
    triggered_prediction int32! on the stamped image, those of the target class among them
    clean_true_rank int32!    rank of the true class, 0 is first
    triggered_target_rank int32! rank of the target on the stamped image
    clean_target_rank int32!  rank of the target on the untouched image
""")

TRIAL = _columns("""
    schema_version  int16!    filled by the writer
    written_at      timestamp! filled by the writer when absent
    campaign        string!   name of the campaign
    search          string!   key of what suggests settings and judges them, without the budget
    defense         string!   label of the defense whose settings are searched
    objective       string!   label of what is searched for
    number          int32!    place in the order of its search, from 0
    trial           string!   key of all that was to be measured for these settings
    record          string!   trial: its end; cell: the end of a cell; epoch: one of a fit
    status          string!   ok, stopped (before its end), failed
    reason          string    why it was stopped or failed
    settings        string!   JSON: name to value, as the search space names them
    is_default      bool!     the settings that the defense has anyway
    cell            int32     place of the cell among those of the trial, from 0
    attack          string    of the cell
    rate_text       string    of the cell
    seed            int64     of the cell's victim
    epoch           int32     epochs fitted for the cell so far
    clean_top1      float64   of the cell, on the tuning split
    clean_n         int64     pictures behind it
    asr_top1        float64   of the cell, on the tuning split
    asr_n           int64     pictures behind it
    victim_clean    float64   of the undefended victim
    victim_asr      float64   of the undefended victim
    change          float64   share of clean pictures that the victim answers otherwise
    ca              float64   mean of clean_top1 over the cells so far
    ca_loss         float64   mean of victim_clean - clean_top1 over the cells so far
    worst_asr       float64   largest over attacks of the mean ASR over their cells so far
    mean_asr        float64   over attacks
    score           float64   what the search makes small
    is_feasible     bool      whether the objective's limits hold so far
    device_seconds  float64   of the defense's training, wherever it ran
    spent_seconds   float64   of this run, wall
    defended_key    string    of the cell
    measure_key     string    of the cell
    started_at      timestamp! UTC
""")

_OF_CELL = _columns("""
    schema_version  int16!    filled by the writer
    written_at      timestamp! filled by the writer when absent
    cell            string!   cell key
""")

FIT = _OF_CELL + _columns("""
    epoch           int32!    of the last fit of the cell's model, from 1
    name            string!   a term of its loss, its learning rate, ...
    value           float64   mean over the epoch
""")

ROC = _OF_CELL + _columns("""
    score           string!   name of the defense's score; empty if it has one alone
    false_positive  float64!  share of the clean rows at or above a threshold
    true_positive   float64!  share of the poisoned rows there; cover rows are left out
    auroc           float64   of the whole curve
""")

FEATURE = _OF_CELL + _columns("""
    image           int64!    row of the evaluation set
    label           int32!    true class
    kind            string!   clean, triggered, or target: a clean picture of the target's class
    x               float64!  place of its image feature in the plane of this cell's model
    y               float64!  the same
    projection      string!   pca or tsne
""")

PICTURE = _OF_CELL + _columns("""
    image           int64!    row of the evaluation set
    label           int32!    true class
    class_name      string    its name
    clean           binary!   PNG
    triggered       binary!   PNG, with the trigger
""")

IMPORTED = _columns("""
    schema_version  int16!    filled by the writer
    written_at      timestamp! filled by the writer: when it was imported
    import_name     string!   what the import is called; of several the newest counts
    provenance      string!   imported: somebody else measured it
    kind            string!   what the file was read as
    source_file     string!   its name
    source_sha256   string!   of its bytes
    source_line     int32!    where in it the number stands
    imported_by     string!   who imported it
    paper           string!   who measured it
    identifier      string!   arXiv id or DOI
    table           string!   where the paper prints it
    attack          string!   ours, or as the paper writes it
    attack_as_written bool!   the name is the paper's own
    rate            float64   poisoned share; null where the paper gives a count, or neither
    rate_text       string    the rate as exact decimal text
    count           int64     poisoned rows
    defense         string!   ours, or as the paper writes it
    defense_as_written bool!  the name is the paper's own
    dataset         string!   what was tested on
    model           string!   architecture
    setting         string!   what is special about it; may be empty
    metric          string!   as in rows, or as the paper writes it
    metric_as_written bool!   the name is the paper's own
    variant         string!   over which images the metric was counted
    geometry        string!   crop, squash, not stated
    relation        string!   = or a bound
    printed         string!   the value as it is printed
    unit            string!   what it is printed in: %, share, or of a metric as written
    value           float64!  percents and shares as 0 to 1
""")

KINDS: Mapping[str, tuple[Column, ...]] = {
    "rows": ROW,
    "samples": SAMPLE,
    "stages": STAGE,
    "attempts": ATTEMPT,
    "trials": TRIAL,
    "fits": FIT,
    "rocs": ROC,
    "features": FEATURE,
    "pictures": PICTURE,
}
SCHEMAS: Mapping[str, tuple[Column, ...]] = {**KINDS, "imported": IMPORTED}
"""What was measured here, and apart from it what others measured: no reader puts them together."""

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
    if status not in allowed:
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


def write_rows(results: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """Add one file with the rows of some whole cells, after checking them."""
    validate(rows)
    path = write_table(results, "rows", rows)
    if sum(1 for _ in os.scandir(path.parent)) > MAX_ROW_FILES:
        merge_row_files(results)
    return path


def merge_row_files(results: Path) -> None:
    """Put the small row files into one: opening 10,000 files costs a reader ten seconds.

    The merged file is in place before the small ones go. A kill between the two, or another
    writer doing the same, leaves rows twice, which changes nothing: the newest of equals wins.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    current = str(SCHEMA_VERSION).encode()
    small, tables = [], []
    for path in sorted((results / "rows").glob("[!.]*.parquet")):
        try:
            if path.stat().st_size < MERGED_BYTES:
                table = pq.ParquetFile(path).read()
                is_ours = (table.schema.metadata or {}).get(VERSION_KEY.encode()) == current
                if is_ours and not mistyped(table.schema, "rows"):
                    small.append(path)
                    tables.append(table)
        except (OSError, pa.ArrowException):
            continue  # Gone to another merge, or not whole: a reader names the latter.
    if len(tables) > 1:
        # Rows of before a column was added hold null there, where newer ones may not.
        merged = pa.concat_tables(tables, promote_options="default").combine_chunks()
        columns = zip(merged.schema, merged.columns, strict=True)
        fields = [f.with_nullable(f.nullable or column.null_count > 0) for f, column in columns]
        merged = merged.cast(pa.schema(fields, metadata=merged.schema.metadata))
        with renamed_when_done(fresh_path(results / "rows")) as scratch:
            pq.write_table(merged, scratch, compression="zstd")
        for path in small:
            path.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Replace a small file in one step."""
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_table(results: Path, kind: str, records: Sequence[Mapping[str, object]]) -> Path:
    """Add one Parquet file of records to ``results/kind``; returns its path."""
    known = [column.name for column in SCHEMAS[kind]]
    given = {name for record in records for name in record}
    return write_columns(
        results,
        kind,
        {name: [record.get(name) for record in records] for name in (*known, *(given - {*known}))},
        len(records),
    )


def write_columns(
    results: Path, kind: str, columns: Mapping[str, object], num_records: int
) -> Path:
    """As ``write_table``, from columns; a plain value stands for a column that repeats it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    known = [column.name for column in SCHEMAS[kind]]
    for name in columns:
        if name not in known:
            raise SchemaError(f"{kind}: unknown column {name!r}.{near(name, known)}")
    if num_records < 1:
        raise SchemaError(f"{kind}: nothing to write")
    fillers = {"schema_version": SCHEMA_VERSION, "written_at": datetime.now(UTC)}
    arrays = []
    for column in SCHEMAS[kind]:
        given: Any = columns.get(column.name)
        if isinstance(given, str) or not hasattr(given, "__len__"):
            given = [given] * num_records
        if column.name in fillers:
            filler = fillers[column.name]
            given = [filler if value is None else value for value in given]
        arrays.append(_array(kind, column, given))
    schema = arrow_schema(kind)
    target = fresh_path(results / kind)
    with renamed_when_done(target) as scratch:
        # Most files hold one cell: without statistics their footer shrinks by a third.
        pq.write_table(
            pa.table(arrays, schema=schema),
            scratch,
            compression="zstd",
            write_statistics=num_records > 5000,
        )
    return target


def arrow_schema(kind: str) -> pa.Schema:
    """The Parquet schema of a kind, with the kind and the schema version in its metadata."""
    import pyarrow as pa

    fields = [pa.field(c.name, _arrow_type(c.type), nullable=not c.required) for c in SCHEMAS[kind]]
    return pa.schema(fields, metadata={KIND_KEY: kind, VERSION_KEY: str(SCHEMA_VERSION)})


KEYS = ("written_at", "cell", "eval_set", "metric", "value", "status", "key", "trial", "record")
"""Columns that every file has had since the first, where its kind has them."""


def mistyped(schema: pa.Schema, kind: str) -> str:
    """What keeps a file with our mark from holding what its kind promises; empty if nothing."""
    import pyarrow as pa

    known = {column.name: column.type for column in KINDS[kind]}
    if lacking := [name for name in KEYS if name in known and name not in schema.names]:
        return f"lacks column {', '.join(lacking)}"
    numbers = (pa.types.is_integer, pa.types.is_floating)
    alike = {
        "string": (pa.types.is_string, pa.types.is_large_string),
        "strings": (pa.types.is_list, pa.types.is_large_list),
        "bool": (pa.types.is_boolean,),
        **dict.fromkeys(("int16", "int32", "int64"), numbers[:1]),
        "float64": numbers,
        "timestamp": (pa.types.is_timestamp,),
        "binary": (pa.types.is_binary, pa.types.is_large_binary),
    }
    for field in schema:
        word = known.get(field.name)
        if word is not None and not any(is_so(field.type) for is_so in alike[word]):
            return f"its column {field.name} is {field.type}, not {word}"
    return ""


def _arrow_type(word: str) -> pa.DataType:
    import pyarrow as pa

    if word == "strings":
        return pa.list_(pa.string())
    return pa.timestamp("us", tz="UTC") if word == "timestamp" else pa.type_for_alias(word)


def _array(kind: str, column: Column, values: object) -> pa.Array:
    """One column as Arrow, or an error that names it."""
    import pyarrow as pa

    try:
        array = pa.array(values, _arrow_type(column.type))
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise SchemaError(
            f"{kind}: column {column.name!r} holds {column.type} ({column.meaning}): {error}"
        ) from error
    if column.required and array.null_count:
        raise SchemaError(f"{kind}: column {column.name!r} is null; it says {column.meaning}")
    return array


def write_grid(
    results: Path,
    name: str,
    grid_hash: str,
    cells: Sequence[Mapping[str, object]],
    classes: int | None = None,
) -> Path:
    """Write ``grid.json``: the planned cells, in file order, with the columns of CELL.

    A board takes its order from here, knows from here which cells are missing, and from the number
    of ``classes`` how low their accuracy may be.
    """
    required = [column.name for column in CELL if column.required]
    for cell in cells:
        lacking = [column for column in required if cell.get(column) is None]
        if lacking:
            raise SchemaError(f"grid {name}: cell {cell.get('cell')} lacks {', '.join(lacking)}")
    planned = [{column.name: cell.get(column.name) for column in CELL} for cell in cells]
    document = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "hash": grid_hash,
        "planned": len(planned),
        "classes": classes,
        "cells": planned,
    }
    results.mkdir(parents=True, exist_ok=True)
    target = results / "grid.json"
    with renamed_when_done(target) as scratch:
        scratch.write_text(json.dumps(document, indent=0, allow_nan=False), encoding="utf-8")
    return target


def fresh_path(folder: Path) -> Path:
    """A name no other writer takes; names sort by time for the people who list them."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:16]}.parquet"


@contextmanager
def renamed_when_done(target: Path) -> Iterator[Path]:
    """A hidden scratch path beside ``target``, which takes its name once it is on the disk."""
    scratch = target.with_name(f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        scratch.replace(target)
    except OSError as error:
        raise ResultsError(
            f"Cannot write {target}: {error.strerror or error}. Nothing was changed; "
            "make room or choose another results directory, then run the same command again."
        ) from error
    finally:
        scratch.unlink(missing_ok=True)
