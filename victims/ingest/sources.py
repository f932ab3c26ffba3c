"""Which files a source means, of which form they are, and the pieces that they are worked on in."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from victims.errors import UsageError, near
from victims.ingest.items import FORMS, Form, Job, Request, first_line
from victims.ingest.listing import LISTING, write_listing
from victims.ingest.shards import parquet_columns
from victims.ingest.tables import CAPTION_FILES, caption_file
from victims.keys import file_sha256

PART_ROWS: Final = 2048  # candidates of a table that are worked on as one
# Larger groups of rows are worked on in pieces. Each reads its group from the start, which costs
# little beside decoding pictures as long as pieces are few.
MOST_PART_ROWS: Final = 8192
TARS: Final = (".tar", ".tar.gz", ".tgz")
_ENDINGS: Final[Mapping[str, Form]] = {
    **dict.fromkeys(TARS, "webdataset"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".txt", ".jsonl"), "folder"),
    ".json": "coco",
    ".parquet": "parquet",
}
_BRACES: Final = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a run works through. ``state`` says of every file how it was when this was written,
    ``fingerprint`` which contents they have; ``rows`` is the most candidates that there
    can be, where known."""

    jobs: Sequence[Job]
    state: Mapping[str, Any]
    fingerprint: str
    rows: int | None


def expand(pattern: str) -> list[Path]:
    """The files that a name means: itself, or by braces (``{000..099}``, ``{a,b}``) and ``*``."""
    if Path(pattern).exists():
        return [Path(pattern)]
    if (found := _BRACES.search(pattern)) is None:
        return [Path(name) for name in sorted(glob.glob(pattern))]  # noqa: PTH207 - absolute, too
    head, tail = pattern[: found.start()], pattern[found.end() :]
    low, dots, high = found[1].partition("..")
    if dots and low.isdecimal() and high.isdecimal():
        middles = [f"{n:0{len(low)}d}" for n in range(int(low), int(high) + 1)]
        named = [path for middle in middles for path in [Path(f"{head}{middle}{tail}")]]
        if not _BRACES.search(tail) and "*" not in pattern:
            return named  # a shard that is not there is one that cannot be read
    else:
        middles = found[1].split(",")
    return [path for middle in middles for path in expand(f"{head}{middle}{tail}")]


def form_of(source: str) -> Form:
    """The form of a source by its name and by what lies in it."""
    path = Path(source)
    if path.is_dir():
        names = [p.name for p in path.iterdir()]
        if any(name.endswith(TARS) for name in names):
            return "webdataset"
        return "parquet" if any(name.endswith(".parquet") for name in names) else "folder"
    form = next((form for ending, form in _ENDINGS.items() if source.endswith(ending)), None)
    if form is None and not expand(source):
        raise _nothing(path)
    if form is None:
        raise UsageError(
            f"{source}: its form cannot be told from its name. Give --format: {', '.join(FORMS)}."
        )
    return form


def files_of(source: str, form: Form) -> list[Path]:
    """The shards, the Parquet files or the table of a source; none is an error."""
    path = Path(source)
    if path.is_dir() and form in ("webdataset", "parquet"):
        endings = TARS if form == "webdataset" else (".parquet",)
        found = sorted(p for p in path.iterdir() if p.name.endswith(endings) and p.is_file())
    elif path.is_dir() and form == "folder":
        listed = caption_file(path)
        return [] if listed is None else [listed]
    elif path.is_dir():
        raise UsageError(f"{source}: is a folder; of form {form} give the file itself")
    else:
        found = expand(source)
    if not found or not any(p.exists() for p in found):
        raise _nothing(path)
    return found


def _nothing(path: Path) -> UsageError:
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return UsageError(f"{path}: no such file or folder.{near(path.name, beside)}")


def root_of(source: str, form: Form) -> str:
    """The folder that paths are below, unless another is given."""
    path = Path(source)
    return str(path if path.is_dir() else path.parent)


def prepare(request: Request, work: Path) -> Prepared:
    """Look through a source once: its pieces, in order, and what it consists of."""
    try:
        return _prepare(request, work)
    except OSError as error:
        raise UsageError(
            f"{error.filename or request.source}: {error.strerror or error}"
        ) from error


def _prepare(request: Request, work: Path) -> Prepared:
    files = files_of(request.source, request.form)
    state = {str(path): _state(path) for path in files}
    if request.form == "webdataset":
        jobs = [_shard(number, path) for number, path in enumerate(files)]
        return Prepared(jobs=jobs, state=state, fingerprint=_by_size(files), rows=None)
    if request.form == "parquet":
        return _parquet(files, request, state)
    scratch = work / f"{LISTING}.tmp"
    rows, said = write_listing(request, scratch)
    if not rows:
        wanted = f" It looked for {', '.join(CAPTION_FILES)}, or pictures with a .txt beside them."
        raise UsageError(
            f"{request.source}: no pictures and captions there."
            + wanted * (request.form == "folder")
        )
    scratch.replace(work / LISTING)
    jobs = []
    for start in range(0, rows, PART_ROWS):
        stop = min(rows, start + PART_ROWS)
        name = f"{Path(request.source).name}[{start}:{stop}]"
        jobs.append(
            Job(
                index=len(jobs), path="", name=name, start=start, stop=stop,
                weight=stop - start,
            )
        )  # fmt: skip
    contents = [f"{path.name}\0{file_sha256(path)}\n" for path in files]
    fingerprint = hashlib.sha256("".join([*contents, said]).encode()).hexdigest()
    return Prepared(jobs=jobs, state=state, fingerprint=fingerprint, rows=rows)


def state_digest(state: Mapping[str, Any]) -> str:
    """The state of all files in one word, for the manifest."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]


def source_state(request: Request) -> dict[str, Any]:
    """How the files of a source are now."""
    return {str(p): _state(p) for p in files_of(request.source, request.form)}


def _state(path: Path) -> list[int]:
    try:
        found = path.stat()
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns]


def _by_size(files: Sequence[Path]) -> str:
    """A digest of names and sizes: the contents are read once, when they are worked on."""
    sizes = [f"{path.name}\0{path.stat().st_size if path.exists() else -1}\n" for path in files]
    return hashlib.sha256("".join(sizes).encode()).hexdigest()


def _shard(number: int, path: Path) -> Job:
    weight = path.stat().st_size if path.exists() else 1
    return Job(index=number, path=str(path), name=path.name, weight=max(1, weight))


def _parquet(files: Sequence[Path], request: Request, state: Mapping[str, Any]) -> Prepared:
    import pyarrow as pa
    import pyarrow.parquet as pq

    jobs, total, captions = list[Job](), 0, 0
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                names, about = file.schema_arrow.names, file.metadata
                rows = [about.row_group(n).num_rows for n in range(about.num_row_groups)]
                groups = [about.row_group(n) for n in range(len(rows))]
                parquet_columns(path, names, request)
                held = sum(_captions_in(group, names, request, path) for group in groups)
        except (OSError, pa.ArrowException) as error:
            fault = first_line(error)
            jobs.append(Job(index=len(jobs), path=str(path), name=path.name, fault=fault))
            continue
        for piece in _pieces(rows, Job(index=0, path=str(path), name=path.name)):
            jobs.append(replace(piece, index=len(jobs)))
        total += sum(rows)
        captions += held
    if not total and not any(job.fault for job in jobs):
        raise UsageError(f"{request.source}: has no rows.")
    return Prepared(jobs=jobs, state=state, fingerprint=_by_size(files), rows=captions)


def _captions_in(group: Any, names: list[str], request: Request, path: Path) -> int:
    """The most pairs that a group of rows gives: of lists of captions each is one."""
    rows: int = group.num_rows
    wanted = parquet_columns(path, names, request)[1]
    columns = [group.column(n) for n in range(group.num_columns)]
    of_lists = (c.num_values for c in columns if c.path_in_schema.startswith(f"{wanted}."))
    return rows if request.captions == "first" else max([rows, *of_lists])


def _pieces(rows: Sequence[int], of: Job) -> Iterator[Job]:
    """Groups of so many rows as pieces of work: small ones together, large ones cut."""
    start = taken = 0
    for group, count in enumerate(rows):
        if count > MOST_PART_ROWS:
            if taken:
                yield replace(of, start=start, stop=group, weight=taken)
            for skip in range(0, count, MOST_PART_ROWS):
                take = min(MOST_PART_ROWS, count - skip)
                yield replace(of, start=group, stop=group + 1, skip=skip, take=take, weight=take)
            start, taken = group + 1, 0
            continue
        taken += count
        if taken >= PART_ROWS or (group == len(rows) - 1 and taken):
            yield replace(of, start=start, stop=group + 1, weight=taken)
            start, taken = group + 1, 0
