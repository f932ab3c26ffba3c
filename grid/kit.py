"""The contract kit: every clause that a method must keep, checked in seconds on a tiny world.

`grid mock METHOD` prints a line per clause; the test suite runs the same clauses over every method
of the tables.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from grid import kit_attacks, kit_defenses
from grid.kit_base import Broken, Kit
from grid.kit_common import built, target_of
from grid.registry import KINDS, Kind, resolve, table
from victims.errors import GridError, UsageError, unknown

Check = Callable[[Any, Kit], None]

_CLASS_CHECKS: dict[Kind, tuple[Check, ...]] = {
    "attacks": kit_attacks.CLASS_CHECKS,
    "defenses": kit_defenses.CLASS_CHECKS,
}
_CHECKS: dict[Kind, tuple[Check, ...]] = {
    "attacks": kit_attacks.CHECKS,
    "defenses": kit_defenses.CHECKS,
}


_VARIANT_CHECKS: dict[Kind, tuple[Check, ...]] = {
    "attacks": kit_attacks.CHECKS,
    "defenses": kit_defenses.VARIANT_CHECKS,
}


def checks_of(kind: Kind, variant: str = "") -> tuple[Check, ...]:
    """The clauses for a method of a kind; those about its class are for the defaults alone."""
    return _VARIANT_CHECKS[kind] if variant else (*_CLASS_CHECKS[kind], *_CHECKS[kind])


def title(check: Check) -> str:
    return check.__name__.replace("_", " ")


def load_class(name_or_path: str) -> tuple[Kind, type[Any]]:
    """A method by its name in a table, or by ``package.module:Class``, however broken it is."""
    if ":" in name_or_path:
        return _imported(name_or_path)
    tables = {kind: table(kind) for kind in KINDS}
    for kind, methods in tables.items():
        if name_or_path not in methods:
            continue
        try:
            return kind, resolve(kind, name_or_path, methods=methods)
        except GridError as error:
            # A class that came in but is no method yet: the clauses say all that it lacks.
            if error.__cause__ is not None:
                raise
            method = methods[name_or_path]
            module = importlib.import_module(method.module)
            return kind, attrgetter(method.attribute)(module)
    known = [name for methods in tables.values() for name in methods]
    raise unknown("method", name_or_path, known, "mock") from None


def _imported(path: str) -> tuple[Kind, type[Any]]:
    module, _, attribute = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does, for a method that is not installed
    try:
        cls = attrgetter(attribute)(importlib.import_module(module))
    except Exception as error:
        raise UsageError(
            f"{path} cannot be imported: {type(error).__name__}: {error}. Give a method's name, or"
            f" package.module:Class as python imports it from {here}."
        ) from error
    kinds: dict[str, Kind] = {"craft": "attacks", "apply": "defenses"}
    found = [kind for method, kind in kinds.items() if hasattr(cls, method)]
    if not isinstance(cls, type) or len(found) != 1:
        raise UsageError(
            f"{path} is no method: an attack is a class with `craft`, a defense one with `apply`"
        )
    return found[0], cls


def check_method(name_or_path: str, say: Callable[[str], None]) -> list[str]:
    """Run every clause on a method and its variants, a line each; what failed is returned."""
    started, threads = time.perf_counter(), torch.get_num_threads()
    kind, cls = load_class(name_or_path)
    say(f"{name_or_path}: {kind.removesuffix('s')} {target_of(cls)}")
    failed: list[str] = []
    count = 0
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="grid-mock-") as folder:
            for holds, line in results(kind, cls, Kit(Path(folder))):
                count += 1
                say(f"{'ok' if holds else 'FAILED':7} {line}")
                if not holds:
                    failed.append(line)
    finally:
        torch.set_num_threads(threads)
    seconds = time.perf_counter() - started
    say(f"{count} checks, {len(failed)} failed, {seconds:.1f} s")
    return failed


def results(kind: Kind, cls: type[Any], kit: Kit) -> Iterator[tuple[bool, str]]:
    """Of each clause: does it hold, and the rest of its line."""
    variants = getattr(cls, "variants", {})
    for variant in ("", *(variants if isinstance(variants, Mapping) else ())):
        label = f"[{variant}] " if variant else ""
        try:
            method = built(cls, variant)
        except Broken as error:
            yield False, f"{label}can be built: {error}"
            continue
        for check in checks_of(kind, variant):
            problem = _problem(check, method, kit.suited(method))
            yield not problem, f"{label}{title(check)}{problem}"


def _problem(check: Check, method: Any, kit: Kit) -> str:
    try:
        check(method, kit)
    except Broken as error:
        return f": {error}"
    except Exception as error:
        # A clause that cannot even be tried: the method raised where it must not.
        wanted = (check.__doc__ or "").splitlines()[0]
        return f": found {type(error).__name__}: {error}; expected: {wanted}"
    return ""
