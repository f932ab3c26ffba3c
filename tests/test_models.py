"""Models: one preprocessing, exact weights, and open_clip's own numbers behind our two calls."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

from victims.errors import GridError, UsageError
from victims.models import (
    EMBEDDED,
    SCALE_MAX,
    BpeTokenizer,
    Clip,
    ModelSpec,
    WordTokenizer,
    fresh,
    load_weights,
    preprocess_digest,
    save_weights,
)
from victims.words import world_vocabulary
from victims.world import World, render


@pytest.fixture(scope="module")
def model() -> Clip:
    return fresh(ModelSpec(), 0).eval()


def pictures(count: int = 4, size: int = 32) -> torch.Tensor:
    return torch.from_numpy(render(World(size=size), "clean", count).image_BCHW)


# --- pictures


def test_levels_and_floats_are_the_same_picture(model: Clip) -> None:
    """Training, measuring and crafting share one normalisation, whatever form a picture has."""
    levels = pictures()
    with torch.no_grad():
        by_levels, by_floats = model.encode_image(levels), model.encode_image(levels.float() / 255)
    assert torch.equal(by_levels, by_floats)
    expected = (levels.double() / 255 - 0.47) / 0.30
    assert torch.allclose(model.normalise(levels).double(), expected, atol=1e-6)


def test_normalising_leaves_its_input_alone(model: Clip) -> None:
    levels, floats = pictures(), pictures().float() / 255
    kept = levels.clone(), floats.clone()
    model.normalise(levels)
    model.normalise(floats)
    assert torch.equal(levels, kept[0])
    assert torch.equal(floats, kept[1])


def test_channels_are_told_apart(model: Clip) -> None:
    """T15: a stored patch with red and blue exchanged must not look the same."""
    red = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    red[:, 0] = 255
    with torch.no_grad():
        assert not torch.allclose(model.encode_image(red), model.encode_image(red.flip(1)))


def test_features_are_normalised_open_clip_features(model: Clip) -> None:
    levels = pictures()
    with torch.no_grad():
        ours = model.encode_image(levels)
        theirs = F.normalize(model.net.encode_image(model.normalise(levels)), dim=-1)
    assert torch.equal(ours, theirs)
    assert torch.allclose(ours.norm(dim=-1), torch.ones(4), atol=1e-6)
    assert ours.dtype == torch.float32


def test_the_meter_counts_rows_and_gradients(model: Clip) -> None:
    before = vars_of(model)
    model.encode_image(pictures(3))
    with torch.no_grad():
        model.encode_image(pictures(4))
        model.encode_text(torch.from_numpy(model.tokenizer(["a circle"] * 5)).long())
    after = vars_of(model)
    assert [b - a for a, b in zip(before, after, strict=True)] == [7, 3, 5, 0]


def vars_of(model: Clip) -> list[int]:
    meter = model.meter
    return [
        meter.images_forward, meter.images_backward, meter.texts_forward, meter.texts_backward
    ]  # fmt: skip


# --- captions


def test_words_have_ids_of_their_own() -> None:
    tokenizer = WordTokenizer(["a", "red", "circle"], context=6)
    start, end, unknown = tokenizer.start, tokenizer.end, tokenizer.unknown
    tokens = tokenizer(["A red circle", "", "a purple circle", "a a a a a a a"])
    assert tokens.tolist() == [
        [start, 3, 4, 5, end, 0],
        [start, end, 0, 0, 0, 0],
        [start, 3, unknown, 5, end, 0],
        [start, 3, 3, 3, 3, end],
    ]
    assert end == tokens.max() < tokenizer.vocabulary
    assert tokens.dtype == np.int32


def test_every_word_of_the_world_is_known() -> None:
    tokenizer = WordTokenizer(world_vocabulary(), 16)
    captions = render(World(), "public", 256).captions
    tokens = tokenizer(captions)
    assert not (tokens == tokenizer.unknown).any()
    assert (tokens == tokenizer.end).sum() == 256, "a caption was cut"


def test_byte_pairs_are_open_clips() -> None:
    ours = BpeTokenizer("ViT-B-32")
    captions = ["a photo of a circle", "sale!% off", ""]
    theirs = open_clip.get_tokenizer("ViT-B-32")(captions).numpy()
    assert np.array_equal(ours(captions), theirs)
    assert ours.context == 77
    assert theirs[1][2] == 0 < theirs[1][3], "no 0 inside this caption"


def test_text_features_are_open_clips(model: Clip) -> None:
    tokens = torch.from_numpy(model.tokenizer(["a photo of a red circle", "star"])).long()
    with torch.no_grad():
        theirs = F.normalize(model.net.encode_text(tokens), dim=-1)
        assert torch.allclose(model.encode_text(tokens), theirs, atol=1e-6)


def test_the_text_side_is_everything_but_the_picture_tower(model: Clip) -> None:
    text = model.text_tower()
    names = {name for name, _ in model.named_parameters()}
    assert names - text == {name for name in names if ".visual." in name}
    assert {"net.logit_scale", "net.text_projection", "net.token_embedding.weight"} <= text


# --- weights


def test_a_seed_gives_the_weights_and_leaves_the_generator() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    one = fresh(ModelSpec(), 4)
    assert torch.equal(torch.rand(1), expected)
    torch.manual_seed(77)
    two, other = fresh(ModelSpec(), 4), fresh(ModelSpec(), 5)
    weights = [m.net.visual.conv1.weight for m in (one, two, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_scale_starts_at_a_fourteenth_and_stays_below_a_hundred() -> None:
    model = fresh(ModelSpec(), 0)
    assert float(model.scale.detach()) == pytest.approx(1 / 0.07, rel=1e-5)
    for value, clamped in ((9.0, SCALE_MAX), (-1.0, 0.0), (2.0, 2.0)):
        model.net.logit_scale.data.fill_(value)
        model.clamp_scale()
        assert float(model.net.logit_scale.detach()) == pytest.approx(clamped)
    assert math.exp(SCALE_MAX) == pytest.approx(100)


@pytest.mark.parametrize("arch", EMBEDDED)
@pytest.mark.parametrize("size", [32, 64])
def test_embedded_models_of_every_size_encode(arch: str, size: int) -> None:
    model = fresh(ModelSpec(arch=arch, size=size), 0).eval()
    with torch.no_grad():
        assert model.encode_image(pictures(2, size)).shape == (2, 64)


def test_weights_come_back_to_the_bit(model: Clip, tmp_path: Path) -> None:
    save_weights(model, tmp_path / "weights")
    loaded = load_weights(fresh(ModelSpec(), 9), tmp_path / "weights", "here")
    own, found = model.state_dict(), loaded.state_dict()
    assert own.keys() == found.keys()
    assert all(torch.equal(own[name], found[name]) for name in own)


def test_weights_of_another_model_are_explained(model: Clip, tmp_path: Path) -> None:
    save_weights(model, tmp_path / "weights")
    other = Clip(ModelSpec(arch="small"))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    says = r"here: these weights belong to another model than small \(\d+ tensors missing or of "
    with pytest.raises(GridError, match=says + r"another shape, 0 unknown; the first: net\.visual"):
        load_weights(other, tmp_path / "weights", "here")
    assert all(torch.equal(before[n], t) for n, t in other.state_dict().items()), "half loaded"


def test_an_unknown_architecture_gets_a_near_match() -> None:
    with pytest.raises(UsageError, match=r"called 'ViT-B-33'\. Did you mean 'ViT-B-32'"):
        Clip(ModelSpec(arch="ViT-B-33"))


# --- T40: the preprocessing has a digest


def test_the_digest_follows_what_is_done_to_pictures_and_captions(model: Clip) -> None:
    def changed(**changes: Any) -> str:
        other = fresh(ModelSpec(), 1)
        for name, value in changes.items():
            getattr(other, name).fill_(value)
        return preprocess_digest(other)

    assert changed() == preprocess_digest(model), "weights are no preprocessing"
    other_size = preprocess_digest(fresh(ModelSpec(size=64), 0))
    words = fresh(ModelSpec(), 1)
    words.tokenizer = WordTokenizer(["a"], 16)
    found = {changed(), changed(mean_C=0.5), changed(std_C=0.5), other_size}
    assert len({*found, preprocess_digest(words)}) == 5
