"""A real head of a Ray cluster with its Jobs API, for tests: a token, ports and folders of its own.

It is started as the documents say, and ended by the ids of its processes, whatever becomes of it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.grids import Answer, call, environment
from tests.processes import alive, descendants, wait_for

ROOT = Path(__file__).parents[1]
ATTEMPTS = 3


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@dataclass(frozen=True)
class Head:
    """Where it answers, and what a person at its side has in their environment."""

    address: str
    token: str
    folder: Path
    pid: int

    @property
    def variables(self) -> dict[str, str]:
        return _variables(self.folder, self.token)

    def grid(
        self, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch, *words: object
    ) -> Answer:
        """``grid`` in this process, beside the head."""
        with patch.context() as here:
            here.setenv("GRID_HOME", str(self.folder / "handles"))
            here.delenv("RAY_ADDRESS", raising=False)
            return call(capsys, *words)


def _variables(folder: Path, token: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return environment(
        PATH=path,
        PYTHONPATH=str(ROOT),
        HOME=str(folder / "home"),
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=token,
        RAY_USAGE_STATS_ENABLED="0",
        AUTOSCALER_UPDATE_INTERVAL_S="1",
        RAY_worker_niceness="0",  # else its workers wait for everything else on the machine
    )


@contextlib.contextmanager
def started_head(*options: str, gcs_port: int = 0, token: str = "", **more: str) -> Iterator[Head]:
    """A head on loopback addresses; its socket paths must be short, so its folder is."""
    token = token or os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)
    folder = Path(tempfile.mkdtemp(prefix="gh-"))
    (folder / "home").mkdir()
    port = free_port()
    words = ["--head", "--block", "--disable-usage-stats", f"--port={gcs_port}"]
    words += [
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={port}",
        f"--temp-dir={folder / 'r'}",
    ]
    words += ["--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"]
    variables = {**_variables(folder, token), **more}
    try:
        process = _come_up(["ray", "start", *words, *options], folder, port, variables)
        try:
            yield Head(f"http://127.0.0.1:{port}", token, folder, process.pid)
        finally:
            _end(process)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _come_up(
    command: list[str], folder: Path, port: int, variables: dict[str, str]
) -> subprocess.Popen[bytes]:
    """Start a head and wait for it. Ray gives its parts 30 s, which a busy machine may not."""
    for attempt in range(ATTEMPTS):
        log = folder / f"head-{attempt}.log"
        if (process := _attempt(command, folder, port, variables, log)) is not None:
            return process
    raise AssertionError(log.read_text())


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        return True
    return False


def _attempt(
    command: list[str], folder: Path, port: int, variables: dict[str, str], log: Path
) -> subprocess.Popen[bytes] | None:
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=variables,
            cwd=folder,
            start_new_session=True,
        )
    try:
        wait_for(
            lambda: process.poll() is not None or ("--block" in log.read_text() and _answers(port)),
            240,
        )
    except BaseException:
        _end(process)
        raise
    if process.poll() is None:
        return process
    _end(process)
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a head and all that it started."""
    family = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    process.kill()
    process.wait()
    left = alive(family) + _of_session(process.pid)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _of_session(number: int) -> list[int]:
    """Processes of a session whose leader has gone, and which belong to nobody's family now."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == number:
                    found.append(int(folder.name))
    return found
