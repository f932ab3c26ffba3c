"""MEASURE: clean accuracy, attack success, and what is measured besides, of one model.

The last stage of a chain, and the only one that may open the truth and the report split.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attacks.base import (
    ROLES,
    STAMPING,
    Aim,
    Role,
)
from defenses.base import Need
from grid.exhibits import write_features, write_pictures, write_rocs
from grid.stages import (
    ALIKE,
    Bench,
    CorpusStage,
    DefendStage,
    PoisonStage,
    Stage,
    TriggerStage,
    edited_rows,
    load_trigger,
    roles_of,
    thousands,
)
from victims.corpora import (
    Corpus,
    CorpusSpec,
    Reader,
    open_corpus,
)
from victims.evaluation_sets import EvaluationSet
from victims.exhibits import Exhibits
from victims.heads import WORTH_KEEPING, kept_head
from victims.ingested import IngestedPairs
from victims.keys import Key, content_key
from victims.lab import ModelRef
from victims.labelled_files import LabelledFiles
from victims.measuring import (
    PROTOCOL_VERSION,
    Mean,
    Measured,
    Outcomes,
    Share,
    changed_share,
    detection,
    metrics,
    outcomes,
    separation,
    single_keys,
    templates_digest,
)
from victims.models import (
    Clip,
    ModelSpec,
    preprocess_digest,
)
from victims.parts import CorpusPart
from victims.retrieval_sets import RetrievalSet
from victims.store import Artefact, Store
from victims.triggers import Queries, Targets, Trigger
from victims.work import Work

# Metrics of stamped pictures.
STAMPED = re.compile(r"(^|_)(asr|target_rate|r_acc|target_top)")


# The tokens of a prompt, cut after the longest of a batch, over those of a full caption: about.
PROMPT = 0.25
# Captions of a picture in the sets that retrieval is measured on.
CAPTIONS = 5


def num_prompts(spec: CorpusSpec) -> int:
    return len(spec.classes) * len(spec.templates)


Prompts = tuple[tuple[str, ...], tuple[str, ...]]
"""The names of classes, and the templates that they are put into."""


def prompts_of(spec: CorpusSpec) -> Prompts:
    """What the zero-shot classifier of a set is made of; that of equal prompts is made once."""
    return tuple(spec.classes), tuple(spec.templates)


@dataclass(frozen=True)
class OtherStages:
    """The pictures of a further set, and those that a linear probe is trained on there."""

    report: CorpusStage
    probe: CorpusStage | None

    @property
    def corpora(self) -> list[CorpusStage]:
        return [self.report, *([self.probe] if self.probe else [])]


@dataclass(frozen=True)
class MeasureStage:
    """Clean accuracy and attack success of one model on some evaluation sets, in one pass each.

    ``retrieval``, ``probe`` (the corpus that a linear probe is trained on) and ``exhibits`` are
    opt-in, and so are ``retrieval_sets``, whose pictures have several captions, and accuracy on
    ``others``. ``read_before`` is for estimates alone.
    """

    defended: DefendStage
    trigger: TriggerStage
    sets: tuple[CorpusStage, ...]
    ks: tuple[int, ...]
    reader: Reader
    retrieval: bool = False
    probe: CorpusStage | None = None
    exhibits: Exhibits | None = None
    retrieval_sets: tuple[CorpusStage, ...] = ()
    others: tuple[OtherStages, ...] = ()
    # Classifiers of prompts that another stage of the plan makes of the same text tower.
    read_before: frozenset[Prompts] = frozenset()

    @property
    def kind(self) -> str:
        return "gate" if self.reader is Reader.TUNING else "measure"

    @property
    def truth(self) -> PoisonStage | None:
        judges = Need.SUSPECT_DATA in self.defended.defense.needed()
        return self.defended.poisoned if judges or self._overlaps else None

    @property
    def _overlaps(self) -> bool:
        """Whether the defense was given clean pairs that the suspect data holds too."""
        clean, suspect = self.defended.clean.spec, self.defended.suspect.spec
        same = clean.split == suspect.split and _first_row(clean) == _first_row(suspect)
        return same and Need.CLEAN_DATA in self.defended.defense.needed()

    @cached_property
    def key(self) -> Key:
        params = {"protocol": PROTOCOL_VERSION, "ks": self.ks, "goal": self.trigger.goal}
        if self.retrieval:
            params["retrieval"] = True
        if self.exhibits:
            params["exhibits"] = self.exhibits
        if self.retrieval_sets:
            params["retrieval_sets"] = len(self.retrieval_sets)
        if self.others:
            params["others"] = [len(other.corpora) for other in self.others]
        truth = [self.truth.truth_key] if self.truth else []
        return content_key(self.kind, params, [*self.inputs, *truth])

    @property
    def inputs(self) -> Sequence[Key]:
        sets = [s.key for s in self.sets]
        return [
            self.defended.key,
            self.trigger.key,
            *sets,
            *([self.probe.key] if self.probe else []),
            *(stage.key for stage in self._further),
        ]

    @property
    def _further(self) -> list[CorpusStage]:
        others = [corpus for other in self.others for corpus in other.corpora]
        return [*self.retrieval_sets, *others]

    @cached_property
    def parents(self) -> list[Stage]:
        """The stages whose artefacts it reads."""
        truth: list[Stage] = [self.truth] if self.truth else []
        probe: list[Stage] = [self.probe] if self.probe else []
        return [self.defended, self.trigger, *self.sets, *truth, *probe, *self._further]

    family: ClassVar[str] = "measure"

    @property
    def work(self) -> float:
        shown = 2 if self.trigger.attack.aim in STAMPING else 1
        found = Work(images=shown * sum(stage.spec.num_rows for stage in self.sets))
        for stage in self._further:
            found += Work(images=stage.spec.num_rows)
            if isinstance(stage.spec, RetrievalSet):
                found += Work(texts=CAPTIONS * stage.spec.num_rows)
        if self.retrieval:
            found += Work(texts=sum(stage.spec.num_rows for stage in self.sets))
        if self.probe:
            found += Work(images=self.probe.spec.num_rows)
        found += Work(texts=PROMPT * sum(self.prompts.values()))
        return max(0.01, thousands(found, self.defended.victim.model))

    @property
    def prompts(self) -> Mapping[Prompts, int]:
        """How many prompts it has to read, by what they are; none that another stage reads."""
        if not isinstance(self.defended.victim.model, ModelSpec):
            return {}
        marked = 2 if self.trigger.attack.aim is Aim.DUAL else 1
        specs = [stage.spec for stage in self.sets]
        found = {prompts_of(spec): marked * num_prompts(spec) for spec in specs}
        for other in self.others:
            found[prompts_of(other.report.spec)] = num_prompts(other.report.spec)
        kept = {name: number for name, number in found.items() if number >= WORTH_KEEPING}
        return {**found, **dict.fromkeys(kept.keys() & self.read_before, 0)}

    def run(self, bench: Bench) -> None:
        bench.memo(self.key, lambda scratch: self._measure(bench, scratch))

    def _measure(self, bench: Bench, scratch: Path) -> dict[str, Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        defended = bench.store.need(self.defended.key)
        model = bench.lab(self.defended.victim.model).load(ModelRef(defended.meta["model_key"]))
        trigger = load_trigger(bench.store, self.trigger.key, self.trigger.attack)
        device, target = torch.device(bench.runtime.device), self.trigger.goal.target
        stamps = self.trigger.attack.aim in STAMPING
        found: dict[str, Any] = {}
        tables: list[pa.Table] = []
        asked: dict[tuple[Sequence[str], ...], tuple[Tensor, Tensor]] = {}
        for stage in self.sets:
            corpus = open_corpus(bench.store, stage.key, self.reader)
            prompts = (tuple(corpus.classes), tuple(corpus.templates))
            if prompts not in asked:
                aim = self.trigger.attack.aim
                asked[prompts] = heads_of(bench.store, model, corpus, trigger, aim, device)
            heads = asked[prompts]
            seen = outcomes(model, heads, corpus, trigger, target, device)
            names, shares = self._shares(bench, model, heads, corpus, trigger, seen)
            found[corpus.split] = {
                "metrics": {name: share.as_dict() for name, share in shares.items()},
                "not_applicable": names,
                "changed_share": changed_share(corpus, trigger) if stamps else None,
                "corpus_digest": corpus.digest,
                "templates_digest": templates_digest(corpus.templates),
                **_set_of(stage),
            }
            columns = {name: pa.array(column) for name, column in seen.columns().items()}
            split = pa.array([corpus.split] * len(corpus)).dictionary_encode()
            tables.append(pa.table({"eval_set": split, **columns}))
            if self.exhibits and stage is self.sets[0]:
                self._show(bench, scratch, self.exhibits, model, corpus, trigger)
        found |= self._further_sets(bench, model, trigger, device)
        pq.write_table(pa.concat_tables(tables), scratch / "samples.parquet")
        told = {**self._detection(bench), **self._alike(bench, corpus, device)}
        body = {"sets": found, "detection": told}
        (scratch / "metrics.json").write_text(json.dumps(body, sort_keys=True))
        return {"preprocess_digest": preprocess_digest(model)}

    def _further_sets(
        self, bench: Bench, model: Clip, trigger: Trigger, device: torch.device
    ) -> dict[str, Any]:
        """What is measured on sets of their own, by the name of the set."""
        from victims.other_sets import accuracy, probed_accuracy
        from victims.retrieval import retrieval

        goal, found = self.trigger.goal, dict[str, Any]()
        for stage in self.retrieval_sets:
            corpus = open_corpus(bench.store, stage.key, self.reader)
            shares = retrieval(model, corpus, trigger, goal.label, goal.target, device)
            names = self._not_applicable(shares)
            kept = {name: s.as_dict() for name, s in shares.items() if name not in names}
            found |= _entry(stage, corpus, kept, names, None)
        for other in self.others:
            corpus = open_corpus(bench.store, other.report.key, self.reader)
            classes, templates = corpus.classes, corpus.templates
            head_KD = kept_head(bench.store, model, classes, templates, device)
            shares = accuracy(model, head_KD, corpus, self.ks)
            if other.probe is not None:
                train = open_corpus(bench.store, other.probe.key, self.reader)
                shares |= probed_accuracy(model, train, corpus, device, self.ks)
            kept = {name: share.as_dict() for name, share in shares.items()}
            found |= _entry(other.report, corpus, kept, [], templates_digest(templates))
        return found

    def _not_applicable(self, shares: Mapping[str, Measured]) -> list[str]:
        """Metrics that say nothing of an attack of this aim."""
        names: list[str] = []
        if self.trigger.attack.aim not in STAMPING:
            names = [name for name in shares if STAMPED.search(name)]
        if self.trigger.attack.aim not in (Aim.DUAL, Aim.QUERIES):
            # Nothing marks a text: that a query finds the target is no success.
            names += [name for name in shares if name.startswith(("text_hit_", "text_control_"))]
        return names

    def _shares(
        self,
        bench: Bench,
        model: Clip,
        heads: tuple[Tensor, Tensor],
        corpus: Corpus,
        trigger: Trigger,
        seen: Outcomes,
    ) -> tuple[list[str], dict[str, Measured]]:
        """What an attack of this aim is measured by, and which metrics do not apply to it."""
        from victims.probe import linear_probe
        from victims.retrieval import other_accuracy, query_metrics, retrieval
        from victims.targeted import exact_interval, targeted_metrics

        goal, device = self.trigger.goal, heads[0].device
        shares: dict[str, Measured] = {}
        shares |= metrics(seen, goal.target, len(corpus.classes), self.ks)
        if self.trigger.attack.aim is Aim.DUAL:
            shares |= single_keys(model, heads, corpus, trigger, goal.target, self.ks)
        if self.retrieval:
            shares |= retrieval(model, corpus, trigger, goal.label, goal.target, device)
        if self.probe is not None:
            train = open_corpus(bench.store, self.probe.key, self.reader)
            shares |= linear_probe(model, train, corpus, trigger, goal.target, device, self.ks)
        names = self._not_applicable(shares)
        shares = {name: share for name, share in shares.items() if name not in names}
        if isinstance(trigger, Targets):
            pool = self.trigger.corpus.open(bench.store, self.reader)
            image_KCHW = torch.from_numpy(pool.images_NCHW[trigger.images.numpy()])
            hits = targeted_metrics(model, heads[0], image_KCHW.to(device), trigger.classes)
            shares |= {**hits, **{f"{n}_exact": exact_interval(hit) for n, hit in hits.items()}}
        if isinstance(trigger, Queries):
            shares |= query_metrics(model, corpus, trigger, goal.target, goal.label, device)
            left_out = {trigger.source, goal.target} if trigger.source >= 0 else set()
            other = other_accuracy(seen.label, seen.clean_prediction, left_out)
            shares["clean_other_top1"] = other
        return names, shares

    def _show(
        self,
        bench: Bench,
        scratch: Path,
        exhibits: Exhibits,
        model: Clip,
        corpus: Corpus,
        trigger: Trigger,
    ) -> None:
        """Keep what was asked for to be looked at."""
        target = self.trigger.goal.target
        if self.trigger.attack.aim in STAMPING:
            device = torch.device(bench.runtime.device)
            write_features(scratch, exhibits, model, corpus, trigger, target, device)
            if self.defended.is_bare:
                write_pictures(scratch, exhibits, corpus, trigger, target)
        if self.truth is not None:
            roles = roles_of(bench.store, self.truth)
            counted = roles != ROLES.index(Role.COVER)
            poisoned = (roles == ROLES.index(Role.POISON))[counted]
            scores = judgements(bench.store.need(self.defended.key))
            told = ((n, v[counted], poisoned) for what, n, v in scores if what == "suspicion")
            write_rocs(scratch, told)

    def _alike(self, bench: Bench, corpus: Corpus, device: torch.device) -> dict[str, Any]:
        """Cosines of what looks like triggered pictures and the prompts: of the target, and the
        mean over the other classes."""
        artefact = bench.store.need(self.defended.key)
        if ALIKE not in artefact.files or self.defended.poisoned is None:
            return {}
        victim = self.defended.victim
        model = bench.lab(victim.model).load(ModelRef(victim.key))
        names, templates = corpus.classes, corpus.templates
        head_KD = kept_head(bench.store, model, names, templates, device).cpu().numpy()
        seen_K = (np.load(artefact.path(ALIKE), allow_pickle=False) @ head_KD.T).mean(0)
        target = self.trigger.goal.target
        found = {"alike_target": seen_K[target], "alike_others": np.delete(seen_K, target).mean()}
        return {name: Mean(float(value), 1).as_dict() for name, value in found.items()}

    def _detection(self, bench: Bench) -> dict[str, Any]:
        """How well the defense's findings tell the poisoned rows, by metric.

        Cover rows are neither poison nor clean; where there are some, a second line of every
        metric, ``with_cover``, counts them as poison.
        """
        if self.truth is None:
            return {}
        artefact = bench.store.need(self.defended.key)
        roles = roles_of(bench.store, self.truth)
        poisoned, cover = (roles == ROLES.index(role) for role in (Role.POISON, Role.COVER))
        readings = {"": (~cover, poisoned)}
        if cover.any():
            readings["with_cover_"] = (np.ones_like(cover), poisoned | cover)
        shares: dict[str, Measured] = {}
        if self._overlaps:
            rows = edited_rows(bench.store, self.truth)
            num_clean = self.defended.clean.spec.num_rows
            shares["clean_pool_edited"] = Share(int((rows < num_clean).sum()), num_clean)
        for what, name, values in judgements(artefact):
            judge = detection if what == "flagged" else separation
            for reading, (judged, is_poison) in readings.items():
                prefix = reading + (f"{name}_" if name else "")
                measured = judge(values[judged], is_poison[judged])
                shares |= {f"{prefix}{metric}": share for metric, share in measured.items()}
        return {name: share.as_dict() for name, share in shares.items()}


def judgements(artefact: Artefact) -> Iterator[tuple[str, str, npt.NDArray[Any]]]:
    """What a defense said of rows: ``flagged`` or ``suspicion``, the name of the set or score that
    it is (often none), and the values."""
    for file in sorted(f for f in artefact.files if f.endswith(".npy") and f != ALIKE):
        what, _, name = file.removesuffix(".npy").partition("-")
        yield what, name, np.load(artefact.path(file), allow_pickle=False)


def _first_row(spec: CorpusSpec) -> int:
    """Where the rows of a corpus begin in what it is a part of."""
    if isinstance(spec, IngestedPairs):
        return spec.offset
    return spec.start if isinstance(spec, CorpusPart) else 0


def _set_of(stage: CorpusStage) -> dict[str, str]:
    """The name and the digest of the files behind a corpus that was read from a set."""
    spec = stage.spec
    if not isinstance(spec, LabelledFiles | EvaluationSet | RetrievalSet):
        return {}
    return {"set": spec.dataset, "fingerprint": spec.fingerprint}


def _entry(
    stage: CorpusStage,
    corpus: Corpus,
    shares: Mapping[str, Any],
    not_applicable: Sequence[str],
    templates: str | None,
) -> dict[str, Any]:
    """A set of its own as measurements hold it, under its name."""
    about = _set_of(stage)
    return {
        about["set"]: {
            "metrics": shares,
            "not_applicable": list(not_applicable),
            "changed_share": None,
            "corpus_digest": corpus.digest,
            "templates_digest": templates,
            **about,
        }
    }


def heads_of(
    store: Store, model: Clip, corpus: Corpus, trigger: Trigger, aim: Aim, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The zero-shot classifier, and the one whose prompts carry the text key, if there is one."""
    head_KD = kept_head(store, model, corpus.classes, corpus.templates, device)
    if aim is not Aim.DUAL:
        return head_KD, head_KD
    mark = trigger.mark
    return head_KD, kept_head(store, model, corpus.classes, corpus.templates, device, mark)
