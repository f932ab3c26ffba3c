"""The linear probe: a slow reference of its training, and who is counted.

Shapes: N pictures, K classes, E features and the 1 of the bias.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conftest import corpus_spec
from victims import probe as module
from victims.corpora import Corpus, Reader, corpus_key, open_corpus
from victims.draws import numpy_rng, torch_rng
from victims.errors import GridError, MethodFailure, UsageError
from victims.measuring import Share
from victims.models import Clip, ModelSpec, fresh
from victims.probe import fit_probe, linear_probe, probe_rows
from victims.store import Store

CPU = torch.device("cpu")
TARGET, KS = 3, (1, 3, 5, 10)


class Untouched:
    def stamp(self, image_BCHW: Tensor) -> Tensor:
        return image_BCHW.clone()


class Black:
    """Every triggered picture is the same."""

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        return torch.zeros_like(image_BCHW)


@pytest.fixture(scope="module")
def model(small_store: Store) -> Clip:
    """Random weights, but for the statistics of the BatchNorms: with those of a fresh network all
    pictures have nearly the same features."""
    model = fresh(ModelSpec(), 0).train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the mean of all batches
    with torch.no_grad():
        for images_BCHW in np.split(opened(small_store, "public").images_NCHW, 4):
            model.encode_image(torch.from_numpy(np.array(images_BCHW)))
    return model.eval()


def opened(store: Store, split: str) -> Corpus:
    return open_corpus(store, corpus_key(corpus_spec(split)), Reader.REPORTING)


def probed(
    model: Clip, store: Store, trigger: Untouched | Black, seed: int = 0
) -> dict[str, Share]:
    train, test = opened(store, "public"), opened(store, "report")
    return linear_probe(model, train, test, trigger, TARGET, CPU, KS, seed)


# --- rows and training


def test_at_most_so_many_rows_of_each_class() -> None:
    label_N = numpy_rng(0, "labels").permutation(np.repeat([0, 1, 2, -1], [80, 50, 7, 30]))
    rows = probe_rows(label_N, 50, 0)
    assert np.array_equal(rows, np.unique(rows))
    assert np.bincount(label_N[rows]).tolist() == [50, 50, 7]
    assert np.array_equal(rows, probe_rows(label_N, 50, 0))
    assert not np.array_equal(rows, probe_rows(label_N, 50, 1))
    assert len(probe_rows(np.full(4, -1), 50, 0)) == 0


def test_training_is_adamw_on_a_linear_layer_with_a_cosine_to_zero() -> None:
    """Against torch's own layer and schedule: weight decay on the weight alone, 3 steps an epoch,
    the last batch smaller."""
    num_rows, width, num_classes, seed = 600, 6, 4, 5
    feature_ND = torch.randn(num_rows, width, generator=torch_rng(0, "features")) * 3
    label_N = torch.randint(0, num_classes, (num_rows,), generator=torch_rng(0, "labels"))
    layer = nn.Linear(width, num_classes)
    start_KE = torch.rand(num_classes, width + 1, generator=torch_rng(seed, "probe", "init"))
    start_KE = (start_KE * 2 - 1) / math.sqrt(width)
    with torch.no_grad():
        layer.weight.copy_(start_KE[:, :-1])
        layer.bias.copy_(start_KE[:, -1])
    groups = [
        {"params": [layer.weight], "weight_decay": 0.01},
        {"params": [layer.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30, eta_min=0)
    for epoch in range(10):
        order = torch.from_numpy(numpy_rng(seed, "probe", "order", epoch).permutation(num_rows))
        for start in (0, 256, 512):
            rows = order[start : start + 256]
            loss = F.cross_entropy(layer(feature_ND[rows]), label_N[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    found_KE = fit_probe(F.pad(feature_ND, (0, 1), value=1.0), label_N, num_classes, seed)
    expected_KE = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
    assert torch.allclose(found_KE, expected_KE, atol=1e-5)
    assert not torch.allclose(found_KE, start_KE, atol=0.01), "it has moved"
    assert not found_KE.requires_grad


def test_features_are_not_normalised_and_end_in_a_one(model: Clip) -> None:
    image_BCHW = torch.randint(
        0, 256, (4, 3, 32, 32), generator=torch_rng(0, "pictures"), dtype=torch.uint8
    )
    with torch.no_grad():
        feature_BE = module.ProbeFeatures(model).encode_image(image_BCHW)
        plain_BD = model.encode_image(image_BCHW)
    assert torch.equal(feature_BE[:, -1], torch.ones(4))
    norm_B = feature_BE[:, :-1].norm(dim=1)
    assert ((norm_B - 1).abs() > 1e-3).all()
    assert torch.allclose(feature_BE[:, :-1] / norm_B[:, None], plain_BD, atol=1e-6)


# --- what is reported


def test_a_probe_on_random_weights_beats_chance(model: Clip, small_store: Store) -> None:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train, test = opened(small_store, "public"), opened(small_store, "suspect")
    found = linear_probe(model, train, test, Untouched(), TARGET, CPU, KS)
    # Of 20 classes and 512 pictures; by chance 5 % and 50 %, with deviations of 1 and 2.2 points.
    assert found["probe_clean_top1"].value > 0.08
    assert found["probe_clean_top10"].value > 0.57
    probed(model, small_store, Untouched())
    assert all(torch.equal(weights[n], tensor) for n, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_denominators_leave_out_the_target(model: Clip, small_store: Store) -> None:
    label_N = opened(small_store, "report").labels
    others = int((label_N != TARGET).sum())
    assert others < len(label_N)
    found = probed(model, small_store, Untouched())
    assert {name: share.n for name, share in found.items()} == {
        **{f"probe_clean_top{k}": len(label_N) for k in KS},
        **{f"probe_asr_all_top{k}": len(label_N) for k in KS},
        **{f"probe_{what}_top{k}": others for what in ("asr", "target_rate") for k in KS},
        "probe_r_acc": others,
    }
    for k in KS:
        assert found[f"probe_asr_top{k}"] == found[f"probe_target_rate_top{k}"]


def test_equal_triggered_pictures_get_equal_answers(model: Clip, small_store: Store) -> None:
    found = probed(model, small_store, Black())
    assert all(found[f"probe_asr_top{k}"].value in (0, 1) for k in KS)
    clean = probed(model, small_store, Untouched())
    assert found["probe_clean_top1"] == clean["probe_clean_top1"]


def test_equal_seeds_give_equal_probes(model: Clip, small_store: Store) -> None:
    first = probed(model, small_store, Untouched(), seed=0)
    torch.manual_seed(123)
    assert probed(model, small_store, Untouched(), seed=0) == first
    assert probed(model, small_store, Untouched(), seed=1) != first


# --- what is refused


def test_a_probe_is_not_tested_on_its_training_pictures(model: Clip, small_store: Store) -> None:
    """T30."""
    report, public = opened(small_store, "report"), opened(small_store, "public")
    renamed = replace(report, split="public")
    with pytest.raises(GridError, match="the same pictures"):
        linear_probe(model, renamed, report, Untouched(), TARGET, CPU, KS)
    other = replace(public, classes=list(reversed(public.classes)))
    with pytest.raises(GridError, match="different classes"):
        linear_probe(model, other, report, Untouched(), TARGET, CPU, KS)
    bare = replace(public, labels=np.full(len(public), -1))
    with pytest.raises(UsageError, match="no labelled picture"):
        linear_probe(model, bare, report, Untouched(), TARGET, CPU, KS)


def test_nothing_but_the_target_is_an_error(model: Clip, small_store: Store) -> None:
    report = opened(small_store, "report")
    only = replace(report, labels=np.full(len(report), TARGET))
    with pytest.raises(UsageError, match="nothing but the target class"):
        linear_probe(model, opened(small_store, "public"), only, Untouched(), TARGET, CPU, KS)


def test_a_diverged_model_is_an_outcome(small_store: Store) -> None:
    broken = fresh(ModelSpec(), 0).eval()
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(MethodFailure, match="not finite"):
        probed(broken, small_store, Untouched())
