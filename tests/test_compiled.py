"""A compiled image tower: the same formulas for every objective, in training passes alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import victims.training
from benchmarks import gpu, gpu_fit
from benchmarks.gpu_steps import Shape, Stand
from tests.grids import RECIPE as GRID
from tests.grids import TINY, tiny_grid
from tests.test_distributed import CASES, compare, compare_curves, computed
from tests.test_training import RECIPE, Kept, assert_same, run_fit, state, view_of
from victims import compiled
from victims.compiled import compiled_tower
from victims.corpora import View
from victims.errors import GridError, UsageError
from victims.models import EMBEDDED, ModelSpec, fresh, frozen_copy
from victims.recipe import BatchNormMode, ClassifierRecipe, Precision, Recipe, Runtime
from victims.store import Store
from victims.training import Fit, FitReport, PlainClipSpec

OBJECTIVES = ("plain", "inmodal-both", "away")
EVERY = [
    pytest.param(n, marks=() if n in OBJECTIVES else pytest.mark.exhaustive)
    for n, case in CASES.items()
    if not case.labelled and not case.again
]
Graph = Callable[..., Any]


class Counting:
    """A backend that runs layers one by one and counts how often a graph was made and run."""

    def __init__(self) -> None:
        self.made, self.ran = 0, 0
        self.tower = partial(compiled_tower, backend=self)

    def __call__(self, graph: Graph, inputs: list[Tensor]) -> Graph:
        self.made += 1

        def run(*given: Any) -> Any:
            self.ran += 1
            return graph(*given)

        return run


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    """Fits of this test compile by a backend that counts."""
    backend = Counting()
    monkeypatch.setattr(victims.training, "compiled_tower", backend.tower)
    return backend


def fitted(view: View, recipe: Recipe, checkpoints: Kept | None = None) -> tuple[Fit, FitReport]:
    fit, report = run_fit(view, PlainClipSpec(), recipe, checkpoints=checkpoints)
    assert report is not None
    return fit, report


@pytest.mark.parametrize("name", EVERY)
def test_every_objective_has_the_gradients_of_layers_one_by_one(
    small_store: Store, monkeypatch: pytest.MonkeyPatch, counting: Counting, name: str
) -> None:
    plain, curves = computed(small_store, name)
    assert counting.ran == 0
    case = CASES[name]
    still = replace(case.still, compile=True)
    monkeypatch.setitem(CASES, name, case._replace(still=still))
    found, own = computed(small_store, name)
    compare(found, plain, 1e-9)
    compare_curves(own, curves)
    moves_pictures = any(".visual." in n and t.abs().max() > 0 for n, t in plain.items())
    assert (counting.ran > 0) is moves_pictures


@pytest.mark.parametrize("precision", Precision)
def test_a_resumed_fit_ends_on_the_same_bits(
    small_store: Store, tmp_path: Path, counting: Counting, precision: Precision
) -> None:
    recipe = replace(RECIPE, epochs=2, precision=precision, compile=True, micro_batch=16)
    whole, report = fitted(view_of(small_store, 64), recipe)
    assert counting.made == 1, "one shape, one graph"
    assert counting.ran > report.cost["steps"]
    kept = Kept(tmp_path / "fit")
    view = view_of(small_store, 64)
    run_fit(view, PlainClipSpec(), recipe, checkpoints=kept, stop_at=3)
    resumed, again = fitted(view, recipe, kept)
    assert_same(state(whole), state(resumed))
    assert report.curves == again.curves


def test_passes_that_train_nothing_run_as_ever(counting: Counting) -> None:
    model, image_BCHW = fresh(ModelSpec(), 3), torch.randint(0, 256, (4, 3, 32, 32)).byte()
    tower = type(model.net.visual)
    with counting.tower(model):
        copied = frozen_copy(model)
        with torch.no_grad():
            expected_BD = model.eval().embed_image(image_BCHW)
        model.embed_image(image_BCHW)
        model.train().encode_text(torch.ones((2, 4), dtype=torch.long))
        assert torch.equal(copied.embed_image(image_BCHW), expected_BD)
        assert counting.made == 0
        model.embed_image(image_BCHW).sum().backward()  # type: ignore[no-untyped-call]
        assert (counting.made, counting.ran) == (1, 1)
    assert type(model.net.visual) is tower
    model.embed_image(image_BCHW)
    assert counting.ran == 1
    nn.init.zeros_(model.net.visual.conv1.weight)
    assert torch.equal(copied.embed_image(image_BCHW), expected_BD), "a copy has its own weights"


def test_networks_of_one_class_share_no_weights(
    counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph is kept for the next fit, and reads what that one trains, whatever its depth."""
    vit = {"layers": 1, "width": 64, "text_layers": 1, "embed": 64}
    for depth in (1, 2):
        monkeypatch.setitem(EMBEDDED, "tiny", {**vit, "layers": depth})
        for seed in (1, 2):
            model, rows_BCHW = fresh(ModelSpec(), seed), torch.zeros((2, 3, 32, 32)).byte()
            expected_BD = model.embed_image(rows_BCHW)
            with counting.tower(model.train()):
                assert torch.equal(model.embed_image(rows_BCHW), expected_BD)
    assert (counting.made, counting.ran) == (2, 4)


def test_what_cannot_be_compiled_says_so(
    small_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: Graph, inputs: list[Tensor]) -> Graph:
        raise RuntimeError("no compiler found")

    tower = partial(compiled_tower, backend=broken)
    monkeypatch.setattr(victims.training, "compiled_tower", tower)
    with pytest.raises(GridError, match=r"could not compile .* tiny: .*Leave `compile` out"):
        run_fit(view_of(small_store, 32), PlainClipSpec(), replace(RECIPE, compile=True))


def test_where_it_cannot_be_had_it_is_refused(
    small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="compile is for the image tower of a CLIP"):
        ClassifierRecipe(epochs=1, batch_size=2, lr=0.1, compile=True)
    model = fresh(ModelSpec(), 3)
    again = Runtime(checkpoint_activations=True)
    recipe = replace(RECIPE, compile=True)
    view, objective = view_of(small_store, 32), PlainClipSpec().build(model)
    with pytest.raises(GridError, match="compile: blocks of a compiled tower are not computed"):
        Fit(model, view, objective, recipe, runtime=again)
    recipes = {**TINY["recipes"], "repair": {**GRID, "compile": True}}
    with pytest.raises(UsageError, match=r"repair.*: compile: blocks of a compiled tower"):
        tiny_grid(tmp_path, recipes=recipes, execution={"checkpoint_activations": True})
    monkeypatch.setattr(compiled, "world_size", lambda: 2)
    with (
        pytest.raises(GridError, match="compile: the batch norms of tiny speak with other workers"),
        compiled_tower(model),
    ):
        pass


def test_a_grid_file_says_it_and_keys_hold_it(tmp_path: Path) -> None:
    plain = tiny_grid(tmp_path)
    said = {**GRID, "compile": True}
    compiles = tiny_grid(tmp_path, recipes={**TINY["recipes"], "victim": said})
    assert compiles.victim.compile
    assert compiles.identity_hash != plain.identity_hash
    spelled = {**TINY["recipes"], "victim": {**GRID, "compile": False}}
    assert tiny_grid(tmp_path, recipes=spelled).identity_hash == plain.identity_hash


def test_the_benchmark_counts_the_work_of_compiled_steps_like_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counting: Counting
) -> None:
    monkeypatch.setattr(gpu_fit, "STEPS", 2)
    shape = Shape(arch="tiny", size=32, batch=16, precision=Precision.FP32)
    stand = Stand(tmp_path, shape, 64, "cpu")
    (plain,) = gpu.cells_of(stand, "plain", shape)
    assert (plain["compile"], counting.ran) == (False, 0)
    (cell,) = gpu.cells_of(stand, "plain", replace(shape, compile=True))
    assert (cell["compile"], cell["outcome"]) == (True, "ok")
    assert cell["flops_per_sample"] == plain["flops_per_sample"]
    assert counting.ran == gpu_fit.WARM_UP + 2 * gpu_fit.STEPS - 1, "all but the counted one"
    labelled = replace(shape, arch="preact_tiny", compile=True)
    assert not labelled.recipe.compile, "a classifier has no image tower"


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU by g++")
@pytest.mark.parametrize("bn_mode", BatchNormMode)
def test_real_kernels_are_near_and_the_same_again(
    small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bn_mode: BatchNormMode
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # what is set meanwhile is undone, too
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    recipe = replace(RECIPE, epochs=2, bn_mode=bn_mode)
    view, kept = view_of(small_store, 64), Kept(tmp_path / "fit")
    _, plain = fitted(view, recipe)
    recipe = replace(recipe, compile=True)
    whole, report = fitted(view, recipe)
    for one, other in zip(report.curves, plain.curves, strict=True):
        assert one["clip"] == pytest.approx(other["clip"], rel=1e-3)
    run_fit(view, PlainClipSpec(), recipe, checkpoints=kept, stop_at=3)
    folder = tmp_path / ".backdoor-grid" / "compiled"
    assert list(folder.rglob("*.so"))
    assert folder.stat().st_mode & 0o77 == 0
    torch.compiler.reset()
    resumed, again = fitted(view, recipe, kept)
    assert_same(state(whole), state(resumed))
    assert report.curves == again.curves
