"""A compiled image tower: the same formulas for every objective, in training passes alone."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

import victims.training
from benchmarks import gpu, gpu_fit
from benchmarks.gpu_steps import Shape, Stand
from tests.grids import RECIPE as GRID
from tests.grids import TINY, tiny_grid
from tests.test_distributed import CASES, compare, compare_curves, computed
from tests.test_training import RECIPE, Kept, assert_same, run_fit, state, view_of
from victims import compiled
from victims.compiled import KERNELS, compiled_tower
from victims.corpora import View
from victims.errors import GridError, UsageError
from victims.models import EMBEDDED, ModelSpec, fresh, frozen_copy
from victims.recipe import BatchNormMode, ClassifierRecipe, Precision, Recipe, Runtime
from victims.store import Store
from victims.training import Fit, FitReport, PlainClipSpec

OBJECTIVES = ("inmodal-both",)
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


@pytest.mark.parametrize(
    "precision", [Precision.BF16, pytest.param(Precision.FP32, marks=pytest.mark.exhaustive)]
)
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
        with torch.no_grad():
            model.train().encode_image(image_BCHW)
            copied = frozen_copy(model)
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


@pytest.mark.exhaustive
def test_every_shape_has_a_graph_of_its_own_or_the_fit_ends(
    counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(rows: int) -> None:
        model.embed_image(torch.zeros((rows, 3, 32, 32)).byte())

    model = fresh(ModelSpec(), 3).train()
    with counting.tower(model):
        for rows in (2, 3, 4, 2):
            step(rows)
    assert counting.made == 3, "no graph for a range of shapes, which earlier ones would decide"
    monkeypatch.setattr(compiled, "GRAPHS", 3)
    with pytest.raises(GridError, match="could not compile"), counting.tower(model):
        step(5)


def test_kernels_are_not_chosen_by_trying_them_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(torch, "compile", lambda function, **more: asked.update(more) or function)
    compiled._compiled.__wrapped__(nn.Linear, "inductor")
    assert (asked["options"], asked["dynamic"]) == ({"deterministic": True}, False)
    monkeypatch.setattr(compiled, "DETERMINISTIC", {"no_such_option": True})
    refused = pytest.raises(GridError, match=r"chooses kernels by trying .*Install a newer torch")
    with refused, compiled_tower(fresh(ModelSpec(), 3)):
        pass


def test_kernels_are_kept_where_nobody_else_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch names its own folder when it is imported: that is no choice of the user's."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".backdoor-grid" / "compiled"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    monkeypatch.setenv(KERNELS, default_cache_dir())
    with compiled_tower(fresh(ModelSpec(), 3)):
        assert Path(os.environ[KERNELS]) == folder
        assert folder.stat().st_mode & 0o77 == 0
    assert os.environ[KERNELS] == default_cache_dir()
    monkeypatch.setenv(KERNELS, str(tmp_path / "own"))
    with compiled_tower(fresh(ModelSpec(), 3)):
        assert os.environ[KERNELS] == str(tmp_path / "own")


@pytest.mark.exhaustive
def test_compiling_is_no_part_of_what_a_fit_costs(
    small_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(Counting):
        def __call__(self, graph: Graph, inputs: list[Tensor]) -> Graph:
            until = time.process_time() + 1
            while time.process_time() < until:
                pass
            return super().__call__(graph, inputs)

    monkeypatch.setattr(victims.training, "compiled_tower", Slow().tower)
    begun = time.perf_counter()
    recipe = replace(RECIPE, epochs=1, compile=True)
    _, report = fitted(view_of(small_store, 32), recipe)
    assert time.perf_counter() - begun > 1
    assert report.cost["train_seconds"] < 1
    assert report.cost["wall_seconds"] < time.perf_counter() - begun - 1


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


@pytest.mark.exhaustive
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
    monkeypatch.setenv(KERNELS, default_cache_dir())
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
    torch.compiler.reset()
    resumed, again = fitted(view, recipe, kept)
    assert_same(state(whole), state(resumed))
    assert report.curves == again.curves
