"""The contract over every defense of the table."""

from __future__ import annotations

import pytest

from grid import kit
from grid.kit_base import Kit
from grid.registry import table
from tests.contracts import clauses, method, methods


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return Kit(tmp_path_factory.mktemp("kit"))


@pytest.mark.parametrize(("name", "variant", "check"), clauses("defenses"))
def test_every_defense_keeps_its_contract(
    name: str, variant: str, check: kit.Check, world: Kit
) -> None:
    defense = method("defenses", name, variant)
    check(defense, world.suited(defense))


def test_every_defense_and_variant_is_here() -> None:
    assert {name for name, _ in methods("defenses")} == set(table("defenses"))
    counted = {variant: len(kit.checks_of("defenses", variant)) for variant in ("", "any")}
    assert counted == {"": 12, "any": 6}
