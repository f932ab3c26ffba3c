"""Zero-shot classifiers that are kept: the same numbers, encoded once, for whom they hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from victims import heads
from victims.heads import head_key, kept_head
from victims.models import Clip, ModelSpec, fresh
from victims.store import Store
from victims.world import CLASSES, TEMPLATES

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def all_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "WORTH_KEEPING", 1)


@pytest.fixture
def model() -> Clip:
    return fresh(ModelSpec(), 0).eval()


def kept(store: Store, model: Clip, mark: Callable[[str], str] = str) -> Tensor:
    return kept_head(store, model, CLASSES, TEMPLATES, CPU, mark)


def slow(model: Clip, mark: Callable[[str], str] = str) -> Tensor:
    """Prompt by prompt, from the definition."""
    rows = []
    for name in CLASSES:
        total = torch.zeros(64)
        for template in TEMPLATES:
            tokens = torch.from_numpy(model.tokenizer([mark(template.format(name))])).long()
            with torch.no_grad():
                feature = model.net.encode_text(tokens)[0]
            total += feature / feature.norm()
        rows.append(total / total.norm())
    return torch.stack(rows)


def marked(caption: str) -> str:
    return f"striped {caption}"


def test_a_head_is_encoded_once_and_is_what_it_would_be(tmp_path: Path, model: Clip) -> None:
    store = Store(tmp_path)
    first = kept(store, model)
    prompts = len(CLASSES) * len(TEMPLATES)
    assert model.meter.texts_forward == prompts
    assert torch.equal(kept(store, model), first)
    assert model.meter.texts_forward == prompts, "the second time it is found"
    assert torch.allclose(first, slow(model), atol=1e-5)
    assert torch.allclose(kept(store, model, marked), slow(model, marked), atol=1e-5)
    assert len(store.keys("head")) == 2


def test_models_with_one_text_tower_share_it(tmp_path: Path, model: Clip) -> None:
    """A repair of the image tower alone, and the temperature that scores do not depend on."""
    store = Store(tmp_path)
    kept(store, model)
    other = fresh(ModelSpec(), 0).eval()
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if name not in other.text_tower() or name == "net.logit_scale":
                weight.add_(0.5)
    kept(store, other)
    assert other.meter.texts_forward == 0


def test_another_activation_is_another_head(tmp_path: Path, model: Clip) -> None:
    """The weights of GELU and QuickGELU are alike, and one took the other's classifier."""
    store = Store(tmp_path)
    first = kept(store, model)
    other = fresh(ModelSpec(quick_gelu=True), 0).eval()
    assert heads.text_digest(other) == heads.text_digest(model)
    assert torch.allclose(kept(store, other), slow(other), atol=1e-5)
    assert not torch.allclose(kept(store, other), first, atol=1e-3)


def test_every_text_weight_counts_and_every_prompt(model: Clip) -> None:
    first = head_key(model, CLASSES, TEMPLATES)
    assert head_key(fresh(ModelSpec(), 0), CLASSES, TEMPLATES) == first
    weights = dict(model.named_parameters())
    for name in sorted(model.text_tower() - {"net.logit_scale"}):
        with torch.no_grad():
            flat = weights[name].view(-1)
            before = flat[-1].clone()
            flat[-1] += 1
            assert head_key(model, CLASSES, TEMPLATES) != first, name
            flat[-1] = before
    assert head_key(model, CLASSES, TEMPLATES) == first
    assert head_key(model, CLASSES[::-1], TEMPLATES) != first
    assert head_key(model, CLASSES, TEMPLATES[::-1]) != first
    assert head_key(model, CLASSES, TEMPLATES, marked) != first
    # Two classes of one template are no class of two.
    assert head_key(model, ["a", "b"], ["{}"]) != head_key(model, [""], ["a{}", "b{}"])


def test_while_another_makes_it_nobody_waits(tmp_path: Path, model: Clip) -> None:
    store = Store(tmp_path)
    key = head_key(model, CLASSES, TEMPLATES)
    with store.claim(key):
        found = kept(Store(tmp_path), model)
    assert torch.allclose(found, slow(model), atol=1e-5)
    assert key not in store


def test_small_ones_are_read_anew(
    tmp_path: Path, model: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "WORTH_KEEPING", len(CLASSES) * len(TEMPLATES) + 1)
    store = Store(tmp_path)
    kept(store, model)
    assert not store.keys("head")
