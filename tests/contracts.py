"""The clauses of every method of the tables, as parameters of a test.

Which methods and variants there are is found by reflection: a new one is tested without a line
here, and one that cannot be built with its defaults fails.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from grid import kit
from grid.kit_common import built
from grid.registry import Kind, resolve, table

# Attacks that train networks of their own: what their own tests do as well.
SLOW = {
    ("input_aware", "changes_pictures"),
    ("input_aware", "follows_its_seed"),
    ("narcissus", "follows_its_seed"),
    ("flip_labels", "follows_its_seed"),
}
QUICK = ("keys_all_its_fields", "is_refused_what_it_does_not_declare")


def methods(kind: Kind) -> list[tuple[str, str]]:
    """Every method of a kind, and every variant of it."""
    return [
        (name, variant)
        for name in table(kind)
        for variant in ("", *getattr(resolve(kind, name), "variants", {}))
    ]


def clauses(kind: Kind) -> list[Any]:
    """A variant is run by default as far as its identity goes; the tests of its method do more."""

    def is_extra(name: str, variant: str, check: str) -> bool:
        return bool(variant and check not in QUICK) or (name, check) in SLOW

    return [
        pytest.param(
            *method,
            check,
            id="-".join(filter(None, (*method, check.__name__))),
            marks=pytest.mark.exhaustive if is_extra(*method, check.__name__) else (),
        )
        for method in methods(kind)
        for check in kit.checks_of(kind, method[1])
    ]


@cache
def method(kind: Kind, name: str, variant: str) -> Any:
    return built(resolve(kind, name), variant)
