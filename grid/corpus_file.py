"""``data: {corpus: {...}}`` of a grid file: ingested pairs to train on, and a labelled set that
judges.
"""

from __future__ import annotations

from dataclasses import dataclass

from grid.decode import decode
from grid.entries import require_seed
from grid.nodes import Raw
from grid.own_paths import own_path
from grid.spec import CleanPool, CorpusData
from victims.errors import GridError, UsageError, unknown
from victims.evaluation_sets import PER_CLASS, EvaluationSet, PartName, evaluation_splits
from victims.ingested import Folder, IngestedPairs, read_folder
from victims.label_readers import DATASETS


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
    """Disjoint runs of rows of one shuffle, so that more rows of one split move no other's:
    suspect rows from its start, clean and public ones from its end."""
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
    clean_at = folder.rows - apart["clean"]
    offsets = {
        "suspect": 0,
        "clean": 0 if overlaps else clean_at,
        "public": clean_at - given.public,
    }
    return {
        name: IngestedPairs(
            root=str(folder.root),
            digest=folder.digest,
            size=folder.size,
            total=folder.rows,
            # Clean pairs of the same pool are read as what they are: suspect rows.
            split="suspect" if name == "clean" and overlaps else name,
            num_rows=count,
            offset=offsets[name],
            seed=given.seed,
            classes=classes,
        )
        for name, count in counts.items()
        if count
    }
