"""Sets on disk that a grid file names under `evaluate`: for retrieval, and for accuracy besides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from grid.decode import decode, placed
from grid.evaluate import Evaluate, OtherSet
from grid.nodes import Raw
from grid.own_paths import own_path
from victims.errors import UsageError
from victims.evaluation_sets import PROBED, evaluation_splits
from victims.retrieval_sets import RetrievalSet, retrieval_set

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Retrieval:
    set: str
    root: str
    rows: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Other:
    set: str
    root: str
    templates: str | tuple[str, ...] | None = None
    rows: int | None = None
    probe: bool = False
    seed: int = 0


def with_further_sets(found: Evaluate, raw: Raw, given: Mapping[str, Raw], size: int) -> Evaluate:
    """What is evaluated, with the sets that the file names; their files are read once, for their
    digests."""
    retrieval: bool | tuple[RetrievalSet, ...] = found.retrieval
    at = given.get("retrieval")
    if at is not None and not isinstance(at.node.data, bool):
        retrieval = tuple(_retrieval(item, size) for item in _each(at))
    others = (
        tuple(_other(item, size) for item in _each(given["others"])) if "others" in given else ()
    )
    with placed(raw):
        return replace(found, retrieval=retrieval, others=others)


def _each(raw: Raw) -> Sequence[Raw]:
    """One set, or a list of them."""
    return raw.elements() if isinstance(raw.node.data, tuple) else [raw]


def _retrieval(raw: Raw, size: int) -> RetrievalSet:
    asked = decode(_Retrieval, raw)
    root = str(own_path(asked.root, raw.items()["root"]))
    return _read(raw, lambda: retrieval_set(asked.set, root, size, asked.rows))


def _other(raw: Raw, size: int) -> OtherSet:
    asked = decode(_Other, raw)
    root = str(own_path(asked.root, raw.items()["root"]))
    splits = _read(
        raw,
        lambda: evaluation_splits(
            asked.set,
            root,
            size,
            templates=asked.templates,
            tuning=0,
            probe=PROBED if asked.probe else 0,
            report=asked.rows,
            seed=asked.seed,
        ),
    )
    return OtherSet(report=splits["report"], probe=splits.get("clean"))


def _read(raw: Raw, make: Callable[[], T]) -> T:
    try:
        return make()
    except UsageError as error:
        raise raw.error(str(error)) from error
