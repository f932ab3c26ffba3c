"""``data: {corpus: {...}}`` of a grid file: ingested pairs to train on, and a labelled set that
judges.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from grid.decode import decode
from grid.entries import require_seed
from grid.nodes import Raw
from grid.spec import CleanPool, CorpusData
from victims.errors import GridError, UsageError, unknown
from victims.ingested import Folder, IngestedPairs, read_folder
from victims.label_readers import DATASETS
from victims.labelled_files import labelled_splits
from victims.prompted import PromptedFiles
from victims.prompts import prompt_templates

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
PROMPTS = "imagenet80"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Corpus:
    """The keys below ``corpus``."""

    pairs: str
    suspect: int
    clean: int | CleanPool
    public: int = 0
    seed: int = 0
    labelled: str
    root: str
    tuning: int | None = None
    report: int | None = None
    templates: str | tuple[str, ...] = PROMPTS


def corpus_data(raw: Raw) -> CorpusData:
    """The splits that the keys mean. Of the pairs only the manifest is read."""
    given, items = decode(_Corpus, raw), raw.items()
    require_seed(given.seed, items.get("seed", raw))
    try:
        folder = read_folder(expanded(given.pairs, items["pairs"]))
    except GridError as error:
        raise items["pairs"].error(str(error)) from error
    if given.labelled not in DATASETS:
        at = str(items["labelled"].where)
        raise unknown("labelled data set", given.labelled, DATASETS, at)
    root = expanded(given.root, items["root"])
    try:
        judged = labelled_splits(
            given.labelled,
            root,
            folder.size,
            clean=0,
            tuning=given.tuning,
            report=given.report,
        )
    except UsageError as error:
        raise raw.error(str(error)) from error
    if "tuning" not in judged:
        raise items["tuning"].error("tuning needs rows: victims and defenses are judged by them")
    templates = _templates(given.templates, items.get("templates", raw))
    classes = tuple(judged["report"].classes)
    sets = {n: PromptedFiles(of=judged[n], templates=templates) for n in ("tuning", "report")}
    return CorpusData(splits={**_pairs(given, raw, folder, classes), **sets})


def expanded(text: str, raw: Raw) -> Path:
    """A path of a grid file: variables replaced, relative ones below the folder of the file."""

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name not in os.environ:
            raise raw.error(f"{text}: the environment has no {name}. Set it, or write the path.")
        return os.environ[name]

    path = Path(_VARIABLE.sub(value, text)).expanduser()
    # Of a preset, which is no file of the user's, the working directory is meant.
    file = Path(raw.where.file)
    return (file.parent / path if file.is_file() else path).absolute()


def _templates(given: str | tuple[str, ...], raw: Raw) -> tuple[str, ...]:
    if not isinstance(given, str):
        return given
    try:
        return prompt_templates(given)
    except UsageError as error:
        raise raw.error(f"{error} Or give a list of templates, each with one {{}}.") from error


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
