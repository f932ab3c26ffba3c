"""On a machine that has GPUs: the tiny grid on them, shared and in groups, against the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_steps import Shape, Stand
from grid.gridfile import load_grid
from grid.run import run_grid
from tests.grids import numbers, outcomes, records, run_serial, tiny_grid, write_grid_file
from tests.test_batches import assert_same_batches, poisoned
from tests.test_training import RECIPE, view_of
from victims.batches import Batch, Loader
from victims.models import ModelSpec, fresh
from victims.recipe import Precision, Recipe, Runtime
from victims.store import Store
from victims.training import Fit, PlainClipSpec

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not GPUS, reason="no GPU here"),
]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cpu")
    run_serial(tiny_grid(folder), folder / "out", folder / "store")
    return folder / "out"


def shares(out: Path) -> dict[tuple[str, str, str], float]:
    return {place: row["value"] for place, row in numbers(out).items() if row["value"] is not None}


@pytest.mark.parametrize(
    "on",
    [
        "shared-gpu",
        "gpu",
        pytest.param(
            "four-gpus", marks=pytest.mark.skipif(GPUS < 4, reason="fewer than four GPUs")
        ),
    ],
)
def test_a_grid_on_gpus_says_what_it_says_on_the_cpu(
    on: str, on_cpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fit of two steps differs by rounding: a picture or two of 32 may fall otherwise."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    grid = load_grid(str(write_grid_file(tmp_path)), on=on)
    said: list[str] = []
    run_grid(grid, tmp_path / "out", str(tmp_path / "store"), say=said.append)
    assert {row["status"] for row in outcomes(tmp_path / "out").values()} == {"ok"}, said
    ran: dict[str, set[Any]] = {}
    for record in records(tmp_path / "out", "stages"):
        ran.setdefault(record["kind"], set()).add(record["device"])
    assert ran["corpus"] == {"cpu"}
    assert all("cpu" not in ran[kind] for kind in ("model", "defended", "measure"))
    mine, theirs = shares(tmp_path / "out"), shares(on_cpu)
    assert mine.keys() == theirs.keys()
    for place, share in theirs.items():
        if place[-1] in ("clean_top1", "asr_top1"):
            assert mine[place] == pytest.approx(share, abs=0.1), place


def on_the_cpu(batch: Batch) -> Batch:
    moved = {name: getattr(batch, name).cpu() for name in ("rows", "image", "tokens")}
    texts = {name: text.cpu() for name, text in batch.texts.items()}
    return Batch(**moved, texts=texts, columns={n: c.cpu() for n, c in batch.columns.items()})


def test_batches_through_pinned_memory_are_those_of_the_cpu(small_store: Store) -> None:
    """Many in a row, none waited for: memory that was given back too early would show."""
    view, model = poisoned(small_store), fresh(ModelSpec(), 3)
    plain, ahead = (Loader(view, model, torch.device(name)) for name in ("cpu", "cuda"))
    orders = [np.random.default_rng(n).permutation(32) for n in range(50)]
    for loader in (plain, ahead):
        loader.begin_epoch(0)
    found = []
    for order, following in zip(orders, [*orders[1:], orders[0]], strict=True):
        found.append(ahead(order))
        ahead.expect(following)
    for order, batch in zip(orders, found, strict=True):
        assert batch.image.device.type == "cuda"
        assert_same_batches(on_the_cpu(batch), plain(order))
    ahead.close()


@pytest.mark.parametrize("precision", Precision)
def test_memory_is_saved_and_the_loss_is_the_same(small_store: Store, precision: Precision) -> None:
    def fitted(recipe: Recipe, again: bool) -> tuple[float, int]:
        torch.cuda.reset_peak_memory_stats()
        model = fresh(ModelSpec(size=32), 3)
        runtime = Runtime(device="cuda", checkpoint_activations=again)
        objective = PlainClipSpec().build(model)
        report = Fit(model, view_of(small_store, 256), objective, recipe, runtime=runtime)()
        return report.curves[-1]["clip"], torch.cuda.max_memory_allocated()

    recipe = Recipe(epochs=1, batch_size=256, lr=RECIPE.rate, precision=precision)
    loss, memory = fitted(recipe, again=False)
    again, less = fitted(recipe, again=True)
    assert again == pytest.approx(loss, rel=1e-3)
    assert less < memory


def test_the_benchmark_measures_peak_and_memory(tmp_path: Path) -> None:
    shape = Shape(arch="tiny", size=32, batch=64)
    stand = Stand(tmp_path, shape, 128, "cuda")
    (cell,) = gpu.cells_of(stand, "plain", shape)
    assert cell["outcome"] == "ok"
    assert cell["peak_memory_bytes"] > 64 * stand.bytes_per_row(Precision.BF16)
