"""The contract over every defense of the table."""

from __future__ import annotations

from dataclasses import replace

import pytest

from defenses.ubt import Unlearning
from grid import kit
from grid.kit_base import Kit
from grid.kit_runs import run_of, stage_of
from grid.registry import table
from grid.step_costs import USUAL_IMAGE_SHARE
from tests.contracts import clauses, method, methods
from victims.work import Work

METERS = ("images_forward", "images_backward", "texts_forward", "texts_backward")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return Kit(tmp_path_factory.mktemp("kit"))


@pytest.mark.parametrize(("name", "variant", "check"), clauses("defenses"))
def test_every_defense_keeps_its_contract(
    name: str, variant: str, check: kit.Check, world: Kit
) -> None:
    defense = method("defenses", name, variant)
    check(defense, world.suited(defense))


@pytest.mark.parametrize("name", sorted(table("defenses")))
def test_a_defense_costs_about_what_it_says(name: str, world: Kit) -> None:
    """What the models' meters counted, against what was known before."""
    defense = method("defenses", name, "")
    if isinstance(defense, Unlearning):
        # What is said holds for fits that do not stop early.
        defense = replace(defense, target_cosine=-1.0, stop_margin=0.0)
    kit = world.suited(defense)
    stage, spent = stage_of(defense, kit), run_of(defense, kit).lab.ledger.total()
    found = {what: spent.get(what, 0.0) for what in METERS}
    counted = Work(
        images=found["images_forward"] - found["images_backward"],
        texts=found["texts_forward"] - found["texts_backward"],
        images_trained=found["images_backward"],
        texts_trained=found["texts_backward"],
    )
    share = 1.0 if kit.labelled else USUAL_IMAGE_SHARE
    steps, said = counted.steps(share), 1000 * stage.work
    if not steps:
        assert stage.work == 0.01, "nothing went through a network"
        return
    assert steps / 2 <= said <= 2 * steps


def test_every_defense_and_variant_is_here() -> None:
    assert {name for name, _ in methods("defenses")} == set(table("defenses"))
    counted = {variant: len(kit.checks_of("defenses", variant)) for variant in ("", "any")}
    assert counted == {"": 13, "any": 6}
