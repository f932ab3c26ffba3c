"""`grid ingest`: files of pictures and captions to a corpus, from the first look to the manifest.

What is made depends on the source and the request alone: not on workers, and not on how often it
was stopped.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grid.ingest_parts import How, Run, advice, run_parts, told
from grid.lock import LOCK, only_driver
from grid.progress import PartsProgress
from victims.errors import GridError, UsageError, counted, size_words
from victims.ingest.items import Job, Reason, Request
from victims.ingest.join import JOINING, join
from victims.ingest.keep import Kept, choose
from victims.ingest.sources import Prepared, prepare, source_state, state_digest
from victims.ingest.work import PARTS, read_part, rows_path, settle
from victims.pair_folders import MANIFEST, WORK, Folder, read_folder

PLAN = "plan.json"
TWICE = (Reason.DUPLICATE, Reason.DUPLICATE_MEMBER)  # whose like is in the corpus
MOST_SKIPPED = 0.5  # of the rows; a corpus of fewer is not published unless that is asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingested:
    """What came of it; ``is_new`` is false where it was there already."""

    folder: Folder
    is_new: bool
    wall_seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        about = {
            "out": str(self.folder.root),
            "new": self.is_new,
            "wall_seconds": self.wall_seconds,
        }
        return {**self.folder.about, **about}


def ingest(request: Request, out: Path, how: How, say: Callable[[str], None]) -> Ingested:
    """Make a corpus in a folder, or go on with it; one that is there already is only checked."""
    began = time.monotonic()
    _check_folder(out)
    with only_driver(out):
        run = Run(request, out, how, say)
        if (out / MANIFEST).is_file():
            return _again(run)
        run.prepared = _prepared(run)
        _check_room(run)
        if not (run.work / JOINING).exists():
            run_parts(run)
            _require_whole(run)
        num_parts = _num_parts(run)
        kept = choose(run.work, num_parts, request.limit)
        _check_skips(run, kept)
        looked = f"{counted(kept.seen, 'row')} looked at, {counted(kept.total, 'pair')}"
        say(f"{looked}; joining {counted(num_parts, 'part')}")
        progress = PartsProgress(num_parts, num_parts, say)
        with contextlib.closing(progress):
            join(out, run.work, kept, request.size, _about(run), progress.joined)
    return Ingested(
        folder=read_folder(out), is_new=True, wall_seconds=round(time.monotonic() - began, 1)
    )


def _check_folder(out: Path) -> None:
    """A folder for a corpus is new, or was begun by us: nothing of others is written over."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"--out {out}: is a file, not a folder")
    there = {path.name for path in out.iterdir()} - {LOCK}
    if there and not there & {MANIFEST, WORK}:
        raise UsageError(
            f"--out {out}: holds other files ({', '.join(sorted(there)[:3])}); give a new folder"
        )


def _again(run: Run) -> Ingested:
    """The corpus that is there, if this command made it."""
    folder = read_folder(run.out)
    made_of = folder.about.get("request")
    _require_same(run.out, made_of or {}, _plain(run.request), "request")
    if state_digest(source_state(run.request)) != folder.about.get("state"):
        raise UsageError(
            f"--out {run.out}: holds a corpus of {run.request.source} as it was, and its files have"
            " changed since. Give another --out, or delete this folder to begin anew."
        )
    shutil.rmtree(run.work, ignore_errors=True)  # a run that was stopped after it had published
    return Ingested(folder=folder, is_new=False)


def _plain(request: Request) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(asdict(request)))
    return plain


def _require_same(out: Path, was: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    names = sorted(n for n in {**was, **now} if was.get(n) != now.get(n))
    if not names:
        return
    if what == "request":
        told = "; ".join(f"{n}: {was.get(n)!r} there, {now.get(n)!r} now" for n in names)
        reason = f"was begun with other options ({told})"
    else:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        reason = f"was begun with other files: {', '.join(names[:3])}{more} changed since"
    raise UsageError(
        f"--out {out}: {reason}. Give another --out, or delete this folder to begin anew."
    )


def _prepared(run: Run) -> Prepared:
    """What there is to do: as it was written down when this folder was begun."""
    path, request = run.work / PLAN, _plain(run.request)
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if _is_worthless(run, kept["request"], request):
            run.say(f"--out {run.out}: had no pair by other options, and is begun anew")
            shutil.rmtree(run.work)
            return _prepared(run)
        _require_same(run.out, kept["request"], request, "request")
        _require_same(run.out, kept["state"], source_state(run.request), "source")
        jobs = [Job(**job) for job in kept.pop("jobs")]
        return Prepared(
            jobs=jobs, state=kept["state"], fingerprint=kept["fingerprint"], rows=kept["rows"]
        )
    is_ours = not run.work.exists()
    run.work.mkdir(parents=True, exist_ok=True)
    run.say(f"looking through {run.request.source} ({run.request.form})")
    try:
        found = prepare(run.request, run.work)
    except UsageError:
        if is_ours:
            shutil.rmtree(run.work)
        raise
    body = {
        "request": request,
        "state": found.state,
        "fingerprint": found.fingerprint,
        "rows": found.rows,
        "jobs": [asdict(job) for job in found.jobs],
    }
    scratch = run.work / f".{PLAN}.tmp"
    scratch.write_text(json.dumps(body), encoding="utf-8")
    settle(scratch)
    scratch.replace(path)
    return found


def _is_worthless(run: Run, was: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether other options were tried and gave no pair, a wrong root, say: nothing is lost."""
    if was == now or (run.work / JOINING).exists():
        return False
    row_bytes, parts = 3 * int(was["size"]) ** 2, run.work / PARTS
    indices = [int(path.stem) for path in parts.glob("*.parquet")] if parts.is_dir() else []
    found = [read_part(run.work, index, row_bytes) for index in indices]
    return not any(part is None or part.kept for part in found)


def _check_room(run: Run) -> None:
    """Say what the pixels may take; a disk that cannot hold them is said before, not after."""
    rows, limit = run.prepared.rows, run.request.limit
    most = min(n for n in (rows, limit) if n is not None) if rows or limit else None
    if most is None:
        return
    there = sum(path.stat().st_size for path in run.out.rglob("*") if path.is_file())
    pixels, part = most * run.row_bytes, _largest_part(run, most) * run.row_bytes
    wanted, free = pixels + part, shutil.disk_usage(run.out).free
    there_is = f"{size_words(free)} are free"
    run.say(f"up to {counted(most, 'pair')}: {size_words(pixels)} of pixels; {there_is}")
    if wanted > free + there:
        raise GridError(
            f"--out {run.out}: {size_words(wanted)} are needed (pairs x 3 x size x size bytes, and"
            f" {size_words(part)} for a part that lies there twice while parts are joined), and"
            f" {there_is} there. Give another --out, a smaller --size or a --limit."
        )


def _largest_part(run: Run, most: int) -> int:
    """The most pairs of a part. Of a shard only its bytes are known before it is read, of a part of
    a Parquet file the rows, each with several captions perhaps: each is reckoned to hold its share
    of the pairs."""
    weights = [job.weight for job in run.prepared.jobs]
    if (rows := run.prepared.rows) is not None:
        return min(most, -(-rows * max(weights, default=0) // max(1, sum(weights))))
    return min(most, -(-most * max(weights, default=0) // max(1, sum(weights))))


def _num_parts(run: Run) -> int:
    """The parts from the first on that are there: all of them, or those up to the limit."""
    jobs = run.prepared.jobs
    there = next((job.index for job in jobs if not rows_path(run.work, job.index).exists()), None)
    return len(jobs) if there is None else there


def _require_whole(run: Run) -> None:
    """That no part was cut since it was made: joining uses them up, and none could be made anew."""
    for index in range(_num_parts(run)):
        if read_part(run.work, index, run.row_bytes) is None:
            raise GridError(
                f"--out {run.out}: part {index} is not whole any more: was something else written"
                " there, or is the disk full? The same command makes it anew and goes on."
            )


def _check_skips(run: Run, kept: Kept) -> None:
    """Refuse a corpus of which most is missing: a wrong root or column looks like that."""
    if not kept.seen:
        raise GridError(
            f"{run.request.source}: has no rows ({run.request.form}). Nothing was published."
        )
    lost = {r: n for r, n in kept.skipped.items() if r not in TWICE}
    share = sum(lost.values()) / max(1, kept.seen)
    if kept.total and (share <= MOST_SKIPPED or run.how.allow_skips):
        return
    offer = (
        " If that is as it should be: the same command with --allow-skips." if kept.total else ""
    )
    raise GridError(
        f"{sum(lost.values()):,} of {kept.seen:,} rows gave no pair: {told(Counter(lost))}."
        f"{advice(lost)} Nothing was published.{offer}"
    )


def _about(run: Run) -> dict[str, Any]:
    names = ("pillow", "torchvision", "numpy", "pyarrow", "backdoor-grid")
    return {
        "request": _plain(run.request),
        "fingerprint": run.prepared.fingerprint,
        "state": state_digest(run.prepared.state),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in names},
    }


def words(found: Ingested) -> str:
    """What came of it: a table by reason."""
    about = found.folder.about
    told = {"looked at": about["seen"], "pairs": about["rows"]}
    told |= {f"  {name} (kept)": count for name, count in about["notes"].items()}
    told |= {f"skipped: {name}": count for name, count in about["skipped"].items()}
    width = max(map(len, told)) + 1
    lines = [f"{name:{width}}{count:>12,}" for name, count in told.items()]
    made = f"in {found.wall_seconds:g} s" if found.is_new else "was there already"
    root, size = found.folder.root, found.folder.size
    lines.append(f"{root}: {size} x {size} px, digest {found.folder.digest[:16]}; {made}")
    lines.append(f"look at it: grid corpus info {root}")
    return "\n".join(lines)
