"""Activations that are computed again: the same gradients, and nothing counted twice."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.grids import RECIPE as GRID
from tests.grids import TINY, tiny_grid
from tests.test_architecture import FILES
from tests.test_distributed import CASES, STILL, compare, compare_curves, computed
from tests.test_training import RECIPE, Kept, assert_same, run_fit, state, view_of
from victims import recompute
from victims.activations import activation_bytes, kept_bytes
from victims.errors import GridError, UsageError
from victims.models import EMBEDDED, ModelSpec, fresh, frozen_copy
from victims.recipe import BatchNormMode, Precision, Recipe, Runtime
from victims.store import Store
from victims.training import Fit, FitReport, PlainClipSpec, _Step

VIT = {"layers": 2, "width": 64, "text_layers": 1, "embed": 64}
OBJECTIVES = ("plain", "inmodal-both", "pooled-image", "relearn-both", "away", "subtexts-subset")
PARTED = [pytest.param(n, marks=() if n in OBJECTIVES else pytest.mark.exhaustive) for n in CASES]


@pytest.fixture
def vit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model as a transformer over four patches, which has no batch norm."""
    monkeypatch.setitem(EMBEDDED, "tiny", VIT)


def fitted(store: Store, recipe: Recipe, **runtime: Any) -> tuple[Fit, FitReport]:
    torch.manual_seed(99)
    model = fresh(ModelSpec(), 3)
    objective = PlainClipSpec().build(model)
    fit = Fit(model, view_of(store, 64), objective, recipe, runtime=Runtime(**runtime))
    return fit, fit()


@pytest.mark.parametrize("name", PARTED)
def test_parts_have_the_gradients_of_the_whole_batch(
    small_store: Store, vit: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Of every objective, which knows nothing of it; 12 rows cut 32 into uneven parts."""
    # An image classifier has batch norms: they keep to their statistics here.
    case = CASES[name]
    still = replace(case.still, bn_mode=BatchNormMode.EVAL, micro_batch=None)
    passed: list[int] = []
    plain = recompute.recomputed

    def counted(module: nn.Module, function: Any, rows_B: Tensor) -> Tensor:
        passed.append(len(rows_B))
        return plain(module, function, rows_B)

    monkeypatch.setitem(CASES, name, case._replace(still=still))
    whole, curves = computed(small_store, name)
    monkeypatch.setattr(recompute, "recomputed", counted)
    cut = replace(still, micro_batch=3 * still.batch_size // 8)
    monkeypatch.setitem(CASES, name, case._replace(still=cut))
    parts, cut_curves = computed(small_store, name)
    assert passed
    if name in OBJECTIVES:
        assert max(passed) in (11, 22), "three parts, of two views in one pass too"
    compare(parts, whole, 1e-5)
    compare_curves(cut_curves, curves)


def test_batch_norms_see_each_part_once(small_store: Store) -> None:
    recipe = replace(RECIPE, epochs=1, batch_size=32, micro_batch=8)
    fit, _ = fitted(small_store, recipe)
    counted = {int(t) for n, t in fit.model.state_dict().items() if "num_batches" in n}
    assert counted == {2 * 4}, "two steps of four parts, whatever was computed again"
    whole, _ = fitted(small_store, replace(recipe, micro_batch=None))
    own, other = (f.model.state_dict()["net.visual.bn1.running_var"] for f in (fit, whole))
    assert not torch.equal(own, other), "they normalise the parts: it is in the key"


def test_fixed_batch_norms_make_parts_no_difference(small_store: Store) -> None:
    still = replace(STILL, bn_mode=BatchNormMode.EVAL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CASES, "plain", CASES["plain"]._replace(still=still))
        whole, _ = computed(small_store, "plain")
        cut = replace(still, micro_batch=4)
        patch.setitem(CASES, "plain", CASES["plain"]._replace(still=cut))
        compare(computed(small_store, "plain")[0], whole, 1e-5)


def check_blocks(store: Store, recipe: Recipe) -> None:
    plain, report = fitted(store, recipe)
    again, saved = fitted(store, recipe, checkpoint_activations=True)
    assert_same(state(plain), state(again))
    assert report.curves == saved.curves
    assert report.cost["images_forward"] == saved.cost["images_forward"]
    assert all("Recomputing" not in type(m).__name__ for m in again.model.modules())


@pytest.mark.parametrize("precision", Precision)
def test_blocks_computed_again_change_no_bit(small_store: Store, precision: Precision) -> None:
    """Statistics of batch norms and counts of passes included."""
    check_blocks(small_store, replace(RECIPE, epochs=1, precision=precision))


def test_blocks_of_transformers_change_no_bit(small_store: Store, vit: None) -> None:
    check_blocks(small_store, replace(RECIPE, epochs=1, micro_batch=16))


def test_less_is_kept_and_copies_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image_BCHW = fresh(ModelSpec(), 3), torch.randint(0, 256, (64, 3, 32, 32)).byte()
    expected_BD = frozen_copy(model).embed_image(image_BCHW)
    inputs, plain = list[Tensor](), checkpoint

    def counted(function: Any, *given: Tensor, **more: Any) -> Any:
        inputs.extend(given)  # what blocks keep, past autograd
        return plain(function, *given, **more)

    with recompute.frozen_statistics(model):
        whole = kept_bytes(model, lambda: model.embed_image(image_BCHW))
        monkeypatch.setattr(recompute, "checkpoint", counted)
        with recompute.recomputing_blocks(model, "tiny"):
            blocks = kept_bytes(model, lambda: model.embed_image(image_BCHW))
    with recompute.recomputing_blocks(model, "tiny"):
        copied = frozen_copy(model)
    blocks += sum(given.nbytes for given in inputs)
    assert len(inputs) == 5, "the stem and four blocks"
    assert blocks < 0.5 * whole
    nn.init.zeros_(model.net.visual.layer1[0].conv1.weight)
    assert torch.equal(copied.embed_image(image_BCHW), expected_BD), "a copy has its own weights"


def test_bytes_per_row_are_those_that_batches_differ_by() -> None:
    model = fresh(ModelSpec(), 3).eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    per_row = activation_bytes(model, Precision.FP32, 8)
    assert per_row == activation_bytes(model, Precision.FP32, 8, num_rows=16)
    assert activation_bytes(model, Precision.BF16, 8) < per_row
    assert activation_bytes(model, Precision.FP32, 16) > per_row
    assert_same(before, model.state_dict())
    assert not model.training
    assert model.meter.images_forward == 0
    # The stem's first output alone: four channels of 16 x 16 floats, kept twice around its norm.
    assert per_row > 2 * 4 * 16 * 16 * 4


def test_draws_are_the_same_again() -> None:
    layer, x_BD = nn.Dropout(0.5), torch.ones(4, 8, requires_grad=True)
    out_BD = recompute.recomputed(layer, lambda x: layer(x).square(), x_BD)
    torch.rand(3)  # somebody else draws in between
    out_BD.sum().backward()  # type: ignore[no-untyped-call]
    assert x_BD.grad is not None
    assert torch.equal(x_BD.grad, 2 * out_BD.detach())  # d (2x)^2 = 8x = 2 (2x)^2 where it stays


def test_passes_of_few_rows_are_cut_no_finer_than_those_of_a_batch() -> None:
    passes = recompute.Passes(parts=4, rows=8)
    assert [passes.of(n) for n in (64, 32, 17, 8, 1, 0)] == [4, 4, 3, 1, 1, 1]
    assert recompute.Passes().of(10_000) == 1


def test_a_network_without_known_blocks_is_told_so() -> None:
    with (
        pytest.raises(GridError, match="checkpoint_activations: other has none of the blocks"),
        recompute.recomputing_blocks(nn.Linear(2, 2), "other"),
    ):
        pass


def test_a_grid_file_says_how_memory_is_saved(tmp_path: Path) -> None:
    """The parts of a recipe are in keys, what is computed again in none."""
    plain = tiny_grid(tmp_path)
    again = tiny_grid(tmp_path, execution={"checkpoint_activations": True})
    assert again.execution.checkpoint_activations
    assert again.identity_hash == plain.identity_hash
    cut = tiny_grid(tmp_path, recipes={**TINY["recipes"], "victim": {**GRID, "micro_batch": 16}})
    assert (cut.victim.micro_batch, cut.victim.parts) == (16, 2)
    assert cut.identity_hash != plain.identity_hash
    spelled = {**GRID, "micro_batch": None}
    same = tiny_grid(tmp_path, recipes={**TINY["recipes"], "victim": spelled})
    assert (same.victim, same.identity_hash) == (plain.victim, plain.identity_hash)
    for value, words in ((0, "micro_batch must be at least 1, got 0"), ("8", "a whole number")):
        with pytest.raises(UsageError, match=words):
            tiny_grid(
                tmp_path, recipes={**TINY["recipes"], "victim": {**GRID, "micro_batch": value}}
            )
    with pytest.raises(UsageError, match="expected true or false"):
        tiny_grid(tmp_path, execution={"checkpoint_activations": 1})


def test_a_grid_file_is_told_of_a_network_whose_pictures_are_not_computed_again(
    tmp_path: Path,
) -> None:
    again = {"checkpoint_activations": True}
    data = {"world": {**TINY["data"]["world"], "size": 224}}
    named = "checkpoint_activations saves no memory with convnext_base: its image tower is timm's"
    with pytest.raises(UsageError, match=named):
        tiny_grid(tmp_path, model="convnext_base", data=data, execution=again)
    assert tiny_grid(tmp_path, model="convnext_base", data=data).model.arch == "convnext_base"
    assert tiny_grid(tmp_path, model="RN50", data=data, execution=again)


def test_no_kernel_is_chosen_by_what_came_before() -> None:
    """Graphs for a range of shapes depend on earlier shapes and cuDNN's trials on the clock: a fit
    that was resumed could end elsewhere. A mention in a docstring is none in the code."""
    chosen = {"torch.compile", "torch.backends.cudnn.benchmark"}
    found = [
        (name, ast.unparse(node))
        for name, tree in FILES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in chosen
    ]
    # Graphs of one shape, which a recipe asks for: tests/test_compiled.py.
    assert found == [("victims/compiled.py", "torch.compile")]
    assert len(FILES) > 100


def test_memory_is_channels_last_all_through_a_fit(small_store: Store, tmp_path: Path) -> None:
    """Weights, what convolutions put out, moments; after a checkpoint was read back, too."""
    seen: list[bool] = []

    def look(module: nn.Module, inputs: Any, out_BCHW: Tensor) -> None:
        seen.append(out_BCHW.is_contiguous(memory_format=torch.channels_last))

    recipe, kept = replace(RECIPE, epochs=1, micro_batch=16), Kept(tmp_path / "fit")
    view = view_of(small_store, 128)
    run_fit(view, PlainClipSpec(), recipe, checkpoints=kept, stop_at=2)
    fit, _ = run_fit(view, PlainClipSpec(), recipe, checkpoints=kept)
    fit.step, fit.order = 0, np.arange(32)
    convolutions = [m for m in fit.model.modules() if isinstance(m, nn.Conv2d)]
    for module in convolutions:
        module.register_forward_hook(look)
    fit.model.train()
    fit._train_step(_Step(fit.model, fit.objective), 0)
    assert len(seen) >= len(convolutions)
    assert all(seen)
    for module in convolutions:
        moment = fit.optimizer.state[module.weight]["exp_avg"]
        assert module.weight.is_contiguous(memory_format=torch.channels_last)
        assert moment.stride() == module.weight.stride()
