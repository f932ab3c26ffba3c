"""Running one stage, wherever it runs, and saying what became of it. No Ray here."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from grid.stages import Bench, Stage
from victims.errors import BadData, GridError
from victims.lab import Ledger, Watch
from victims.pulse import beat
from victims.recipe import Runtime
from victims.store import Busy, Damaged, NoSpace, Store


class LeftOff(BaseException):
    """Whoever watches a fit has seen enough. Its last mid-fit checkpoint stays."""


class Ended(StrEnum):
    """How an attempt ended. Only the infrastructure's fault is tried again."""

    OK = "ok"
    METHOD = "failed_method"
    INFRASTRUCTURE = "failed_infrastructure"
    BUSY = "busy"
    DAMAGED = "damaged"
    NO_SPACE = "no_space"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One attempt at one stage."""

    key: str
    ended: Ended
    message: str = ""
    detail: str = ""
    damaged: str = ""
    seconds: float = 0.0
    started: float = 0.0
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    device: str = ""
    threads: int = 1
    made: tuple[str, ...] = ()
    cost: Mapping[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    again: bool = True  # whether another attempt may end otherwise


_stores: dict[str, Store] = {}


def execute(
    stage: Stage, store_uri: str, runtime: Runtime, log_dir: str, watch: Watch | None = None
) -> Outcome:
    """Run a stage in this process and classify whatever happens.

    What ``watch`` raises as `LeftOff` ends the stage and is no outcome.
    """
    import torch

    torch.set_num_threads(runtime.threads)
    started, clock = time.time(), time.perf_counter()
    ledger = Ledger()
    common: dict[str, Any] = {"key": stage.key, "started": started, "threads": runtime.threads}
    common["device"] = _device_name(runtime.device)
    with _log(log_dir, stage) as report:
        try:
            if store_uri not in _stores:
                _stores[store_uri] = Store(store_uri)
            where = f"{common['device']}, process {os.getpid()} of {socket.gethostname()}"
            report(f"{stage.key} ({stage.family}) on {where}")
            stage.run(Bench(_stores[store_uri], runtime, report, ledger, watch))
            common |= {"ended": Ended.OK, "made": tuple(ledger.made), "cost": ledger.total()}
        except Busy as error:
            common |= {"ended": Ended.BUSY, "message": str(error)}
        except Damaged as error:
            common |= {"ended": Ended.DAMAGED, "message": str(error), "damaged": error.key}
        except NoSpace as error:
            common |= {"ended": Ended.NO_SPACE, "message": str(error)}
        except (Exception, SystemExit) as error:
            common |= _failure(error)
        report(f"{common['ended']} {common.get('message', '')}".rstrip())
        if common.get("detail"):
            report(common["detail"])
    if str(common["device"]).startswith("cuda"):
        with contextlib.suppress(RuntimeError):  # a lost device says so at every call
            common["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.empty_cache()
    return Outcome(seconds=time.perf_counter() - clock, **common)


# What torch says in a plain RuntimeError of a connection that broke, in gloo's transport or in
# NCCL, and of a GPU or its driver. Tensors that ranks disagree about fail elsewhere in gloo.
MACHINE_SAYS = re.compile(
    r"gloo/transport/|gloo connectFullMesh failed|\bNCCL (error|communicator was aborted)"
    r"|\bCUDA (driver )?error",
    re.IGNORECASE,
)


def is_machines(error: BaseException) -> bool:
    """Whether an error is the machine's or its files': all others are the method's."""
    import torch

    kinds: tuple[type[BaseException], ...] = (
        OSError,
        MemoryError,
        BadData,
        torch.cuda.OutOfMemoryError,
        torch.AcceleratorError,
    )
    if torch.distributed.is_available():
        kinds += (torch.distributed.DistError,)
    said_by_torch = type(error) is RuntimeError and MACHINE_SAYS.search(str(error)) is not None
    return isinstance(error, kinds) or said_by_torch


def _failure(error: BaseException) -> dict[str, Any]:
    """The machine's fault, or the method's."""
    machine = is_machines(error)
    first = str(error).strip().split("\n")[0] or type(error).__name__
    named = first if isinstance(error, GridError) else f"{type(error).__name__}: {first}"
    return {
        "ended": Ended.INFRASTRUCTURE if machine else Ended.METHOD,
        "again": not isinstance(error, BadData),
        "message": named,
        "detail": "" if isinstance(error, GridError) else traceback.format_exc(limit=12),
    }


def _device_name(device: str) -> str:
    import torch

    if device.startswith("cuda") and torch.cuda.is_available():
        return f"{device}:{torch.cuda.get_device_name(device)}"
    return device


@contextlib.contextmanager
def _log(log_dir: str, stage: Stage) -> Iterator[Any]:
    """Append lines to the stage's log file; without a reachable folder they go nowhere."""
    folder = Path(log_dir)
    if not log_dir or not folder.is_dir():
        yield lambda line: None
        return
    try:
        file = (folder / f"{stage.key}.log").open("ab", buffering=0)
    except OSError:
        yield lambda line: None
        return
    with file:

        def report(line: str) -> None:
            beat()
            # Unbuffered: a line that a full disk refused must not come back when closing.
            with contextlib.suppress(OSError):
                file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {line}\n".encode())

        yield report


def choose_device(wanted: str, gpus: float) -> str:
    """``auto`` is a GPU where one was assigned or, outside a cluster, where there is one."""
    import torch

    if wanted != "auto":
        return wanted
    return "cuda" if gpus > 0 and torch.cuda.is_available() else "cpu"


def device_fault(device: str) -> str | None:
    """Why this process cannot compute on a device, in words."""
    import torch

    missing = {
        "cuda": device.startswith("cuda") and not torch.cuda.is_available(),
        "mps": device == "mps" and not torch.backends.mps.is_available(),
    }
    for name, is_missing in missing.items():
        if is_missing:
            return (
                f"execution.device is {name}, and torch finds no such device here. Give auto or"
                " cpu, or repair the driver."
            )
    return None
