"""A grid as a job of a Ray cluster: what travels, what it is called, what is said of its end."""

from __future__ import annotations

import hashlib
import posixpath
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from grid.execution import Execution
from grid.handles import Handle
from grid.jobs import Jobs, JobState
from grid.preflight import PASSED
from grid.quick import names_files
from grid.registry import Source, grid_source
from victims.errors import GridError, UsageError
from victims.places import shown

# The driver ends as with Ctrl-C: rows in hand are written, and the exit code says so.
VARIABLES = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "30"}
STOP_SECONDS = 60.0
# Where a grid file from elsewhere lies in the job's working directory.
TRAVELS = "submitted"

MEANING = {
    3: "the grid is not complete, or a method failed; `grid check` on the cluster says where",
    4: "the victims of an attack failed their gate; `grid check` on the cluster says which",
    127: "put the environment's bin folder first in PATH before `ray start` on the head",
    130: "interrupted; the same command goes on where this one stopped",
    137: "killed, perhaps for want of memory on the head",
    -9: "killed, perhaps for want of memory on the head",
}


def check_places(out: str | None, store: str | None) -> None:
    """What a job writes must not lie in its working directory, which is temporary."""
    if out is not None and not out.startswith("/"):
        raise UsageError(
            f"--out {out}: give an absolute path on the cluster; a job's working directory is"
            " deleted after it"
        )
    if store is not None and "@" in store.partition("://")[2].partition("/")[0]:
        raise UsageError(
            f"--store {shown(store)}: an address with a user part would stand in the cluster's"
            " logs. Give the key to the nodes by their environment, and the address without it."
        )
    if store is not None and not store.startswith("/") and "://" not in store:
        raise UsageError(
            f"--store {store}: give an absolute path that every node sees, or a URI such as"
            " s3://BUCKET/PREFIX; a job's working directory is deleted after it"
        )


@contextmanager
def baggage(named: str, folder: Path) -> Iterator[tuple[str, str]]:
    """The folder to send, and what the grid is called in it.

    A grid file from outside ``folder`` is laid beside what is in it, in a folder of links, so that
    what the folder ignores is ignored still.
    """
    if not folder.is_dir():
        raise UsageError(f"--working-dir {folder}: no such folder")
    path, root = Path(named), folder.resolve()
    if not path.is_file():  # a preset
        yield str(root), named
    elif path.resolve().is_relative_to(root):
        yield str(root), path.resolve().relative_to(root).as_posix()
    else:
        with tempfile.TemporaryDirectory(prefix="grid-submit-") as scratch:
            for entry in root.iterdir():
                if entry.name != TRAVELS:
                    Path(scratch, entry.name).symlink_to(entry)
            target = Path(scratch, TRAVELS, path.name)
            target.parent.mkdir()
            target.write_bytes(path.read_bytes())
            yield scratch, f"{TRAVELS}/{path.name}"


def job_command(
    grid: str, out: str | None, store: str | None, only: str | None, on: str | None = None
) -> str:
    """What runs on the head."""
    words = ["grid", "run", grid, "--preflight"]
    given = (("--out", out), ("--store", store), ("--only", only), ("--on", on))
    for option, value in given:
        words += [option, value] if value is not None else []
    return shlex.join(words)


def job_prefix(name: str, out: str | None) -> str:
    """What the jobs of one results folder begin with: one of them runs at a time."""
    where = posixpath.normpath(out) if out is not None else f"default {name}"
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)
    return f"grid-{plain}-{hashlib.sha256(where.encode()).hexdigest()[:8]}"


def next_job(prefix: str, states: list[JobState]) -> str:
    """The name of a folder's next job; one that has not ended is in its way."""
    numbers = [0]
    for state in states:
        match = re.fullmatch(rf"{re.escape(prefix)}-(\d+)", state.id)
        if match is None:
            continue
        if not state.has_ended:
            raise GridError(
                f"job {state.id} runs on these results already ({state.status.lower()}); one run at"
                " a time writes to a folder. Follow it with grid job logs, end it with grid job"
                " stop, or give another --out."
            )
        numbers.append(int(match[1]))
    return f"{prefix}-{max(numbers) + 1}"


def grid_hash(source: Source) -> str:
    """The grid's hash, and with it whether its file can be meant; empty if only a cluster knows."""
    if names_files(source):
        return ""
    from grid.gridfile import decode_grid

    return decode_grid(source).identity_hash


def submit(
    named: str,
    *,
    jobs: Jobs,
    folder: Path,
    home: Path,
    out: str | None,
    store: str | None,
    only: str | None,
    on: str | None = None,
) -> tuple[Handle, Path]:
    """Send a grid to the cluster; its handle, and where that was written."""
    check_places(out, store)
    source = grid_source(named)
    if only is not None:
        from grid.filters import parse_filter

        parse_filter(only)
    if on is not None:
        Execution().moved(on)
    digest = grid_hash(source)
    with baggage(named, folder) as (sent, grid):
        job = next_job(job_prefix(source.name, out), jobs.states())
        jobs.submit(job, job_command(grid, out, store, only, on), sent, VARIABLES)
    handle = Handle(
        job=job,
        address=jobs.address,
        grid=source.name,
        hash=digest,
        out=out or "",
        store=shown(store or ""),
        submitted=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    place = handle_folder(out, home / source.name)
    try:
        return handle, handle.write(place)
    except OSError as error:
        raise GridError(
            f"job {job} was submitted, but its handle cannot be written to {place}"
            f" ({error.strerror or error}). Follow it with `ray job logs {job} --follow`."
        ) from error


def handle_folder(out: str | None, otherwise: Path) -> Path:
    """Beside the results where this machine sees them; else where they would be here."""
    return Path(out) if out is not None and Path(out).parent.is_dir() else otherwise


def wait_for_preflight(jobs: Jobs, job: str, say: Callable[[str], None]) -> JobState:
    """Hand on what the job says until every node was found fit, or the job has ended."""
    return jobs.follow(job, say, until=PASSED)


def verdict(state: JobState, log: str) -> tuple[str, int]:
    """What became of a job in words, its cause first, and the exit code that says the same."""
    if state.status == "SUCCEEDED":
        return f"job {state.id} succeeded", 0
    if state.status == "STOPPED":
        return f"job {state.id} was stopped; submit the grid again to go on", 3
    if state.status != "FAILED":
        return f"job {state.id} is {state.status.lower()}", 0
    cause = cause_of(state, log)
    if state.code is None:
        return f"{cause}: job {state.id} failed before its driver started", 1
    meaning = MEANING.get(state.code, "")
    said = f"{cause} ({meaning})" if cause and meaning else cause or meaning
    code = state.code if state.code in (1, 2, 3, 4) else 1
    return f"exit code {state.code}: {said} [job {state.id}]", code


def cause_of(state: JobState, log: str) -> str:
    """The driver's own last word; of a traceback its last line, not its first."""
    if state.code in (3, 4):
        return ""  # an outcome: what the log ends with is the board
    lines = [line.rstrip() for line in (log or state.message).splitlines() if line.strip()]
    own = [line.removeprefix("grid: ") for line in lines if line.startswith("grid: ")]
    if own:
        return own[-1]
    told = [line for line in lines if not line.startswith(("Running entrypoint for job ", " "))]
    return told[-1].strip() if told else "it said nothing"
