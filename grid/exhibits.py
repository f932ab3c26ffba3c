"""Exhibits: what a measurement keeps to be looked at, and how it comes into the results.

They are opt-in (``evaluate.exhibits``), and no number of the board depends on them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from victims.errors import GridError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from grid.plan import CellPlan
    from victims.corpora import Corpus, Stamper
    from victims.exhibits import Exhibits
    from victims.models import Clip
    from victims.store import Artefact, Store

    Judgement = tuple[str, npt.NDArray[np.floating], npt.NDArray[np.bool_]]
    """The name of a score (often none), its values, and which rows are poisoned."""

FILE = "{}.parquet"


def write_features(
    scratch: Path,
    exhibits: Exhibits,
    model: Clip,
    corpus: Corpus,
    trigger: Stamper,
    target: int,
    device: torch.device,
) -> None:
    """Where the features of clean and of triggered pictures lie."""
    from victims.exhibits import places

    found = places(model, corpus, trigger, target, exhibits, device)
    columns = {
        "image": found.image,
        "label": found.label,
        "kind": found.kind,
        "x": found.place_N2[:, 0],
        "y": found.place_N2[:, 1],
        "projection": [exhibits.projection.value] * len(found.kind),
    }
    _write(scratch, "features", columns)


def write_pictures(
    scratch: Path, exhibits: Exhibits, corpus: Corpus, trigger: Stamper, target: int
) -> None:
    """Some pictures before and after the trigger."""
    from victims.exhibits import BeforeAfter, pictures

    found = pictures(corpus, trigger, target, exhibits.pictures)
    names = [f.name for f in fields(BeforeAfter)]
    if found:
        _write(scratch, "pictures", {n: [getattr(one, n) for one in found] for n in names})


def write_rocs(scratch: Path, judgements: Iterable[Judgement]) -> None:
    """How each score of a defense tells the poisoned rows."""
    from victims.exhibits import roc
    from victims.measuring import separation

    names = ("score", "auroc", "false_positive", "true_positive")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for name, suspicion, poisoned in judgements:
        curve = roc(suspicion, poisoned)
        if curve is None:
            continue
        area = separation(suspicion, poisoned)["auroc"].as_dict()["value"]
        columns["score"] += [name] * len(curve.false_positive)
        columns["auroc"] += [area] * len(curve.false_positive)
        columns["false_positive"] += curve.false_positive.tolist()
        columns["true_positive"] += curve.true_positive.tolist()
    if columns["score"]:
        _write(scratch, "rocs", columns)


def _write(scratch: Path, kind: str, columns: Mapping[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(dict(columns)), scratch / FILE.format(kind))


def tables(store: Store, planned: CellPlan) -> Iterator[tuple[str, dict[str, Any], int]]:
    """The exhibits of a measured cell as tables of its results: kind, columns, number of rows."""
    import pyarrow.parquet as pq

    if planned.measure.exhibits is None:
        return
    artefact = store.need(planned.measure.key)
    for kind in ("features", "pictures", "rocs"):
        if FILE.format(kind) in artefact.files:
            table = pq.read_table(artefact.path(FILE.format(kind)))
            columns = {name: table[name].combine_chunks() for name in table.column_names}
            yield kind, {**columns, "cell": planned.key}, len(table)
    fits = list(_fits(store, planned))
    if fits:
        names = ("epoch", "name", "value")
        own = {name: [fit[place] for fit in fits] for place, name in enumerate(names)}
        yield "fits", {**own, "cell": planned.key}, len(fits)


def _fits(store: Store, planned: CellPlan) -> Iterator[tuple[int, str, float]]:
    """What the last fit of a cell's model recorded: its defense's, of no defense the victim's."""
    stage = planned.measure.defended
    key = str(store.need(stage.key).meta["model_key"])
    if not stage.is_bare and (key == planned.victim.key or not stage.trains):
        return  # it fitted nothing itself
    for epoch, record in enumerate(_curves(store.need(key)), start=1):
        for name, value in record.items():
            if name not in ("epoch", "steps"):
                yield epoch, name, float(value)


def _curves(artefact: Artefact) -> list[dict[str, float]]:
    if "curves.json" not in artefact.files:
        return []
    found = json.loads(artefact.path("curves.json").read_text())
    if not isinstance(found, list):
        raise GridError(f"{artefact.key}: curves.json holds no list of epochs")
    return found
