"""Are the weights that victims start from what they should be? Asked before any victim is trained.

A wrong activation, other class names or another normalisation of pixels raise no error: the model
answers, and answers badly, and every victim inherits it. One measurement on the tuning split tells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from grid.measure import PROMPT, num_prompts
from grid.schema.status import NO_VICTIM
from grid.stages import Bench, CorpusStage, GuideStage, thousands
from victims.corpora import Reader, open_corpus
from victims.heads import kept_head
from victims.keys import Key, content_key
from victims.lab import ModelRef
from victims.measuring import PROTOCOL_VERSION, Share, clean_accuracy
from victims.models import NetSpec
from victims.store import Store
from victims.work import Work

HINTS = (
    "Likely causes: an activation that the weights were not trained with (QuickGELU for OpenAI's:"
    " `model.quick_gelu`), another normalisation of pixels (`model.mean`, `model.std`) or size,"
    " class names or templates that are not these data's, labels in another order, weights of"
    " another architecture or of a fit that failed."
)


@dataclass(frozen=True)
class StartStage:
    """Zero-shot accuracy of the start weights on the tuning split."""

    kind: ClassVar[str] = "gate"
    family: ClassVar[str] = "measure:start"
    model: NetSpec
    reference: GuideStage
    tuning: CorpusStage

    @cached_property
    def key(self) -> Key:
        return content_key(self.kind, {"protocol": PROTOCOL_VERSION, "of": "start"}, self.inputs)

    @property
    def inputs(self) -> Sequence[Key]:
        return [self.reference.key, self.tuning.key]

    @property
    def work(self) -> float:
        spec = self.tuning.spec
        found = Work(images=spec.num_rows, texts=PROMPT * num_prompts(spec))
        return max(0.01, thousands(found, self.model))

    def run(self, bench: Bench) -> None:
        def make(scratch: Path) -> Mapping[str, Any]:
            model = bench.lab(self.model).load(ModelRef(self.reference.key))
            corpus = open_corpus(bench.store, self.tuning.key, Reader.TUNING)
            device = torch.device(bench.runtime.device)
            head_KD = kept_head(bench.store, model, corpus.classes, corpus.templates, device)
            return {"clean_top1": clean_accuracy(model, head_KD, corpus, device).as_dict()}

        bench.memo(self.key, make)


class StartVerdict(NamedTuple):
    """Whether the start weights will do, and the numbers."""

    passes: bool
    detail: str


def judge_start(store: Store, stage: StartStage, required: float) -> StartVerdict:
    """Hold the measured accuracy against the required one."""
    found = store.need(stage.key).meta["clean_top1"]
    share = Share(found["successes"], found["n"])
    shown = (
        f"zero-shot top-1 of the start weights on the tuning split is {share.value:.1%} of"
        f" {share.n} pictures, and gate.reference asks for {required:.1%}"
    )
    if share.value >= required:
        return StartVerdict(True, shown)
    return StartVerdict(False, f"{NO_VICTIM}: {shown}. {HINTS}")
