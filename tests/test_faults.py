"""Killing a worker or the driver, or Ctrl-C, in the middle of a fit changes no number."""

from __future__ import annotations

import os
import signal
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from grid.cluster.group import in_worker_group
from grid.cluster.warm import _leave_a_lost_device
from grid.execution import Resources
from grid.gridfile import load_grid
from grid.logbook import DIED
from grid.planning import make_plan
from grid.work import Ended, is_machines
from tests.grids import RECIPE, TINY, numbers, outcomes, records, run_serial, write_grid_file
from tests.processes import command, wait_for, worker_of
from tests.stages import Note
from victims.checkpoints import read_state
from victims.errors import BadData
from victims.keys import Key
from victims.recipe import Runtime
from victims.store import Store

# A victim's fit of some seconds, with several checkpoints on the way.
EPOCHS = 16
LONG: dict[str, Any] = {
    "defenses": ["none"],
    "data": {"world": {**TINY["data"]["world"], "suspect": 256}},
    "recipes": {**TINY["recipes"], "victim": {**RECIPE, "epochs": EPOCHS}},
    # One lane: every further worker imports torch for seconds.
    "execution": {**TINY["execution"], "lanes": 1, "checkpoint_seconds": 0.1},
}


def epochs_of(log: Path) -> list[int]:
    """The epochs that the attempts at a fit finished, in order."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [int(line.split(" epoch ")[1].split("/")[0]) for line in lines if " epoch " in line]


# What gloo, NCCL and CUDA say, as plain errors of torch.
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] "
MACHINES: list[BaseException] = [
    OSError("disk"),
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory."),
    torch.AcceleratorError("CUDA error: unspecified launch failure", 719),
    dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:94, unhandled system error"),
    dist.DistNetworkError("The client socket has timed out"),
    RuntimeError(GLOO + "Read error [10.0.0.1]:4411: Connection reset by peer"),
    RuntimeError(GLOO + "Connection closed by peer [10.0.0.1]:4411"),
    RuntimeError("Gloo connectFullMesh failed with " + GLOO + "no error"),
    RuntimeError("NCCL communicator was aborted on rank 1."),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA driver error: unknown error"),
    BadData("val/1.png: cannot be read as a picture"),
]


class TeaError(RuntimeError):
    """An error of a method's own."""


METHODS: list[BaseException] = [
    RuntimeError("no tea left"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    # Ranks that gather tensors of different sizes do so again.
    RuntimeError("[enforce fail at /pytorch/third_party/gloo/gloo/allgather.cc:30] sizes differ"),
    TeaError("the CUDA error of the cup"),
    ValueError("Connection reset by peer"),
]


@pytest.mark.parametrize("error", MACHINES, ids=str)
def test_what_is_the_machines_fault(error: BaseException) -> None:
    assert is_machines(error)


@pytest.mark.parametrize("error", METHODS, ids=str)
def test_what_stays_the_methods_fault(error: BaseException) -> None:
    assert not is_machines(error)


class _NoRoom:
    """A worker group whose turn does not come."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def fit(self) -> None:
        from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
        from ray.train.v2.api.exceptions import ControllerError

        raise ControllerError(WorkerGroupStartupTimeoutError(2))


def test_a_group_that_waits_for_its_turn_uses_up_no_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three such waits of two minutes each once were a failure."""
    import ray.train.torch

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", _NoRoom)
    wants = Resources(workers=2)
    stage = Note("a", str(tmp_path))
    ended = in_worker_group("test/0", stage, str(tmp_path), Runtime(), "", wants)
    assert (ended.key, ended.ended) == (stage.key, Ended.BUSY)


def test_a_process_that_lost_its_gpu_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a warm process every later stage would meet the error of the first."""
    left: list[int] = []
    monkeypatch.setattr("grid.cluster.warm.os._exit", left.append)
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    _leave_a_lost_device("cuda:0")
    assert left == []

    def lost(device: str) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr("torch.cuda.synchronize", lost)
    _leave_a_lost_device("cuda:0")
    assert left == [1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_faults_in_the_middle_change_no_number(tmp_path: Path) -> None:
    """A worker is killed, then the run is interrupted, then its driver is killed; three commands
    finish it, the last one without Ray."""
    file = write_grid_file(tmp_path, **LONG)
    grid = load_grid(str(file))
    out, store = tmp_path / "out", tmp_path / "store"
    words = ("run", file, "--out", out, "--store", store)
    cells = make_plan(grid).cells
    clean, poisoned = (
        next(c.measure.defended.victim.key for c in cells if c.cell.rate == rate)
        for rate in ("0", "0.1")
    )
    logs = {key: out / "logs" / f"{key}.log" for key in (clean, poisoned)}

    def is_saved(key: Key, epochs: int) -> bool:
        """Whether the newest mid-fit checkpoint lies behind so many whole epochs."""
        saved = store / "partial" / key / "fit.safetensors"
        found = read_state(saved) if saved.exists() else None
        return found is not None and found[0]["epoch"] >= epochs

    with command(tmp_path / "first.txt", *words) as first:
        # A worker dies; the driver gives the fit to another one.
        wait_for(lambda: is_saved(clean, 1))
        victim_of_ours = worker_of(logs[clean])
        first.look()
        assert victim_of_ours in first.family
        os.kill(victim_of_ours, signal.SIGKILL)
        wait_for(lambda: " will be tried again" in first.said)
        # Then somebody presses Ctrl-C, in the middle of a fit.
        wait_for(lambda: len(set(epochs_of(logs[clean]))) > 3)
        first.send(signal.SIGINT)
        assert first.wait() == 130, first.said
        assert "the same command goes on" in first.said
        assert "Traceback" not in first.said
        first.leaves_nothing()

    def begun() -> int:
        return logs[clean].read_text().count(", process ")

    before = begun()
    with command(tmp_path / "second.txt", *words) as second:
        # Then the driver dies, in the middle of the same fit, which may have come far before.
        wait_for(lambda: begun() > before and is_saved(clean, 7))
        assert clean not in {row["key"] for row in records(out, "stages")}
        second.send(signal.SIGKILL)
        second.wait()
        # Ray's agents wait a minute for a head that does not come back. They compute nothing.
        second.leaves_nothing(but="Agent")
        # A worker trains on for a moment without its driver, and may come to the end.
        left_behind = int(clean in Store(store))

    assert run_serial(grid, out, store).code == 0
    assert {row["status"] for row in outcomes(out).values()} == {"ok"}

    # Mid-fit checkpoints were used: no attempt began at the first epoch again, and each lost at
    # most what came after the last checkpoint.
    for key, log in logs.items():
        epochs = epochs_of(log)
        assert epochs.count(1) == 1, (key, epochs)
        assert sorted(set(epochs)) == list(range(1, EPOCHS + 1))
        assert not (store / "partial" / key).exists()
    # The killed worker's attempt is on record, that of the killed driver, and those that ended
    # well.
    attempts = records(out, "attempts")
    tried = Counter((a["key"], a["outcome"]) for a in attempts)
    failed = [a for a in attempts if a["outcome"] == "failed_infrastructure"]
    by_worker, by_driver = sorted(failed, key=lambda a: a["started_at"])
    assert by_worker["key"] == by_driver["key"] == clean
    assert (by_worker["pid"], by_worker["host"]) == (victim_of_ours, socket.gethostname())
    assert by_driver["error"] == DIED
    assert tried[clean, "ok"] == 1 - left_behind
    assert tried[poisoned, "ok"] == 1
    # Nothing that was whole was made twice.
    made = Counter(row["key"] for row in records(out, "stages") if not row["reused"])
    assert set(made.values()) == {1}

    run_serial(grid, tmp_path / "calm", tmp_path / "calm-store")
    assert numbers(out) == numbers(tmp_path / "calm")
