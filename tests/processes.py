"""Driver processes for tests of faults: started apart, watched through /proc, always ended."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.grids import environment, grid_command


def wait_for(happened: Callable[[], bool], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def descendants(pid: int) -> dict[int, str]:
    """Every process below ``pid``, with the moment it started: pids are used again."""
    parents: dict[int, tuple[int, str]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                # After the name in brackets: state, parent, ..., start time.
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                parents[int(folder.name)] = (int(fields[1]), fields[19])
    found: dict[int, str] = {}
    todo = [pid]
    while todo:
        above = todo.pop()
        for child, (parent, started) in parents.items():
            if parent == above and child not in found:
                found[child] = started
                todo.append(child)
    return found


def alive(processes: dict[int, str]) -> list[int]:
    """Those of the processes that have not ended."""
    left = []
    for pid, started in processes.items():
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if fields[19] == started and fields[0] != "Z":
                left.append(pid)
    return left


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip() or str(pid)
    except OSError:
        return str(pid)


class Command:
    """``grid`` with some arguments in a process of its own, and what it started."""

    def __init__(self, log: Path, *arguments: object, **more: str) -> None:
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                grid_command(*arguments),
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(**more),
                start_new_session=True,
            )
        self.family: dict[int, str] = {}

    def look(self) -> None:
        """Note which processes there are now; once the driver is gone nobody can tell."""
        self.family |= descendants(self.process.pid)

    def send(self, number: signal.Signals) -> None:
        self.look()
        self.process.send_signal(number)

    def wait(self, seconds: float = 120) -> int:
        """The exit code; notes what the driver starts meanwhile."""

        def ended() -> bool:
            self.look()
            return self.process.poll() is not None

        wait_for(ended, seconds)
        return int(self.process.returncode)

    @property
    def said(self) -> str:
        return self.log.read_text()

    def leaves_nothing(self, but: str = "-", seconds: float = 20) -> None:
        """Everything it started ends, except what carries ``but`` in its name."""
        end = time.monotonic() + seconds
        while left := [name for name in map(name_of, alive(self.family)) if but not in name]:
            assert time.monotonic() < end, left
            time.sleep(0.05)


@contextlib.contextmanager
def command(log: Path, *arguments: object, **more: str) -> Iterator[Command]:
    """A command that cannot outlive the test, nor can anything it started."""
    running = Command(log, *arguments, **more)
    try:
        yield running
    finally:
        running.look()
        running.process.kill()
        running.process.wait()
        for pid in alive(running.family):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def worker_of(log: Path) -> int:
    """The process that began a stage last, from the stage's log file."""
    return int(re.findall(r"process (\d+) of ", log.read_text())[-1])
