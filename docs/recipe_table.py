"""The table of a recipe's fields: names and defaults of the dataclasses, each with a meaning."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from enum import Enum
from typing import Any

from victims.recipe import ClassifierRecipe, Recipe

MEANINGS = {
    "epochs": "passes over the rows of a fit",
    "batch_size": "rows of a step, over all workers together; what is left over at the end of an"
    " epoch is not used in it",
    "lr": "the largest learning rate; or `select`, or `{rates: [...], share, floor}`: chosen among"
    " these by retrieval on held-out pairs of the data that the fit is given, never by ASR",
    "text_lr_ratio": "the learning rate of a CLIP's text tower, as a multiple of `lr`",
    "warmup_steps": "steps in which the learning rate rises to `lr`, in a line; `grid plan`"
    " cautions where a fit has fewer steps",
    "weight_decay": "of weights; norms, biases and the logit scale of a CLIP are spared, an image"
    " classifier spares nothing",
    "beta1": "of Adam",
    "beta2": "of Adam",
    "eps": "of Adam",
    "schedule": "after the warm-up: `fixed` is a cosine to 0 at the last step, `released` the same"
    " one epoch late and past its minimum, as CleanCLIP's code runs it, `constant` stays",
    "precision": "`fp32`, or `bf16`: towers compute in half precision",
    "bn_mode": "batch norms in training: `train` takes a batch's statistics, `eval` those that the"
    " model came with, which then stay",
    "optimizer_state": "`fresh`, or `carry`: Adam's moments of the fit that the first weights came"
    " from (`execution: {keep_optimizer: true}` keeps them)",
    "seed": "of the order of rows and of first weights, for `reference` alone: that of victims and"
    " defenses comes from `seeds` and `defense_seeds`",
    "micro_batch": "a batch passes through the towers in parts of about so many rows, which bounds"
    " memory; the loss is over the whole batch",
    "compile": "the image tower of a CLIP runs as compiled graphs",
    "optimizer": "`sgd`, `adam` or `adamw`",
    "momentum": "of SGD",
    "augment": "training pictures: `none`, or `crop_flip`, a random crop of the padded picture and"
    " a flip of every other one",
}


def recipe_fields() -> str:
    """Every field: of CLIPs, and where they differ or have more, of image classifiers."""
    from docs.tables import table

    known = dataclasses.fields(Recipe)
    rows = [[f"`{f.name}`", _default(f), MEANINGS[f.name]] for f in known]
    own = {f.name for f in known}
    for field in dataclasses.fields(ClassifierRecipe):
        before = next((f for f in known if f.name == field.name), None)
        if before is None or _default(before) != _default(field):
            told = "of image classifiers" if field.name in own else MEANINGS[field.name]
            alone = "" if field.name in own else "image classifiers alone: "
            rows.append([f"`{field.name}`", _default(field), f"{alone}{told}"])
    if unknown := sorted(set(MEANINGS) - set(_names())):
        raise SystemExit(f"docs/recipe_table.py tells of {unknown[0]!r}, which no recipe has")
    return table(["field", "default", "what it is"], rows)


def _names() -> Iterator[str]:
    yield from (field.name for field in dataclasses.fields(ClassifierRecipe))


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if value is dataclasses.MISSING:
        return "needed"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "`true`", False: "`false`"}[value]
    return f"`{value.value if isinstance(value, Enum) else f'{value:g}'}`"
