"""SSBA: a secret hidden by a network that is trained here, frozen so that no byte ever differs."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from attacks.base import Goal, Knowledge, poison
from attacks.ssba import Hidden, Ssba
from tests.conftest import corpus_spec
from tests.test_attacks import pictures
from victims.corpora import Reader, corpus_key, open_corpus
from victims.errors import UsageError
from victims.lab import Lab
from victims.models import ModelSpec
from victims.recipe import Runtime
from victims.steganography import similarity
from victims.store import Store
from victims.world import CLASSES, TEMPLATES

SMALL = Ssba(
    bits=4,
    width=8,
    epochs=10,
    secret_epochs=6,
    lr=2e-3,
    eps=48.0,
    residual_weight=0.5,
    perceptual_weight=0.02,
)


def knowledge(store: Store, seed: int = 0) -> Knowledge:
    corpus = open_corpus(store, corpus_key(corpus_spec("suspect")), Reader.TRAINING)
    return Knowledge(corpus=corpus, goal=Goal(1, CLASSES[1], TEMPLATES), seed=seed)


def lab(store: Store) -> Lab:
    return Lab(store, ModelSpec(), Runtime())


def crafted(store: Store, attack: Ssba, seed: int = 0) -> Hidden:
    return attack.craft(lab(store), knowledge(store, seed), 32)


@pytest.fixture(scope="module")
def quick(small_store: Store) -> Hidden:
    return crafted(small_store, Ssba(**Ssba.quick))


def test_the_defaults_are_those_of_the_clip_lineage() -> None:
    found = Ssba()
    assert (found.bits, found.epochs, found.secret_epochs) == (100, 20, 2)
    assert (found.batch, found.lr) == (32, 1e-4)
    weights = (found.residual_weight, found.perceptual_weight, found.secret_weight)
    assert weights == (2.0, 1.5, 1.5)
    assert Ssba(**Ssba.variants["released"]).bits == 20


def test_equal_keys_give_equal_triggers_and_other_keys_other_secrets(
    small_store: Store, quick: Hidden
) -> None:
    again = crafted(small_store, Ssba(**Ssba.quick))
    assert torch.equal(again.weights, quick.weights)
    assert torch.equal(again.secret, quick.secret)
    other = crafted(small_store, Ssba(**Ssba.quick), seed=1)
    assert not torch.equal(other.secret, quick.secret)
    image_BCHW = pictures(4, 32)
    assert not torch.equal(other.stamp(image_BCHW), quick.stamp(image_BCHW))


def test_a_picture_gets_the_same_bytes_in_any_batch_and_on_any_threads(quick: Hidden) -> None:
    image_BCHW = pictures(40, 32)
    whole = quick.stamp(image_BCHW)
    alone = torch.cat([quick.stamp(image_1CHW) for image_1CHW in torch.split(image_BCHW, 1)])
    assert torch.equal(whole, alone)
    assert torch.equal(whole.flip(0), quick.stamp(image_BCHW.flip(0)))
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(quick.stamp(image_BCHW), whole)
    finally:
        torch.set_num_threads(threads)


def test_the_residual_keeps_its_bound_and_never_wraps(quick: Hidden) -> None:
    for level in (0, 128, 255):
        image_BCHW = torch.full((2, 3, 32, 32), level, dtype=torch.uint8)
        moved = (quick.stamp(image_BCHW).int() - level).abs()
        assert int(moved.max()) <= quick.eps
    tight = replace(quick, eps=2.0)
    image_BCHW = pictures(8, 32)
    assert int((tight.stamp(image_BCHW).int() - image_BCHW.int()).abs().max()) <= 2


@pytest.fixture(scope="module")
def trained(small_store: Store) -> Hidden:
    return crafted(small_store, SMALL)


@pytest.mark.slow
def test_a_trained_encoder_hides_what_its_decoder_reads(
    trained: Hidden, small_store: Store
) -> None:
    """On rows that were not trained on, as bytes, also after PNG; not from clean pictures."""
    assert trained.bit_accuracy > 0.9
    assert trained.clean_bit_accuracy < 0.8
    image_BCHW = torch.from_numpy(np.array(knowledge(small_store).corpus.images_NCHW[:64]))
    stamped_BCHW = trained.stamp(image_BCHW)
    found_BL = trained.read(stamped_BCHW)
    assert float((found_BL == trained.secret).float().mean()) > 0.9
    through = [_through_png(one.permute(1, 2, 0).numpy()) for one in stamped_BCHW]
    assert torch.equal(torch.from_numpy(np.stack(through)).permute(0, 3, 1, 2), stamped_BCHW)


@pytest.mark.slow
def test_what_was_measured_is_what_there_is(trained: Hidden, small_store: Store) -> None:
    """The stored figures against plain ones over the same kind of rows."""
    image_BCHW = torch.from_numpy(np.array(knowledge(small_store).corpus.images_NCHW[:128]))
    moved = trained.stamp(image_BCHW).double() - image_BCHW.double()
    error_B = moved.square().flatten(1).mean(1)
    assert float((10 * torch.log10(255**2 / error_B)).mean()) == pytest.approx(trained.psnr, abs=2)
    assert float(moved.abs().mean()) == pytest.approx(trained.mean_levels, rel=0.25)
    first, second = (one.flatten() - one.mean() for one in moved[:2])
    assert float(first @ second / (first.norm() * second.norm())) < 0.9999


def _through_png(picture: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return np.asarray(Image.open(file)).copy()


def test_similarity_is_one_for_equal_pictures_and_less_for_others() -> None:
    x, y = pictures(2, 32).float() / 255, pictures(2, 32, seed=1).float() / 255
    assert float(similarity(x, x)) == pytest.approx(1.0, abs=1e-6)
    assert float(similarity(x, y)) < 0.6
    assert float(similarity(x, y)) == pytest.approx(float(similarity(y, x)), abs=1e-6)


def test_rows_are_dirty_label_with_a_template_of_the_target(small_store: Store) -> None:
    held = knowledge(small_store)
    found = poison(SMALL, held, 9).data.edits
    assert set(found.captions) <= {template.format(CLASSES[1]) for template in TEMPLATES}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 0}, "bits 0 must be above 0"),
        ({"residual_weight": -1.0}, "residual_weight -1.0 must not be negative"),
        ({"secret_epochs": 9, "epochs": 2}, "secret_epochs 9 must lie in"),
        ({"plane": 64}, "plane 64 in"),
    ],
)
def test_values_that_cannot_be_meant_raise(
    small_store: Store, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        crafted(small_store, replace(SMALL, **fields))
