"""``data: {corpus: {...}}`` of a grid file: ingested pairs to train on, and a labelled set that
judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from grid.data import CleanPool, CorpusData
from grid.decode import decode
from grid.entries import require_seed
from grid.nodes import Raw
from grid.own_paths import own_path
from victims.errors import GridError, UsageError, unknown
from victims.evaluation_sets import PER_CLASS, EvaluationSet, PartName, evaluation_splits
from victims.ingested import IngestedPairs
from victims.label_readers import DATASETS
from victims.pair_folders import Folder, pictures_of, read_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class _Corpus:
    """The keys below ``corpus``."""

    pairs: str
    suspect: int
    clean: int | CleanPool
    public: int = 0
    seed: int = 0
    judged_by: Raw


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judge:
    """The keys below ``judged_by``: pictures of each class for ``tuning``, all for ``report``."""

    set: str
    root: str
    templates: str | tuple[str, ...] | None = None
    tuning: int = PER_CLASS
    tuning_from: PartName = "train"
    report: int | None = None
    seed: int = 0


def check_corpus_keys(raw: Raw) -> None:
    """Refuse keys that no `corpus` has, whatever the files are that it names."""
    raw.check_keys([f.name for f in fields(_Corpus)])
    if (judge := raw.items().get("judged_by")) is not None:
        judge.check_keys([f.name for f in fields(_Judge)])


def corpus_data(raw: Raw) -> CorpusData:
    """The splits that the keys mean. Of the pairs only the manifest is read."""
    given, items = decode(_Corpus, raw), raw.items()
    require_seed(given.seed, items.get("seed", raw))
    place = own_path(given.pairs, items["pairs"])
    try:
        folder = read_folder(place)
    except GridError as error:
        raise items["pairs"].error(str(error)) from error
    sets = _judges(given.judged_by, folder.size)
    classes = tuple(sets["report"].classes)
    return CorpusData(splits={**_pairs(given, raw, folder, classes), **sets})


def _judges(raw: Raw, size: int) -> dict[str, EvaluationSet]:
    """The tuning and the report split of the set that victims are judged by."""
    asked = decode(_Judge, raw)
    items = raw.items()
    require_seed(asked.seed, items.get("seed", raw))
    if asked.set not in DATASETS:
        raise unknown("evaluation set", asked.set, DATASETS, str(items["set"].where))
    if asked.tuning < 1:
        raise items["tuning"].error("at least 1 a class: victims and defenses are judged by them")
    root = own_path(asked.root, items["root"])
    try:
        return evaluation_splits(
            asked.set,
            str(root),
            size,
            templates=asked.templates,
            tuning=asked.tuning,
            report=asked.report,
            tuning_from=asked.tuning_from,
            seed=asked.seed,
        )
    except UsageError as error:
        raise raw.error(str(error)) from error


def _pairs(
    given: _Corpus, raw: Raw, folder: Folder, classes: tuple[str, ...]
) -> dict[str, IngestedPairs]:
    """Splits of one shuffle of the pictures, none of which is in two of them. Suspect rows are
    taken from its start, public ones from its end and clean ones before these: more suspect or
    clean rows move no other split. More public rows move the clean ones; what starts from a
    reference that was fitted to other rows is trained anew in any case."""
    pool = given.clean if isinstance(given.clean, CleanPool) else CleanPool(rows=given.clean)
    overlaps = pool.pool == "overlap"
    counts = {"suspect": given.suspect, "clean": pool.rows, "public": given.public}
    for name, least in {"suspect": 1, "clean": 1, "public": 0}.items():
        if counts[name] < least:
            raise raw.items()[name].error(f"at least {least}, got {counts[name]}")
    if overlaps and pool.rows > given.suspect:
        raise raw.items()["clean"].error(
            f"{pool.rows} rows of pool overlap, and the suspect data has {given.suspect}"
        )
    apart = {**counts, "clean": 0 if overlaps else pool.rows}
    if sum(apart.values()) > folder.rows:
        asked = " + ".join(f"{name} {count}" for name, count in apart.items() if count)
        raise raw.error(
            f"{asked} = {sum(apart.values())} rows of {folder.rows} pairs in {folder.root}: ask for"
            f" {sum(apart.values()) - folder.rows} fewer"
        )
    behind = {"suspect": None, "clean": None if overlaps else given.public, "public": 0}
    splits = {
        name: IngestedPairs(
            root=str(folder.root),
            digest=folder.digest,
            size=folder.size,
            total=folder.rows,
            # Clean pairs of the same pool are read as what they are: suspect rows.
            split="suspect" if name == "clean" and overlaps else name,
            num_rows=count,
            behind=behind[name],
            seed=given.seed,
            classes=classes,
            knows_pictures=folder.knows_pictures,
        )
        for name, count in counts.items()
        if count
    }
    if folder.rows - sum(apart.values()) < _most_lost(folder):
        _require_apart(raw, folder, [splits[name] for name, count in apart.items() if count])
    return splits


def _most_lost(folder: Folder) -> int:
    """The most pairs that cuts between three splits can cost: the rest of a picture's at each."""
    return 2 * (int(folder.about.get("most_captions", 1)) - 1)


def _require_apart(raw: Raw, folder: Folder, splits: Sequence[IngestedPairs]) -> None:
    """That no picture is in two splits, of a folder that has hardly more pairs than they take."""
    picture_N = pictures_of(folder)
    try:
        shown = [np.unique(picture_N[spec.rows()]) for spec in splits]
    except UsageError as error:
        raise raw.error(f"{error}. Ask for fewer rows.") from error
    if len(np.unique(np.concatenate(shown))) < sum(map(len, shown)):
        raise raw.error(
            f"the captions of a picture stay in one split, and {folder.root} has no room to leave"
            f" out what a cut separates: ask for {_most_lost(folder)} rows fewer"
        )
