"""What all tests share: one thread, and one small store with the embedded world in it."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray reads these once, when it is imported: no test may import it before they are set.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
# Ray's workers step back for others, so that beside a busy test they would hardly run.
os.environ.setdefault("RAY_worker_niceness", "0")

import pytest
import torch

from tests.finished import Finished, finish
from victims.corpora import CorpusSpec, build_corpus
from victims.embedded import WorldCorpus
from victims.store import Store
from victims.world import World

torch.set_num_threads(1)

pytest_plugins = ["tests.browsers", "tests.clusters"]

# Files that take long go first: a worker that meets one last keeps the other waiting. The two that
# wait for Ray stand apart, so that each has one beside it that computes.
LONG = (
    "test_soak.py",
    "test_ray.py",
    "test_campaign.py",
    "test_works.py",
    "test_defense_contracts.py",
    "test_training.py",
    "test_faults.py",
    "test_contracts.py",
    "test_run.py",
    "test_distributed.py",
    "test_benchmarks.py",
    "test_badclip.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return LONG.index(item.path.name) if item.path.name in LONG else len(LONG)

    items.sort(key=place)


ROWS = {"public": 512, "suspect": 512, "clean": 256, "tuning": 128, "report": 128, "shifted": 128}


def corpus_spec(split: str, num_rows: int | None = None, size: int = 32) -> WorldCorpus:
    """A split of the world at test size."""
    return WorldCorpus(world=World(size=size), split=split, num_rows=num_rows or ROWS[split])


@pytest.fixture(scope="session")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store that holds every split at test size. Tests may add to it and remove nothing."""
    store = Store(tmp_path_factory.mktemp("store"))
    for split in ROWS:
        spec: CorpusSpec = corpus_spec(split)
        build_corpus(store, spec)
    return store


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A finished run of the tiny grid. Tests copy it and change the copy alone."""
    return finish(tmp_path_factory.mktemp("finished"))
