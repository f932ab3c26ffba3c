"""Stages: the steps of a plan, each a frozen dataclass that knows its key and how to run.

CORPUS -> TRIGGER -> POISONED -> victim MODEL -> GATE, and -> DEFENDED -> MEASURE. A stage reads
its inputs from the store by key and leaves one artefact there; running it twice is harmless.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from attacks.base import (
    ROLES,
    Attack,
    Goal,
    Knowledge,
    Overlay,
    Role,
    poison,
    poisoned_key,
    poisoned_view,
    trigger_key,
)
from defenses.base import Case, Defended, Defense, Need, Recipes, Sizes, Truth, check_truth
from grid.step_costs import image_share
from victims.corpora import (
    Corpus,
    CorpusSpec,
    Edits,
    Reader,
    corpus_key,
    open_corpus,
    whole,
    write_corpus,
)
from victims.errors import GridError
from victims.ingested import IngestedPairs
from victims.keys import Key, content_key, digest, file_sha256
from victims.lab import DataRef, Lab, Ledger, ModelRef, Watch, memo, model_key, spec_meta
from victims.labels import plain
from victims.models import (
    ModelSpec,
    NetSpec,
    save_weights,
)
from victims.pretrained import Weights, load_pretrained, located
from victims.recipe import Recipe, Runtime
from victims.store import Store
from victims.triggers import Trigger
from victims.work import Work, fitted


@dataclass(slots=True)
class Bench:
    """What a stage runs on: the store, a runtime, a place for its log lines, and who watches."""

    store: Store
    runtime: Runtime
    report: Callable[[str], None]
    ledger: Ledger
    watch: Watch | None = None

    def lab(self, model: NetSpec) -> Lab:
        lab = Lab(self.store, model, self.runtime, self.report, self.watch)
        lab.ledger = self.ledger
        return lab

    def memo(self, key: Key, make: Callable[[Path], Mapping[str, Any]]) -> None:
        memo(self.store, key, make, collective=True, ledger=self.ledger)


class Stage(Protocol):
    """A step of the plan. ``kind`` chooses resources, ``family`` and ``work`` estimate seconds.

    Where a network computes, ``work`` is in thousands of its plain training steps of one sample.
    """

    @property
    def kind(self) -> str: ...

    @property
    def key(self) -> Key: ...

    @property
    def inputs(self) -> Sequence[Key]: ...

    @property
    def family(self) -> str: ...

    @property
    def work(self) -> float: ...

    def run(self, bench: Bench) -> None: ...


def thousands(work: Work, model: NetSpec) -> float:
    """Thousands of plain training steps of one sample that take as long."""
    share = image_share(model.arch, model.size) if isinstance(model, ModelSpec) else 1.0
    return work.steps(share) / 1000


@dataclass(frozen=True)
class CorpusStage:
    kind: ClassVar[str] = "corpus"
    spec: CorpusSpec

    @cached_property
    def key(self) -> Key:
        return corpus_key(self.spec)

    inputs: ClassVar[Sequence[Key]] = ()

    @property
    def family(self) -> str:
        # Pairs that were ingested are pointed to: that is no measure of what is drawn or decoded.
        return "pointer" if isinstance(self.spec, IngestedPairs) else "corpus"

    @property
    def work(self) -> float:
        return self.spec.num_rows / 1000

    def open(self, store: Store, reader: Reader) -> Corpus:
        """The corpus; ingested pairs where the plan has them, wherever others who share the store
        do."""
        root = self.spec.root if isinstance(self.spec, IngestedPairs) else ""
        return open_corpus(store, self.key, reader, root)

    def run(self, bench: Bench) -> None:
        def make(scratch: Path) -> dict[str, Any]:
            return write_corpus(scratch, self.spec)

        memo(bench.store, self.key, make, collective=False, ledger=bench.ledger)


@dataclass(frozen=True)
class ModelStage:
    """A plain fit on a corpus or on poisoned data: the reference, a victim, or a judge."""

    kind: ClassVar[str] = "model"
    model: NetSpec
    recipe: Recipe
    num_rows: int
    data: CorpusStage | PoisonStage
    init: ModelStage | FileModelStage | None

    @cached_property
    def key(self) -> Key:
        init = self.init.key if self.init else None
        objective = plain(self.model, self.recipe)
        return model_key(objective, self.recipe, self.data.key, init, self.model)

    @property
    def inputs(self) -> Sequence[Key]:
        own = [self.data.key, *([self.init.key] if self.init else [])]
        return [*own, *(self.data.inputs if isinstance(self.data, PoisonStage) else [])]

    @property
    def family(self) -> str:
        return "plain_clip" if isinstance(self.model, ModelSpec) else f"plain:{self.model.arch}"

    @property
    def work(self) -> float:
        return thousands(fitted(self.recipe, self.num_rows), self.model)

    def run(self, bench: Bench) -> None:
        lab = bench.lab(self.model)
        init = ModelRef(self.init.key) if self.init else None
        lab.train(lab.plain(self.recipe), data_ref(lab, self.data), self.recipe, init=init)


@dataclass(frozen=True)
class FileModelStage:
    """A CLIP's weights out of a file, known by its contents, wherever it lies."""

    kind: ClassVar[str] = "model"
    model: ModelSpec
    weights: Weights

    @cached_property
    def key(self) -> Key:
        return content_key("model", {"file": self.weights.sha256, "model": self.model})

    inputs: ClassVar[Sequence[Key]] = ()
    family: ClassVar[str] = "file_model"
    work: ClassVar[float] = 1.0

    def run(self, bench: Bench) -> None:
        def make(scratch: Path) -> dict[str, Any]:
            path = located(self.weights, self.model.arch)
            try:
                found = file_sha256(path)
            except OSError as error:
                raise GridError(f"{path}: cannot be read ({error.strerror})") from error
            if found != self.weights.sha256:
                raise GridError(f"{path} has changed since the grid file was read")
            model = load_pretrained(self.model.empty(), path)
            save_weights(model, scratch / "weights.safetensors")
            return {"model": spec_meta(self.model), "file": found, "cost": {}}

        memo(bench.store, self.key, make, collective=False, ledger=bench.ledger)


# A model that is trained on no suspect data: the public one, or a judge.
GuideStage = ModelStage | FileModelStage


@dataclass(frozen=True)
class TriggerStage:
    """A crafted trigger. ``surrogate`` is there for attacks that read the public model."""

    kind: ClassVar[str] = "trigger"
    attack: Attack
    goal: Goal
    seed: int
    corpus: CorpusStage
    model: NetSpec
    surrogate: GuideStage | None = None

    @cached_property
    def key(self) -> Key:
        model = self.model
        return trigger_key(
            *(self.attack, self.goal, self.seed, model.size, model.arch),
            inputs=list(self.inputs),
            classes=digest(list(self.corpus.spec.classes))[:16] if self._are_pairs else "",
        )

    @property
    def _are_pairs(self) -> bool:
        """Whether the poisoned pool itself knows no names of classes: they are those of the set
        that judges."""
        return isinstance(self.corpus.spec, IngestedPairs)

    @property
    def inputs(self) -> Sequence[Key]:
        return [self.corpus.key, *([self.surrogate.key] if self.surrogate else [])]

    @cached_property
    def crafting(self) -> Work | None:
        """What is crafted by a network like the victims'; None if by another one."""
        spec = self.corpus.spec
        return self.attack.costs(spec.num_rows, max(1, len(spec.classes)))

    @property
    def network(self) -> NetSpec | None:
        """What it is crafted by, if by a network that plans know."""
        if not self.crafting or self.crafting == Work():
            return None
        return self.surrogate.model if self.surrogate else self.model

    @property
    def family(self) -> str:
        return f"{'crafted' if self.network else 'trigger'}:{self.attack.name}"

    @property
    def work(self) -> float:
        if self.network is None or self.crafting is None:
            return 1.0
        return max(0.01, thousands(self.crafting, self.network))

    def held(self, store: Store) -> Knowledge:
        corpus = self.corpus.open(store, Reader.TRAINING)
        if self._are_pairs:
            corpus = replace(corpus, classes=list(self.corpus.spec.classes))
        surrogate = ModelRef(self.surrogate.key) if self.surrogate else None
        return Knowledge(corpus=corpus, goal=self.goal, seed=self.seed, surrogate=surrogate)

    def run(self, bench: Bench) -> None:
        def make(scratch: Path) -> dict[str, Any]:
            held = self.held(bench.store)
            trigger = self.attack.craft(bench.lab(self.model), held, self.model.size)
            return save_trigger(trigger, scratch)

        bench.memo(self.key, make)


def save_trigger(trigger: Trigger, folder: Path) -> dict[str, Any]:
    """A trigger's tensors as safetensors, its plain values as the artefact's meta."""
    from safetensors.torch import save_file

    fields = getattr(trigger, "__dataclass_fields__", None)
    if fields is None:
        raise TypeError(f"a trigger is a frozen dataclass, not a {type(trigger).__name__}")
    values = {name: getattr(trigger, name) for name in fields}
    tensors = {n: v.contiguous() for n, v in values.items() if isinstance(v, Tensor)}
    save_file(tensors, folder / "trigger.safetensors")
    return {"values": {n: v for n, v in values.items() if n not in tensors}}


def load_trigger(store: Store, key: str, attack: Attack) -> Trigger:
    """The trigger, as the class that its attack declares."""
    from safetensors.torch import load_file

    artefact = store.need(key)
    tensors = load_file(artefact.path("trigger.safetensors"))
    trigger: Trigger = attack.trigger(**artefact.meta["values"], **tensors)
    return trigger


@dataclass(frozen=True)
class PoisonStage:
    """Edits and, apart from them, the truth."""

    kind: ClassVar[str] = "poisoned"
    trigger: TriggerStage
    count: int
    num_rows: int

    @cached_property
    def key(self) -> Key:
        t = self.trigger
        return poisoned_key(t.attack, t.goal, self.count, t.seed, t.corpus.key, t.key)

    @cached_property
    def truth_key(self) -> Key:
        return content_key("truth", {}, [self.key])

    @property
    def inputs(self) -> Sequence[Key]:
        return [self.trigger.corpus.key, self.trigger.key]

    @property
    def family(self) -> str:
        return f"poisoned:{self.trigger.attack.name}"

    work: ClassVar[float] = 1.0

    def run(self, bench: Bench) -> None:
        import pyarrow as pa
        import pyarrow.feather as feather

        held = self.trigger.held(bench.store)
        crafted = load_trigger(bench.store, self.trigger.key, self.trigger.attack)
        held = replace(held, crafted=crafted)
        found = poison(self.trigger.attack, held, self.count)
        edits, poisoned = found.data.edits, found.of(Role.POISON)

        def write_truth(scratch: Path) -> dict[str, Any]:
            np.save(scratch / "roles.npy", found.truth())
            shown = held.corpus.labels[edits.images[poisoned]]
            return {
                "count": len(poisoned),
                "cover": len(found.of(Role.COVER)),
                "length": len(found.data),
                "changed": int((shown != self.trigger.goal.target).sum()),
            }

        def write_edits(scratch: Path) -> dict[str, Any]:
            captions = pa.array(edits.captions, pa.string())
            columns = {"row": edits.rows, "caption": captions, "image": edits.images}
            table = pa.table({**columns, "show": edits.shows})
            feather.write_feather(table, scratch / "edits.arrow", compression="uncompressed")
            np.save(scratch / "places.npy", found.data.places)
            np.save(scratch / "removed.npy", found.data.removed)
            return {}

        bench.memo(self.truth_key, write_truth)
        bench.memo(self.key, write_edits)


def data_ref(lab: Lab, data: CorpusStage | PoisonStage) -> DataRef:
    """A handle on training data; only the lab knows what is behind it."""
    import pyarrow.feather as feather

    if isinstance(data, CorpusStage):
        return lab.put(whole(data.open(lab.store, Reader.TRAINING)))
    corpus = data.trigger.corpus.open(lab.store, Reader.TRAINING)
    found = lab.store.need(data.key)
    table = feather.read_table(found.path("edits.arrow"))
    edits = Edits(
        rows=table["row"].to_numpy(),
        captions=table["caption"].to_pylist(),
        images=table["image"].to_numpy(),
        shows=table["show"].to_numpy(),
    )
    places, removed = (
        np.load(found.path(f"{name}.npy"), allow_pickle=False) for name in ("places", "removed")
    )
    overlay = Overlay(edits, len(corpus), places, removed)
    trigger = load_trigger(lab.store, data.trigger.key, data.trigger.attack)
    return lab.put(poisoned_view(data.key, corpus, overlay, trigger))


@dataclass(frozen=True)
class DefendStage:
    """One defense on one victim. Its key holds what the defense needs, and nothing else."""

    kind: ClassVar[str] = "defended"
    defense: Defense
    recipes: Recipes
    seed: int
    victim: ModelStage
    clean: CorpusStage
    suspect: CorpusStage
    reference: GuideStage | None
    # A CLIP that judges in the reference's place; an image classifier has no other.
    guide: GuideStage | None = None

    @property
    def repairs(self) -> bool:
        data = {Need.CLEAN_DATA, Need.SUSPECT_DATA}
        return Need.VICTIM in self.defense.needed() and bool(data & self.defense.needed())

    @property
    def is_bare(self) -> bool:
        """Whether it is the victim as it came."""
        return self.defense.needed() == {Need.VICTIM}

    @property
    def trains(self) -> bool:
        """Whether the recipes and the seed can matter: only then are they handed over and keyed."""
        return Need.START in self.defense.needed() or self.repairs

    @property
    def recipe(self) -> Recipe:
        """The recipe that counts: the victim's where a defense replaces the victim's training."""
        return self.recipes.victim if self.defense.replaces_training() else self.recipes.repair

    @property
    def poisoned(self) -> PoisonStage | None:
        return self.victim.data if isinstance(self.victim.data, PoisonStage) else None

    @cached_property
    def key(self) -> Key:
        params: dict[str, Any] = {"defense": self.defense}
        if self.trains:
            params |= {"model": self.victim.model, "seed": self.seed}
            if self.defense.fits_by_recipe():
                params["recipes"] = self.recipes
        if employed := self.defense.employs():
            params["employs"] = employed
        return content_key("defended", params, self.inputs)

    @property
    def inputs(self) -> Sequence[Key]:
        found = list[Key]()
        for parent in self.parents:
            found.append(parent.key)
            if isinstance(parent, PoisonStage):
                found.extend(parent.inputs)
        return found

    @cached_property
    def parents(self) -> list[Stage]:
        """The stages whose artefacts it reads."""
        needs, found = self.defense.needed(), list[Stage]()
        if Need.VICTIM in needs:
            found.append(self.victim)
        if Need.SUSPECT_DATA in needs:
            found.append(self.victim.data)
        if Need.CLEAN_DATA in needs:
            found.append(self.clean)
        found.extend(self.public_models)
        if Need.TRUTH in needs:
            found.append(self.suspect)
        return found

    @property
    def public_models(self) -> list[GuideStage]:
        """The models besides the victim that this defense is handed: its judge, the start."""
        needs, found = self.defense.needed(), dict[Key, GuideStage]()
        if Need.REFERENCE in needs and (judge := self.guide or self.reference):
            found[judge.key] = judge
        if Need.START in needs and self.reference:
            found[self.reference.key] = self.reference
        return list(found.values())

    @property
    def family(self) -> str:
        return f"defended:{self.defense.name}"

    @property
    def work(self) -> float:
        sizes = Sizes(
            clean=self.clean.spec.num_rows,
            suspect=self.victim.num_rows,
            classes=len(self.clean.spec.classes),
        )
        return max(0.01, thousands(self.defense.costs(self.recipes, sizes), self.victim.model))

    def case(self, lab: Lab) -> Case:
        grants: dict[Need, Callable[[], Any]] = {
            Need.VICTIM: lambda: ModelRef(self.victim.key),
            Need.SUSPECT_DATA: lambda: data_ref(lab, self.victim.data),
            Need.CLEAN_DATA: lambda: data_ref(lab, self.clean),
            Need.REFERENCE: self._reference,
            Need.START: lambda: ModelRef(self.reference.key) if self.reference else None,
            Need.TRUTH: lambda: self._truth(lab),
        }
        check_truth(self.defense)
        granted = {need: give for need, give in grants.items() if need in self.defense.needed()}
        recipes = self.recipes if self.defense.fits_by_recipe() else None
        training = (recipes, self.seed) if self.trains else None
        return Case(self.defense.name, granted, training)

    def _reference(self) -> ModelRef:
        judge = self.guide or self.reference
        assert judge is not None, "cells without a reference are not applicable"
        return ModelRef(judge.key)

    def _truth(self, lab: Lab) -> Truth:
        num_rows = self.victim.num_rows
        poisoned = np.zeros(num_rows, dtype=bool)
        if self.poisoned is not None:
            poisoned = roles_of(lab.store, self.poisoned) == ROLES.index(Role.POISON)
        return Truth(poisoned, DataRef(self.suspect.key, num_rows))

    def run(self, bench: Bench) -> None:
        def make(scratch: Path) -> dict[str, Any]:
            lab = bench.lab(self.victim.model)
            done = self.defense.apply(lab, self.case(lab))
            _save_judgement(done, scratch)
            device = bench.runtime.device
            return {
                "model_key": done.model.key,
                "cost": lab.ledger.total(),
                "device": device,
                "notes": {name: float(value) for name, value in done.notes.items()},
                "choices": list(lab.ledger.choices.values()),
            }

        bench.memo(self.key, make)


def roles_of(store: Store, data: PoisonStage) -> npt.NDArray[np.int8]:
    """The truth: the role at every position of the data, by its number."""
    path = store.need(data.truth_key).path("roles.npy")
    roles: npt.NDArray[np.int8] = np.load(path, allow_pickle=False)
    return roles


def edited_rows(store: Store, data: PoisonStage) -> npt.NDArray[np.int64]:
    """The rows of the corpus that poison edits."""
    import pyarrow.feather as feather

    table = feather.read_table(store.need(data.key).path("edits.arrow"))
    return np.asarray(table["row"].to_numpy(), dtype=np.int64)


def _save_judgement(done: Defended, folder: Path) -> None:
    if done.guard is not None:
        raise NotImplementedError("no defense of this version returns a guard")
    own = {"flagged": done.flagged, "suspicion": done.suspicion}
    found = {name: values for name, values in own.items() if values is not None}
    found |= {f"flagged-{name}": values for name, values in done.sets.items()}
    found |= {f"suspicion-{name}": values for name, values in done.scores.items()}
    for name, values in found.items():
        np.save(folder / f"{name}.npy", values)
    if done.triggered_alike is not None:
        np.save(folder / ALIKE, done.triggered_alike)


# The features of what a defense made to look like triggered pictures.
ALIKE = "alike.features.npy"
