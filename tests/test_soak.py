"""Two hundred cells on a cluster on which something is killed every few seconds.

A kill is counted when it hits a stage: the stage's log names the process that was killed and does
not tell yet how it ended. Each such kill has one failed attempt, with the process and a cause, and
there are no others. Processes are halted before one looks, so that what is seen holds when they
are killed.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from grid.control import Control, Verb
from grid.journal import read_progress
from grid.logbook import DIED
from grid.planning import make_plan
from grid.quick import UNWRITTEN
from tests.clusters import kill_raylet
from tests.grids import RECIPE, TINY, numbers, outcomes, records, run_serial, tiny_grid
from tests.processes import Command, command, descendants, name_of, wait_for

pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(900)]

SEEDS, RATES = 20, (0, 0.1)
REPAIRS = [
    {"finetune": {"recipe": {"lr": lr}, "as": f"finetune-{lr}"}} for lr in (1e-3, 2e-3, 3e-3, 4e-3)
]
GRID: dict[str, Any] = {
    "seeds": list(range(SEEDS)),
    "rates": list(RATES),
    "defenses": ["none", *REPAIRS],
    "recipes": {**TINY["recipes"], "victim": {**RECIPE, "epochs": 8}},
    "execution": {**TINY["execution"], "lanes": 4, "checkpoint_seconds": 0.05},
}
NUM_CELLS = SEEDS * len(RATES) * (1 + len(REPAIRS))
NUM_NODES = 3
# What is killed, in this order.
TURNS = (
    *("worker", "node", "worker", "idle", "driver", "worker", "worker", "driver"),
    *("worker", "worker", "node", "worker", "worker", "idle", "worker", "node", "worker"),
)
# The share of all stages that end before the first kill, and between two.
PACE = 1 / (len(TURNS) + 2)
BETWEEN_SECONDS = (0.0, 2.0)
# Within these the driver has taken every outcome that arrived, on a busy machine too.
SETTLED_SECONDS = 3.0


class Hit(NamedTuple):
    """A stage that ran in a process that was killed."""

    key: str
    pid: int


class Log(NamedTuple):
    """The last attempt that a stage's log tells of."""

    pid: int
    is_over: bool


def read_log(path: Path) -> Log:
    lines = path.read_text().splitlines()
    begun = [i for i, line in enumerate(lines) if re.search(r", process \d+ of ", line)]
    if not begun:
        return Log(0, True)
    over = [i for i, line in enumerate(lines) if re.match(r"\S+ (ok|busy|damaged|failed_)", line)]
    (pid,) = re.findall(r", process (\d+) of ", lines[begun[-1]])
    return Log(int(pid), bool(over) and over[-1] > begun[-1])


class Killer:
    """Kills what belongs to a cluster, and knows which stages it hit."""

    def __init__(self, cluster: Any, out: Path, start: Callable[[], Command]) -> None:
        self.cluster, self.out, self.start = cluster, out, start
        self.driver = start()
        self.hits: dict[str, list[Hit]] = {"worker": [], "node": [], "driver": []}
        self.chance = random.Random(0)

    def run(self, num_stages: int) -> None:
        """Every kill in its turn, all along the run."""
        for turn, what in enumerate(TURNS):
            while self.num_done() < turn * PACE * num_stages:
                assert self.driver.process.poll() is None, self.driver.said
                time.sleep(0.1)
            time.sleep(self.chance.uniform(*BETWEEN_SECONDS))
            while not self.strike(what):
                assert self.driver.process.poll() is None, self.driver.said
                time.sleep(0.1)

    def num_done(self) -> int:
        stages = (read_progress(self.out) or {}).get("stages", {})
        return int(stages.get("found", 0) + stages.get("done", 0))

    def strike(self, what: str) -> bool:
        """One kill, if this is its moment; what is halted for a look goes on if not."""
        if what == "idle":
            return self.strike_idle()
        nodes = list(self.cluster.worker_nodes)
        struck = nodes if what == "driver" else [self.chance.choice(nodes)]
        with halted(struck) as pids:
            # A node has one CPU: where a stage runs, no outcome of another is on its way.
            hits = self.judge(pids)
            if len(hits) < len(struck):
                return False
            if what == "driver":
                # Outcomes that have arrived are taken, and nothing else can happen.
                time.sleep(SETTLED_SECONDS)
                hits = self.judge(pids)
                if len(hits) < len(struck) or pids != workers(nodes):
                    return False
                self.driver.process.kill()
                self.driver.wait()
            elif what == "node":
                kill_raylet(struck[0])
            for hit in hits:
                send(hit.pid, signal.SIGKILL)
        if what == "node":
            self.cluster.remove_node(struck[0], allow_graceful=False)
            self.cluster.add_node(num_cpus=1, num_gpus=0)
        elif what == "driver":
            self.driver = self.start()
        self.hits[what] += hits
        return True

    def judge(self, pids: list[int]) -> list[Hit]:
        """What halted processes are in the middle of; nothing where one has just come or goes.

        A stage is given up after three attempts, and so is not hit a third time.
        """
        logs = {path.stem: read_log(path) for path in (self.out / "logs").glob("*.log")}
        stages = {log.pid: key for key, log in logs.items() if not log.is_over}
        if any(pid not in stages and not is_idle(pid) for pid in pids):
            return []
        hits = [Hit(stages[pid], pid) for pid in pids if pid in stages]
        before = Counter(hit.key for found in self.hits.values() for hit in found)
        return [] if any(before[hit.key] >= 2 for hit in hits) else hits

    def strike_idle(self) -> bool:
        """Kill a worker that waits for work, while the run is paused."""
        control = Control(self.out)
        control.ask(Verb.PAUSE, "")

        def is_quiet() -> bool:
            said = read_progress(self.out) or {}
            is_paused = said.get("state") == "paused" and not said.get("running")
            pids = workers(self.cluster.worker_nodes)
            return is_paused and bool(pids) and all(map(is_idle, pids))

        wait_for(is_quiet)
        os.kill(self.chance.choice(workers(self.cluster.worker_nodes)), signal.SIGKILL)
        control.ask(Verb.RESUME, "")
        return True


def workers(nodes: Iterable[Any]) -> list[int]:
    raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
    found = [pid for raylet in raylets for pid in descendants(raylet)]
    return sorted(pid for pid in found if re.match(r"ray::(?!\w+Agent)", name_of(pid)))


def is_idle(pid: int) -> bool:
    return name_of(pid).startswith("ray::IDLE")


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # Ray has ended it meanwhile
        os.kill(pid, number)


@contextlib.contextmanager
def halted(nodes: Iterable[Any]) -> Iterator[list[int]]:
    """The workers of some nodes stand still within the block."""
    pids = workers(nodes)
    try:
        for pid in pids:
            send(pid, signal.SIGSTOP)
        yield pids
    finally:
        for pid in pids:
            send(pid, signal.SIGCONT)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without CPUs and nodes of one CPU, which this process does not join."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()
    head = {"num_cpus": 0, "num_gpus": 0, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(NUM_NODES):
            made.add_node(num_cpus=1, num_gpus=0)
        yield made
    finally:
        made.shutdown()  # type: ignore[no-untyped-call]


def test_a_grid_under_fire_is_complete_and_every_kill_is_counted(
    cluster: Any, tmp_path: Path
) -> None:
    grid = tiny_grid(tmp_path, **GRID)
    stages = set(make_plan(grid).stages)
    out, store = tmp_path / "out", tmp_path / "store"
    words = ("run", tmp_path / "tiny.yaml", "--out", out, "--store", store)
    with contextlib.ExitStack() as commands:

        def start() -> Command:
            log = tmp_path / f"driver-{time.time_ns()}.txt"
            return commands.enter_context(command(log, *words, RAY_ADDRESS=cluster.address))

        killer = Killer(cluster, out, start)
        killer.run(len(stages))
        assert killer.driver.wait(400) == 0, killer.driver.said
    assert not (out / UNWRITTEN).exists()
    assert {row["status"] for row in outcomes(out).values()} == {"ok"}
    assert len(outcomes(out)) == NUM_CELLS

    struck = {"worker": 1, "node": 1, "driver": NUM_NODES}
    assert {what: len(found) for what, found in killer.hits.items()} == {
        what: number * TURNS.count(what) for what, number in struck.items()
    }
    hits = [hit for found in killer.hits.values() for hit in found]
    attempts = records(out, "attempts")
    failed = [a for a in attempts if a["outcome"] != "ok"]
    assert Counter(Hit(a["key"], a["pid"]) for a in failed) == Counter(hits)
    assert {a["outcome"] for a in failed} == {"failed_infrastructure"}
    died = {Hit(a["key"], a["pid"]) for a in failed if a["error"] == DIED}
    assert died == set(killer.hits["driver"])
    assert all(re.match(r"\w+Error: ", a["error"]) for a in failed if a["error"] != DIED)
    # What ended well did so once. A stage that had published when its driver died is found.
    ended = Counter(a["key"] for a in attempts if a["outcome"] == "ok")
    assert set(ended.values()) == {1}
    assert stages - set(ended) <= {hit.key for hit in killer.hits["driver"]}
    assert Counter(row["key"] for row in records(out, "stages")) == ended

    run_serial(grid, tmp_path / "calm", tmp_path / "calm-store")
    assert numbers(out) == numbers(tmp_path / "calm")
