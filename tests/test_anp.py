"""ANP: the worst perturbation of a toy network, the masks' gradient, and that pruned is gone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.anp import Anp, NeuronMasks, PrunedNorms, below, loss_with, norms_of
from defenses.base import Need
from tests.labelled import MODEL, case_of, lab_of, rows_of, victim_of
from victims.classifiers import Classifier, classifier
from victims.draws import torch_rng
from victims.errors import UsageError
from victims.models import Clip, fresh
from victims.recipe import Augment
from victims.store import Store

MASKS = NeuronMasks(
    eps=0.4,
    alpha=0.2,
    lr=0.2,
    momentum=0.9,
    iterations=3,
    steps=1,
    batch_size=16,
    augment=Augment.NONE,
    seed=0,
)


class Toy(nn.Module):
    """One normalisation of two channels and two classes, each the mean of a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2).double().eval()
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([1.5, -0.5]))
            self.norm.bias.copy_(torch.tensor([0.25, 0.5]))

    def embed_image(self, image_BCHW: Tensor) -> Tensor:
        out: Tensor = self.norm(image_BCHW).mean((2, 3))
        return out


IMAGE = torch.randn((6, 2, 3, 3), generator=torch_rng(0), dtype=torch.float64)
LABEL = torch.tensor([0, 1, 0, 1, 1, 0])


def by_hand(mask: Tensor, delta: Tensor, xi: Tensor) -> Tensor:
    """L((m + delta) w, (1 + xi) b), channel by channel."""
    w, b = (1.5, -0.5), (0.25, 0.5)
    normal = IMAGE / (1 + 1e-5) ** 0.5
    columns = [
        (normal[:, c] * w[c] * (mask[c] + delta[c]) + b[c] * (1 + xi[c])).mean((1, 2))
        for c in (0, 1)
    ]
    return F.cross_entropy(torch.stack(columns, 1), LABEL)


def toy() -> Clip:
    return Toy()  # type: ignore[return-value]


def factors(*values: float) -> dict[str, Tensor]:
    return {"norm": torch.tensor(values, dtype=torch.float64)}


def test_the_loss_under_factors_is_written_out() -> None:
    found = loss_with(toy(), factors(0.7, 1.2), factors(0.9, 1.1), IMAGE, LABEL)
    one = torch.tensor([0.7, 1.2]), torch.zeros(2), torch.tensor([-0.1, 0.1])
    assert float(found.detach()) == pytest.approx(float(by_hand(*one)), rel=1e-6)


def test_the_ascent_takes_signed_steps_and_stays_in_the_ball() -> None:
    for steps in (1, 3):
        how = replace(MASKS, steps=steps)
        start, _ = replace(how, steps=0).worst(toy(), factors(1, 1), IMAGE, LABEL, 5)
        mask = factors(0.8, 1.0)
        delta, xi = how.worst(toy(), mask, IMAGE, LABEL, 5)
        rng = torch_rng(0, "start", 5)
        found = [((2 * torch.rand(2, generator=rng) - 1) * 0.4).double() for _ in range(2)]
        assert start["norm"].tolist() == pytest.approx(found[0].tolist())
        for _ in range(steps):
            moving = [value.requires_grad_() for value in found]
            gradients = torch.autograd.grad(by_hand(mask["norm"], *moving), moving)
            found = [
                (v + 0.4 / steps * g.sign()).clamp(-0.4, 0.4).detach()
                for v, g in zip(found, gradients, strict=True)
            ]
        assert delta["norm"].tolist() == pytest.approx(found[0].tolist())
        assert xi["norm"].tolist() == pytest.approx(found[1].tolist())


def test_the_perturbation_is_worse_than_none_and_than_where_it_began() -> None:
    mask = factors(1, 1)
    how = replace(MASKS, steps=20)

    def loss(delta: Any, xi: Any) -> float:
        return float(by_hand(mask["norm"], delta["norm"], xi["norm"]))

    began = replace(how, steps=0).worst(toy(), mask, IMAGE, LABEL, 0)
    ended = how.worst(toy(), mask, IMAGE, LABEL, 0)
    none = factors(0, 0), factors(0, 0)
    assert loss(*ended) > max(loss(*began), loss(*none))
    # The loss is convex in delta and xi, whose maximum over a box is then at one of its corners.
    corners = [
        loss(factors(a, b), factors(c, d))
        for a in (-0.4, 0.4)
        for b in (-0.4, 0.4)
        for c in (-0.4, 0.4)
        for d in (-0.4, 0.4)
    ]
    assert loss(*ended) == pytest.approx(max(corners), rel=1e-6)


# --- masks and pruning

MASK = {"a": torch.tensor([0.9, 0.2, 0.0]), "b": torch.tensor([0.21, 0.2])}


def test_pruned_are_the_channels_at_or_below_the_threshold() -> None:
    assert below(MASK, 0.2, None) == {"a": (1, 2), "b": (1,)}
    assert below(MASK, 0.1, None) == {"a": (2,)}
    assert below({"a": torch.ones(3)}, 0.2, None) == {}


def test_a_number_of_channels_is_the_lowest_masks_of_all_layers() -> None:
    assert below(MASK, 0.0, 1) == {"a": (2,)}
    assert below(MASK, 0.0, 2) == {"a": (1, 2)}
    assert below(MASK, 0.0, 3) == {"a": (1, 2), "b": (1,)}
    assert below(MASK, 0.0, 0) == {}


def outputs(model: Classifier, name: str, image_BCHW: Tensor) -> Tensor:
    found: list[Tensor] = []
    hook = norms_of(model)[name].register_forward_hook(lambda *a: found.append(a[2]))
    with torch.no_grad():
        model.embed_image(image_BCHW)
    hook.remove()
    return found[0]


def test_a_pruned_channel_says_the_same_of_every_picture() -> None:
    """What stays is its bias; nothing of the picture comes through."""
    model = classifier(fresh(MODEL, 0)).eval()
    name = "net.blocks.1.bn2"
    with torch.no_grad():
        norms_of(model)[name].bias.fill_(0.3)
        PrunedNorms(channels={name: (4, 7)}).edit(model)
    image_BCHW = torch.rand((5, 3, 32, 32), generator=torch_rng(1))
    out_BCHW = outputs(model, name, image_BCHW)
    gone = torch.tensor([4, 7])
    assert torch.equal(out_BCHW[:, gone], torch.full_like(out_BCHW[:, gone], 0.3))
    assert out_BCHW[:, 5].std() > 0


def test_the_masks_move_and_stay_between_none_and_all(small_store: Store) -> None:
    lab = lab_of(small_store)
    mask = lab.tensor(MASKS, rows_of(small_store, "clean"), victim_of(lab))
    norms = norms_of(lab.load(victim_of(lab)))
    assert {n: len(m) for n, m in mask.items()} == {n: len(m.weight) for n, m in norms.items()}
    every = torch.cat(list(mask.values()))
    assert 0 <= float(every.min()) < 1
    assert float(every.max()) == 1


def test_the_victim_is_pruned_and_not_trained(small_store: Store) -> None:
    defense, lab = Anp(iterations=3, batch_size=16, number=5), lab_of(small_store)
    done = defense.apply(lab, case_of(defense, lab))
    before, after = (lab.load(m).state_dict() for m in (victim_of(lab), done.model))
    changed = {name: before[name] != after[name] for name in before}
    assert {n.rsplit(".", 1)[1] for n, moved in changed.items() if moved.any()} == {"weight"}
    assert sum(int(moved.sum()) for moved in changed.values()) == 5
    assert all(not after[n][moved].any() for n, moved in changed.items() if moved.any())
    assert done.notes["pruned"] == 5
    assert done.notes["channels"] == sum(len(m.weight) for m in norms_of(fresh(MODEL, 0)).values())


def test_another_threshold_learns_no_masks_anew(small_store: Store) -> None:
    defense = Anp(iterations=3, batch_size=16, number=5)
    lab = lab_of(small_store)
    defense.apply(lab, case_of(defense, lab))
    other, lab = replace(defense, number=None, threshold=0.9), lab_of(small_store)
    other.apply(lab, case_of(other, lab))
    assert [key.split("-")[0] for key in lab.ledger.made] == ["model"]


def test_it_needs_the_victim_and_clean_data() -> None:
    assert Anp().needed() == {Need.VICTIM, Need.CLEAN_DATA}
    assert (Anp().eps, Anp().alpha, Anp().iterations, Anp().threshold) == (0.4, 0.2, 2000, 0.2)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"alpha": 1.1}, "alpha must be in 0..1"),
        ({"threshold": 1.0}, "threshold must be in"),
        ({"number": -1}, "number must be 0 or more, or null"),
        ({"iterations": 0}, "iterations must be at least 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Anp(**fields).check()
