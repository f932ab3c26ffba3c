"""Is every machine of a cluster fit for a grid? Asked before the first stage, on the cluster.

The machine that submits a job sees the head's web server alone, so these checks are part of the
job itself: they run beside the driver, on the environment that the stages will have.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from grid.machines import Machine, ask_each, autoscales, machines
from grid.registry import code_digest
from grid.stages import CorpusStage, FileModelStage, Stage
from victims.errors import GridError
from victims.evaluation_sets import EvaluationSet
from victims.ingested import IngestedPairs
from victims.keys import Key
from victims.labelled_files import LabelledFiles
from victims.places import shown
from victims.pretrained import Weights, is_here
from victims.retrieval_sets import RetrievalSet
from victims.store import Store

if TYPE_CHECKING:
    from grid.executors import Executor
    from grid.plan import Plan

# What the job's log says when all is well; who submits waits for it.
PASSED = "preflight passed"
ANSWER_SECONDS = 180.0
# A network file system may take a moment to show one machine what another has written.
SHOW_SECONDS = 10.0
CUDA = """
import sys, torch
if not torch.cuda.is_available():
    sys.exit("torch finds no CUDA device")
for index in range(torch.cuda.device_count()):
    torch.zeros(1, device=f"cuda:{index}").add_(1).cpu()
print(torch.cuda.device_count())
"""

Facts = dict[str, str]


def facts() -> Facts:
    """What must be the same on every machine."""
    found = {"Python": platform.python_version(), "code of this tool": code_digest()[:12]}
    for package in ("ray", "torch", "open_clip_torch", "numpy", "backdoor-grid"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    # Only there with ray[default], which Train's clean-up needs on every machine.
    found["ray[default]"] = "installed" if find_spec("aiohttp_cors") else "missing"
    return found


def look_around(store: str, name: str, gpus: float, data: Sequence[Needed] = ()) -> dict[str, Any]:
    """What a machine says of itself: versions, whether it can write to the store, its GPUs, and
    which places of ``data`` it cannot read."""
    absent = [str(place) for place in data if not _is_here(place)]
    found: dict[str, Any] = {"facts": facts(), "store": "", "cuda": "", "absent": absent}
    try:
        Store(store).write_note(name, name.encode())
    except (OSError, GridError) as error:
        found["store"] = _first_line(error)
    if gpus:
        found["cuda"] = cuda_fault(gpus)
    return found


def cuda_fault(gpus: float) -> str:
    """Why the GPUs that a machine advertises cannot be used; tried in a process of its own."""
    try:
        tried = subprocess.run(
            [sys.executable, "-c", CUDA], capture_output=True, text=True, timeout=120, check=False
        )
    except subprocess.TimeoutExpired:
        return "CUDA does not answer in 120 s"
    if tried.returncode:
        lines = tried.stderr.strip().splitlines() or [f"exit code {tried.returncode}"]
        return lines[-1]
    there = int(tried.stdout)
    return f"torch finds {there} of them" if there < gpus else ""


def read_back(store: str, name: str) -> str:
    """What is wrong with a file that another machine has just written; it is deleted."""
    end = time.monotonic() + SHOW_SECONDS
    while True:
        try:
            opened = Store(store)
            content = opened.read_note(name)
            if content is not None:
                opened.drop_note(name)
                return "" if content == name.encode() else "it holds something else"
        except (OSError, GridError) as error:
            return _first_line(error)
        if time.monotonic() > end:
            return "it is not there"
        time.sleep(0.5)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, GridError) else f"{type(error).__name__}: {lines[0]}"


def _silent(machine: Machine, error: Exception) -> str:
    """A machine that answers with an error, or not at all."""
    if isinstance(error, ImportError):
        return (
            f"node {machine.name}: this tool cannot be imported there ({error}). Install the same"
            " environment on every node, or put it into the image."
        )
    return (
        f"node {machine.name}: does not run a task ({_first_line(error)}). Look at its raylet's"
        " log, or take it out of the cluster."
    )


def own_faults(machine: Machine, answer: Any, reference: Facts, store: str) -> list[str]:
    """What is wrong with one machine, each with its cause and what to do."""
    if isinstance(answer, Exception):
        return [_silent(machine, answer)]
    faults = [
        f"node {machine.name}: {name} is {answer['facts'].get(name, 'none')}, and"
        f" {value} where the driver runs. Use one image or one environment on every node, then"
        " start its Ray again."
        for name, value in reference.items()
        if answer["facts"].get(name, "none") != value
    ]
    if answer["store"]:
        faults.append(
            f"node {machine.name}: cannot write to the store {shown(store)} ({answer['store']})."
            " Mount it there for the user that runs Ray, or give another --store."
        )
    faults += [
        f"node {machine.name}: cannot read {place}, which the grid takes data from. Put the data"
        " where every node sees them at the same path."
        for place in answer["absent"]
    ]
    if answer["cuda"]:
        faults.append(
            f"node {machine.name}: advertises {machine.gpus:g} GPUs, and {answer['cuda']}. Repair"
            " the driver or the container's access to the GPUs, or start its Ray with"
            " --num-gpus=0."
        )
    return faults


def store_faults(asked: list[Machine], said: Mapping[str, Any], store: str, run: str) -> list[str]:
    """Each machine reads what the next one wrote, and deletes it."""
    wrote = [m for m in asked if isinstance(said[m.id], dict) and not said[m.id]["store"]]
    writer = dict(zip([m.id for m in wrote], [*wrote[1:], *wrote[:1]], strict=True))
    names = {m.id: (store, f"{run}/{writer[m.id].id}") for m in wrote}
    found = ask_each(wrote, read_back, names, ANSWER_SECONDS)
    faults = []
    for machine in wrote:
        answer = found[machine.id]
        if isinstance(answer, Exception):
            faults.append(_silent(machine, answer))
        elif answer:
            faults.append(
                f"node {machine.name}: cannot read from the store {shown(store)} what node"
                f" {writer[machine.id].name} has just written ({answer}). Give a --store that"
                " every node sees at the same path (NFS, EFS, Lustre), or s3://BUCKET/PREFIX."
            )
    return faults


# Corpora that are read from files at a place of their own.
ON_DISK = (LabelledFiles, EvaluationSet, RetrievalSet)


@dataclass(frozen=True, slots=True, order=True)
class TagFile:
    """Published weights: at a path, or where a machine keeps those of their tag."""

    path: str
    arch: str
    tag: str

    def __str__(self) -> str:
        return f"{self.path} (nor are the weights {self.tag} of {self.arch} in its cache)"


Needed = str | TagFile


def _is_here(place: Needed) -> bool:
    if isinstance(place, str):
        return os.access(place, os.R_OK)
    return is_here(Weights(sha256="", path=place.path, tag=place.tag), place.arch)


def data_places(stages: Iterable[Stage], store: Store) -> list[Needed]:
    """Files and folders that stages read, apart from the store and unless it holds what they
    make of them. Of ingested pairs it never holds the pictures."""
    found, always = dict[Key, Needed](), set[Needed]()
    for stage in stages:
        spec = stage.spec if isinstance(stage, CorpusStage) else None
        if isinstance(spec, ON_DISK):
            found[stage.key] = spec.root
        elif isinstance(spec, IngestedPairs):
            always.add(spec.root)
        elif isinstance(stage, FileModelStage):
            path, tag = stage.weights.path, stage.weights.tag
            found[stage.key] = TagFile(path, stage.model.arch, tag) if tag else path
    return sorted(always | {place for key, place in found.items() if key not in store}, key=str)


def check_machines(
    store: str, say: Callable[[str], None], data: Sequence[Needed] = ()
) -> list[str]:
    """What is wrong with the machines of the cluster that this process has joined; ``data`` are
    places that those which run stages must be able to read."""
    asked, reference = machines(), facts()
    run = f"preflight-{uuid.uuid4().hex[:12]}"
    arguments = {
        m.id: (store, f"{run}/{m.id}", m.gpus, data if m.runs_stages else ()) for m in asked
    }
    said = ask_each(asked, look_around, arguments, ANSWER_SECONDS)
    faults = [f for m in asked for f in own_faults(m, said[m.id], reference, store)]
    faults += store_faults(asked, said, store, run)
    _clean_up(store, run)
    if reference["ray[default]"] == "missing":
        faults.append("the driver: ray[default] is missing. pip install 'ray[default,train,tune]'.")
    if not faults:
        told = ", ".join(f"{name} {value}" for name, value in reference.items())
        say(f"preflight: {len(asked)} nodes agree on {told}; each reads what others write")
    return faults


def _clean_up(store: str, run: str) -> None:
    """The folder of the check, and what no machine could delete in it."""
    try:
        Store(store).drop_notes(run)
    except (OSError, GridError):
        return


def preflight(executor: Executor, plan: Plan, store: str, say: Callable[[str], None]) -> None:
    """Check the cluster that an executor has joined for a grid; causes come first in the error.

    It is the run's own connection: when a job's first one ends, Ray may delete what it brought.
    """
    began = time.monotonic()
    stages = {stage.kind: stage for stage in plan.stages.values()}
    faults = check_machines(store, say, data_places(plan.stages.values(), Store(store)))
    lacking = executor.check(list(stages.values()))
    if lacking and not autoscales():
        faults.append(lacking)
    elif lacking:
        say(
            f"preflight: {lacking} The cluster may grow: the run waits"
            f" {plan.grid.execution.wait_seconds:g} s (execution.wait_seconds) for such a node."
        )
    if faults:
        raise GridError("\n".join(faults))
    say(f"{PASSED} in {time.monotonic() - began:.1f} s")
