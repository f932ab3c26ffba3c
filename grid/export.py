"""A cell's model as an open_clip checkpoint, with a card that says what it is and where it is from.

It is read from what a run left: rows, chains and the store. Nothing is planned and nothing trained.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grid.chains import ListedCell
from grid.explain import newest_rows
from grid.model_card import WORDS, card_of, readme
from grid.schema.status import MEASURED, NO_VICTIM
from grid.sought import sought
from victims.classifiers import ClassifierSpec
from victims.errors import GridError, UsageError
from victims.keys import Key
from victims.lab import Lab, ModelRef, spec_of
from victims.models import EMBEDDED, Clip, ModelSpec, WordTokenizer, colours_of, model_config
from victims.recipe import Runtime
from victims.store import Artefact, Damaged, Store

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
CARD, README = "model_card.json", "README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written, or was there already."""

    folder: Path
    cell: str
    model_key: str
    files: tuple[str, ...]
    was_there: bool
    notes: tuple[str, ...] = field(default=())


def export_cell(
    results: Path, wanted: str, folder: Path, store_uri: str | None = None, *, victim: bool = False
) -> Exported:
    """Write a cell's defended model, or its ``victim``, to a folder of its own."""
    found = sought(results, wanted, store_uri)
    chains, cell = found.chains, found.cell
    rows = list(newest_rows(results, cell.key))
    outcome = _outcome(rows)
    if outcome is None or not outcome["victim_key"]:
        why = outcome["detail"] if outcome else "it has not been run"
        raise UsageError(f"{cell.label}: there is no model of it ({why})")
    if (outcome["detail"] or "").startswith(NO_VICTIM):
        raise UsageError(f"{cell.label}: {outcome['detail'].partition('. ')[0]}")
    if not victim and outcome["status"] not in MEASURED:
        raise UsageError(
            f"{cell.label}: no defended model was measured ({outcome['status']}:"
            f" {outcome['detail'] or 'no reason is recorded'}). --victim exports what was attacked."
        )
    store = Store(found.store)
    key = Key(outcome["victim_key"])
    if victim:
        plain = _undefended(chains.cells, cell)
        rows = list(newest_rows(results, plain.key)) if plain else []
        measured = _outcome(rows)
        if plain and measured and measured["victim_key"] == key:
            cell, outcome = plain, measured
        else:
            rows = []  # nothing was measured of the victim itself
    else:
        defended = _need(store, outcome["defended_key"], cell, results)
        key = Key(defended.meta["model_key"])
    spec = _clip_spec(_need(store, key, cell, results), cell)
    model = Lab(store, spec, Runtime()).load(ModelRef(key))
    notes = _notes(spec, outcome, victim)
    above = chains.of(cell)
    stages = {
        name: {"kind": stage.kind, "name": stage.name}
        for name, stage in chains.stages.items()
        if name in above
    }
    tokenizer = WORDS if spec.arch in EMBEDDED else "open_clip's own"
    card = card_of(
        outcome, rows, stages, key, spec, victim=victim, tokenizer=tokenizer, notes=notes
    )
    texts = {
        CONFIG: json.dumps(_config(spec), indent=1) + "\n",
        CARD: json.dumps(card, indent=1, sort_keys=True) + "\n",
        README: readme(card),
    }
    if isinstance(model.tokenizer, WordTokenizer):
        texts[WORDS] = json.dumps(_words(model.tokenizer), indent=1) + "\n"
    was_there = _write(folder, texts, model)
    return Exported(
        folder=folder,
        cell=cell.label,
        model_key=key,
        files=(WEIGHTS, *texts),
        was_there=was_there,
        notes=tuple(notes),
    )


def _outcome(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return next((row for row in rows if row["metric"] == "cell"), None)


def _undefended(cells: Sequence[ListedCell], cell: ListedCell) -> ListedCell | None:
    """The cell whose numbers are those of a cell's victim."""

    def about(one: ListedCell) -> tuple[object, ...]:
        return (one.attack.label, one.rate, one.seed, one.target)

    same = [one for one in cells if one.defense.label == "none" and about(one) == about(cell)]
    return same[0] if same else None


def _need(store: Store, key: str, cell: ListedCell, results: Path) -> Artefact:
    try:
        if (found := store.get(key)) is not None:
            return found
        why = "it is not there, and may have been collected"
    except Damaged as error:
        why = str(error)
    only = f"attack={cell.attack.label} rate={cell.rate} defense={cell.defense.label}"
    if cell.rate.endswith("rows"):
        only = f"cell={cell.label}"
    raise GridError(
        f"{cell.label}: {key} cannot be read from the store {store.shown} ({why}). This makes it"
        f" again, under the same key: grid run {results} --out {results}-again --store"
        f" {store.shown} --only '{only} seed={cell.seed}'; then export again. `grid cache pin"
        f" --grid {results.name}` keeps a run's artefacts from being collected."
    )


def _clip_spec(artefact: Artefact, cell: ListedCell) -> ModelSpec:
    spec = spec_of(artefact.meta["model"])
    if isinstance(spec, ClassifierSpec) or not isinstance(spec, ModelSpec):
        raise UsageError(
            f"{cell.label}: its model is an image classifier ({spec.arch}), which open_clip cannot"
            " hold. Its weights are weights.safetensors of the artefact"
            f" {artefact.key} in the store."
        )
    return spec


def _notes(spec: ModelSpec, outcome: Mapping[str, Any], victim: bool) -> list[str]:
    notes = []
    if outcome["phase"] == "inference" and not victim:
        notes.append(
            f"{outcome['defense']} acts when the model is used and has no weights of its own: these"
            " are those of the model that it guards, without the guard."
        )
    if spec.arch in EMBEDDED:
        notes.append(
            f"{spec.arch} reads captions through a tokenizer of whole words, {WORDS}; open_clip's"
            " own tokenizers have other ids and would give it nonsense."
        )
    return notes


def _config(spec: ModelSpec) -> dict[str, Any]:
    """What open_clip rebuilds the network and its preprocessing from."""
    mean, std = colours_of(spec)
    pictures = {"size": spec.size, "mean": mean, "std": std}
    how = {"interpolation": "bicubic", "resize_mode": "shortest"}
    return {"model_cfg": model_config(spec), "preprocess_cfg": {**pictures, **how}}


def _words(tokenizer: WordTokenizer) -> dict[str, Any]:
    return {
        "what": "captions in lower case, split at white space: START, one id per word, END, padding"
        " to the context; a caption too long loses its last words",
        "context": tokenizer.context,
        "padding": 0,
        "start": tokenizer.start,
        "unknown": tokenizer.unknown,
        "end": tokenizer.end,
        "ids": tokenizer.ids,
    }


def _write(folder: Path, texts: Mapping[str, str], model: Clip) -> bool:
    """All files, or none; True where the very same ones are there. Other contents stay."""
    from safetensors.torch import save_file

    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
    scratch.mkdir()
    try:
        state = {n: t.detach().cpu().contiguous() for n, t in model.net.state_dict().items()}
        save_file(state, scratch / WEIGHTS, metadata={"format": "pt"})
        for name, text in texts.items():
            (scratch / name).write_text(text, encoding="utf-8")
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"--out {folder}: is a file; give a folder that is empty or not there")
        there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        if not there:
            if folder.is_dir():
                folder.rmdir()
            scratch.rename(folder)
            return False
        ours = sorted(path.name for path in scratch.iterdir())
        other = [name for name in there if name not in ours]
        other += [n for n in ours if n not in there or not _same(scratch / n, folder / n)]
        if other:
            raise UsageError(
                f"--out {folder}: holds something else ({other[0]} is another file); nothing was"
                " changed. Give a folder that is empty or not there."
            )
        return True
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()
