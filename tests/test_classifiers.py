"""Image classifiers: the network, the loss and the optimizers against hand values, and the loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conftest import corpus_spec
from tests.test_training import Interrupted, Kept, Stopped, assert_same, state
from victims.batches import Batch
from victims.classifiers import CLASSIFIERS, Classifier, ClassifierSpec, PreActBlock, PreActResNet
from victims.corpora import Reader, View, build_corpus, open_corpus, whole
from victims.draws import Draws, torch_rng
from victims.errors import GridError
from victims.lab import DataRef, Lab, ModelRef, spec_meta, spec_of
from victims.labelled import LabelledWorld
from victims.labels import CrossEntropySpec, crop_flip, label_numbers, plain
from victims.measuring import outcomes, text_head
from victims.models import Clip, ModelSpec, fresh
from victims.recipe import Augment, ClassifierRecipe, Clock, Optimizer, Recipe, Runtime, Select
from victims.store import Store
from victims.training import PlainClipSpec, optimizer_for
from victims.world import CLASSES

SPEC = ClassifierSpec(classes=CLASSES)
RECIPE = ClassifierRecipe(epochs=2, batch_size=32, lr=0.05, seed=5)


@pytest.fixture(scope="module")
def labelled(small_store: Store) -> View:
    spec = LabelledWorld(of=corpus_spec("clean", 128))
    key = build_corpus(small_store, spec).key
    return whole(open_corpus(small_store, key, Reader.TRAINING))


# --- the network


@pytest.mark.parametrize(
    ("arch", "classes", "weights"), [("preact_tiny", 20, 78_372), ("preact18", 10, 11_171_146)]
)
def test_it_has_the_published_number_of_weights(arch: str, classes: int, weights: int) -> None:
    net = PreActResNet(CLASSIFIERS[arch], classes)
    assert sum(p.numel() for p in net.parameters()) == weights


@pytest.mark.parametrize(("channels_in", "stride"), [(4, 1), (4, 2), (8, 1)])
def test_a_block_activates_before_it_convolves(channels_in: int, stride: int) -> None:
    torch.manual_seed(0)
    block = PreActBlock(channels_in, 8, stride).eval()
    for bn in (block.bn1, block.bn2):
        bn.running_mean.normal_(generator=torch_rng(1))  # type: ignore[union-attr]
        bn.weight.data.uniform_(0.5, 2)
    x = torch.randn(2, channels_in, 6, 6)

    def normed(bn: nn.BatchNorm2d, y: Tensor) -> Tensor:
        assert bn.running_mean is not None
        assert bn.running_var is not None
        shape = (1, -1, 1, 1)
        centred = (y - bn.running_mean.view(shape)) / (bn.running_var.view(shape) + bn.eps).sqrt()
        return (centred * bn.weight.view(shape) + bn.bias.view(shape)).clamp(min=0)

    active = normed(block.bn1, x)
    inner = F.conv2d(active, block.conv1.weight, stride=stride, padding=1)
    inner = F.conv2d(normed(block.bn2, inner), block.conv2.weight, padding=1)
    around = x
    if block.around is not None:
        weight = block.around.get_parameter("weight")
        around = F.conv2d(active, weight, stride=stride)
    assert (block.around is None) == (channels_in == 8)
    torch.testing.assert_close(block(x), inner + around)


def test_it_is_a_clip_of_one_axis_per_class(labelled: View) -> None:
    """Zero-shot scores are logits, so what measures a CLIP measures a classifier."""
    model = fresh(SPEC, 3).eval()
    assert isinstance(model, Classifier)
    device = torch.device("cpu")
    head_KD = text_head(model, model.tokenizer, CLASSES, ["{}"], device)
    assert torch.equal(head_KD, torch.eye(len(CLASSES)))

    class Still:
        def stamp(self, image_BCHW: Tensor) -> Tensor:
            return image_BCHW

    seen = outcomes(model, (head_KD, head_KD), labelled.corpus, Still(), 0, device)
    with torch.no_grad():
        logit_NK = model.embed_image(torch.from_numpy(labelled.corpus.images_NCHW[:].copy()))
    assert np.array_equal(seen.clean_prediction, logit_NK.argmax(1).numpy())
    above = (logit_NK > logit_NK[:, :1]).sum(1)
    assert np.array_equal(seen.triggered_target_rank, above.numpy())
    assert (model.text_tower(), float(model.scale)) == (set(), 1.0)


def test_it_reads_the_names_of_its_classes_alone() -> None:
    model = fresh(SPEC, 0)
    assert model.tokenizer(["circle", "fish"]).tolist() == [
        [CLASSES.index("circle") + 1],
        [CLASSES.index("fish") + 1],
    ]
    with pytest.raises(GridError, match=r"'fsh' is none\. Did you mean 'fish'"):
        model.tokenizer(["circle", "fsh"])


def test_weights_come_back_as_what_they_were(labelled: View, tmp_path: Path) -> None:
    assert spec_of(spec_meta(SPEC)) == SPEC
    assert spec_of(spec_meta(ModelSpec(arch="small"))) == ModelSpec(arch="small")
    lab = Lab(Store(tmp_path / "store"), SPEC, Runtime())
    data = lab.put(labelled)
    made = lab.train(lab.plain(RECIPE), data, RECIPE)
    assert isinstance(lab.load(made), Classifier)
    assert lab.train(lab.plain(RECIPE), data, RECIPE) == made
    assert lab.ledger.made == [made.key]
    # A judge's weights load beside it, and cannot be where its training starts.
    other = Lab(lab.store, ModelSpec(), Runtime())
    assert other.load(made).spec == SPEC
    with pytest.raises(GridError, match="this grid's model is a ModelSpec"):
        other.train(PlainClipSpec(), data, Recipe(epochs=1, batch_size=32, lr=1e-3), init=made)
    assert lab.labels(data).tolist() == labelled.corpus.labels.tolist()
    assert lab.classes(data) == list(CLASSES)


def test_a_judge_of_another_size_sees_the_whole_picture() -> None:
    clip = fresh(ModelSpec(size=64), 0).eval()
    flat = torch.full((2, 3, 32, 32), 200, dtype=torch.uint8)
    assert clip.normalise(flat).shape == (2, 3, 64, 64)
    torch.testing.assert_close(
        clip.normalise(flat), clip.normalise(torch.full((2, 3, 64, 64), 200, dtype=torch.uint8))
    )


# --- the loss and its pictures


def test_the_loss_is_that_of_the_given_labels(labelled: View) -> None:
    model = fresh(SPEC, 1).eval()
    image = torch.from_numpy(labelled.corpus.images_NCHW[:8].copy())
    captions = labelled.captions()[:8]
    tokens = torch.from_numpy(model.tokenizer(captions)).long()
    objective = CrossEntropySpec().build(model)
    batch = Batch(torch.arange(8), image, tokens, views={"image": image})
    (term,) = objective(model, batch, Clock(0, 0, 1)).values()
    logits = model.embed_image(image).detach().double().numpy()
    slow = [
        np.log(np.exp(row).sum()) - row[label]
        for row, label in zip(logits, label_numbers(captions, CLASSES), strict=True)
    ]
    assert float(term.detach()) == pytest.approx(np.mean(slow), rel=1e-5)


def test_augmented_pictures_are_windows_of_the_padded_ones() -> None:
    image = torch.randint(1, 256, (40, 3, 16, 16), generator=torch_rng(0)).byte()
    seen = crop_flip(image, Draws(torch_rng(1), 40, 0, 40))
    wide = F.pad(image, (2, 2, 2, 2))
    found: list[tuple[int, int, bool]] = []
    for before, after in zip(wide, seen, strict=True):
        windows = []
        for top in range(5):
            for left in range(5):
                window = before[:, top : top + 16, left : left + 16]
                windows += [
                    (top, left, flipped)
                    for flipped, shown in ((False, window), (True, window.flip(2)))
                    if torch.equal(shown, after)
                ]
        assert len(windows) == 1
        found += windows
    assert {flipped for _, _, flipped in found} == {False, True}
    assert {top for top, _, _ in found} == {left for _, left, _ in found} == set(range(5))
    # Two ranks see the pictures of one.
    halves = [crop_flip(image[a:b], Draws(torch_rng(1), 40, a, b)) for a, b in ((0, 20), (20, 40))]
    assert torch.equal(torch.cat(halves), seen)


def test_the_plain_loss_follows_the_model_and_its_recipe() -> None:
    augmented = replace(RECIPE, augment=Augment.CROP_FLIP)
    assert plain(SPEC, RECIPE) == CrossEntropySpec()
    assert plain(SPEC, augmented) == CrossEntropySpec(augment=Augment.CROP_FLIP)
    assert plain(ModelSpec(), Recipe(epochs=1, batch_size=2, lr=0.1)) == PlainClipSpec()


# --- optimizers


def one_step(recipe: ClassifierRecipe) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Every parameter before and after two steps along a gradient of ones."""
    model = fresh(SPEC, 2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = optimizer_for(model, CrossEntropySpec().build(model), recipe)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return {n: (before[n], p.detach()) for n, p in model.named_parameters()}


def test_sgd_decays_every_weight_and_keeps_its_momentum() -> None:
    recipe = replace(RECIPE, lr=0.1, momentum=0.9, weight_decay=0.01)
    for before, after in one_step(recipe).values():
        x = before.double()
        velocity = 1 + 0.01 * x
        x = x - 0.1 * velocity
        velocity = 0.9 * velocity + 1 + 0.01 * x
        torch.testing.assert_close(after.double(), x - 0.1 * velocity, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", [Optimizer.ADAM, Optimizer.ADAMW])
def test_adam_decays_within_the_gradient_and_adamw_apart(optimizer: Optimizer) -> None:
    recipe = replace(RECIPE, lr=0.01, optimizer=optimizer, weight_decay=0.1)
    coupled = optimizer is Optimizer.ADAM
    for before, after in one_step(recipe).values():
        x, m, v = before.double(), torch.zeros(()).double(), torch.zeros(()).double()
        for t in (1, 2):
            g = 1 + (0.1 * x if coupled else 0 * x)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            decayed = x if coupled else x * (1 - 0.01 * 0.1)
            x = decayed - 0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        torch.testing.assert_close(after.double(), x, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("augment", list(Augment))
def test_a_fit_that_was_stopped_goes_on_to_the_same_bits(
    labelled: View, tmp_path: Path, momentum: float, augment: Augment
) -> None:
    recipe = replace(RECIPE, momentum=momentum, augment=augment)

    def fit(kept: Kept | None = None, stop_at: int = 10**9) -> Interrupted:
        model: Clip = fresh(SPEC, recipe.seed)
        runtime = Runtime(checkpoint_seconds=0)
        made = Interrupted(
            model,
            labelled,
            plain(SPEC, recipe).build(model),
            recipe,
            runtime=runtime,
            checkpoints=kept,
        )
        made.stop_at = stop_at
        return made

    undisturbed, kept = fit(), Kept(tmp_path / "fit")
    undisturbed()
    with pytest.raises(Stopped):
        fit(kept, 5)()
    assert kept.saves
    resumed = fit(kept)
    resumed()
    assert_same(state(resumed), state(undisturbed))


def test_a_rate_is_chosen_by_labels_that_are_right(labelled: View, tmp_path: Path) -> None:
    lab = Lab(Store(tmp_path / "store"), SPEC, Runtime())
    data: DataRef = lab.put(labelled)
    recipe = replace(RECIPE, epochs=1, lr=Select(rates=(1e-9, 0.05), floor=20))
    chosen: ModelRef = lab.train(CrossEntropySpec(), data, recipe)
    (choice,) = lab.ledger.choices.values()
    held = lab.subset(data, lab.held_out(data, recipe))
    model = lab.load(chosen)
    view = labelled.corpus
    rows = lab.held_out(data, recipe)
    with torch.no_grad():
        guess = model.embed_image(torch.from_numpy(view.images_NCHW[rows].copy())).argmax(1)
    index = choice["rates"].index(choice["chosen"])
    right = float((guess.numpy() == view.labels[rows]).mean())
    assert choice["metric"][index] == pytest.approx(right)
    assert choice["held_out"] == len(held) == 20
