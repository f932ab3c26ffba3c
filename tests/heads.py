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
    log = folder / "head.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            ["ray", "start", *words, *options],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**_variables(folder, token), **more},
            cwd=folder,
            start_new_session=True,
        )
    family: dict[int, str] = {}
    try:

        def is_up() -> bool:
            assert process.poll() is None, log.read_text()
            return "--block" in log.read_text()

        wait_for(is_up, 180)
        yield Head(f"http://127.0.0.1:{port}", token, folder, process.pid)
    finally:
        family |= descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()
        for pid in alive(family):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
