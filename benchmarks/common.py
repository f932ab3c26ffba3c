"""What all benchmarks share: a figure with its aim, clocks, the machine, and tables.

Wall seconds are what a person waits. CPU seconds leave out what other processes took away from
this one, so on a busy machine they are the fairer clock for work on one thread.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from grid.results import commit, versions


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number: its unit (``x`` is a ratio) and, for some, the bound it should keep."""

    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def reached(self) -> bool | None:
        """Whether the aim is reached; None without an aim."""
        if self.at_least is None and self.at_most is None:
            return None
        low, high = self.at_least, self.at_most
        return (low is None or self.value >= low) and (high is None or self.value <= high)

    @property
    def aim(self) -> str:
        """The aim in words."""
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "" if self.at_most is None else f"<= {self.at_most:g}"


Figures = dict[str, Figure]
Clock = Literal["wall", "cpu"]


@dataclass(frozen=True, slots=True)
class Seconds:
    """What a piece of work took."""

    wall: float
    cpu: float

    def on(self, clock: Clock) -> float:
        return self.wall if clock == "wall" else self.cpu


Work = Callable[[], object]


def timed(work: Work) -> Seconds:
    """Wall and CPU seconds of one call in this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def interleaved(
    contenders: Mapping[str, Callable[[], Work]], rounds: int
) -> dict[str, list[Seconds]]:
    """Every contender once per round, in turning order, so that none gets the quiet moments.

    A contender prepares outside the clock and returns the work to be timed. The first round
    warms caches and is not counted.
    """
    found: dict[str, list[Seconds]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name in list(contenders)[:: 1 if number % 2 else -1]:
            seconds = timed(contenders[name]())
            if number:
                found[name].append(seconds)
    return found


def ratio(slow: Sequence[Seconds], fast: Sequence[Seconds], clock: Clock = "cpu") -> float:
    """How many times faster ``fast`` is: the median over rounds of each round's own ratio."""
    pairs = zip(slow, fast, strict=True)
    return statistics.median(s.on(clock) / f.on(clock) for s, f in pairs)


def median(seconds: Sequence[Seconds], clock: Clock = "cpu") -> float:
    return statistics.median(s.on(clock) for s in seconds)


@dataclass(frozen=True, slots=True)
class Process:
    """A finished child process."""

    seconds: Seconds
    code: int
    out: str
    err: str


def child(*arguments: str, expect: Sequence[int] = (0,)) -> Process:
    """Run Python with ``arguments`` and wait; CPU seconds are its own and its children's."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if done.returncode not in expect:
        said = (done.stderr or done.stdout).strip()[-2000:]
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}:\n{said}")
    return Process(Seconds(wall, cpu), done.returncode, done.stdout, done.stderr)


def grid(*arguments: str, expect: Sequence[int] = (0,)) -> Process:
    """The command ``grid`` in a process of its own."""
    return child("-m", "grid.cli", *arguments, expect=expect)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(slots=True)
class Session:
    """The figures of one call of ``python -m benchmarks``, and where they were measured."""

    figures: dict[str, Figures] = field(default_factory=dict)
    load: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def run(self, name: str, main: Callable[[], Figures]) -> None:
        """Run one benchmark; one that breaks does not take the others with it."""
        before = os.getloadavg()[0]
        try:
            self.figures[name] = main()
        except Exception as error:
            self.failures[name] = f"{type(error).__name__}: {error}"
        self.load[name] = [before, os.getloadavg()[0]]

    def write(self, path: Path) -> None:
        """Everything as JSON."""
        figures = {
            name: {what: _as_dict(figure) for what, figure in found.items()}
            for name, found in self.figures.items()
        }
        body = {
            "machine": machine(),
            "figures": figures,
            "load_before_and_after": self.load,
            "failures": self.failures,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n", "utf-8")

    def record(self, folder: Path) -> list[Path]:
        """A file for each benchmark, which the documents take their tables from."""
        from docs.tables import digest_of

        folder.mkdir(parents=True, exist_ok=True)
        about, written = machine(), []
        for name, found in self.figures.items():
            figures = {what: _as_dict(figure) for what, figure in found.items()}
            body = {"benchmark": name, "made": about, "load": self.load[name], "figures": figures}
            path = folder / f"{name}.json"
            path.write_text(json.dumps({**body, "digest": digest_of(body)}, indent=1) + "\n")
            written.append(path)
        return written


def _as_dict(figure: Figure) -> dict[str, Any]:
    return {"value": figure.value, "unit": figure.unit, "aim": figure.aim, "ok": figure.reached}


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "commit": commit(),
        "versions": json.loads(versions()),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def lines(name: str, figures: Mapping[str, Figure]) -> list[str]:
    """A benchmark as lines of a table: what, how much, the aim and whether it is reached."""
    marks = {None: "", True: "ok", False: "MISSED"}
    out = [name]
    for what, figure in figures.items():
        digits = 3 if figure.unit in ("x", "s") else 1 if abs(figure.value) < 1000 else 0
        number = f"{figure.value:,.{digits}f}"
        tail = f"{figure.aim:>10} {marks[figure.reached]}"
        out.append(f"  {what:50}{number:>12} {figure.unit:10}{tail}".rstrip())
    return out
