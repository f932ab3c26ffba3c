"""The workbench given to attacks and defenses: training and scoring, memoised by content.

A defense is straight-line code over these primitives; after a restart what was done is found by
its key and skipped. What a primitive hands back is a reference; weights and pictures stay in the
store until they are used, and a `DataRef` cannot be asked which of its rows are poisoned.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from victims import corpora
from victims.batches import Scorer, score_rows
from victims.checkpoints import save_moments
from victims.classifiers import ClassifierSpec
from victims.corpora import Reader, Rows, TextView, View
from victims.distributed import agreed, barrier, rank
from victims.draws import derive, numpy_rng
from victims.errors import GridError
from victims.keys import Key, content_key
from victims.labels import label_numbers, plain
from victims.models import (
    Clip,
    ModelSpec,
    NetSpec,
    device_seconds,
    fresh,
    load_weights,
    paid,
    save_weights,
)
from victims.recipe import OptimizerState, Recipe, Runtime, Select
from victims.selection import (
    Choice,
    ImageFeatures,
    RightLabel,
    TextFeatures,
    choose,
    retrieved,
)
from victims.store import Artefact, Busy, Damaged, Store
from victims.training import Fit, ObjectiveSpec


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A trained model by key."""

    key: Key


@dataclass(frozen=True, slots=True)
class DataRef:
    """Data by key: a handle with a length and nothing else."""

    key: Key
    num_rows: int

    def __len__(self) -> int:
        return self.num_rows


class TensorSpec(Protocol):
    """A frozen dataclass that crafts tensors by whatever private loop its paper needs.

    ``others`` are the models that `Lab.tensor` was given beside the first.
    """

    def craft(self, model: Clip, view: View, *others: Clip) -> Mapping[str, Tensor]: ...


class EditSpec(Protocol):
    """A frozen dataclass that changes a model's weights in place, without data and without a fit:
    what it sets to what is among its fields."""

    def edit(self, model: Clip) -> None: ...


@dataclass(slots=True)
class Ledger:
    """What the primitives used by one stage cost, whether they ran now or were found."""

    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)
    choices: dict[str, Choice] = field(default_factory=dict)

    def total(self) -> dict[str, float]:
        names = sorted({name for cost in self.costs.values() for name in cost})
        return {n: sum(cost.get(n, 0.0) for cost in self.costs.values()) for n in names}


def model_key(
    spec: ObjectiveSpec, recipe: Recipe, data: str, init: str | None, model: NetSpec
) -> Key:
    """Key of the model that `Lab.train` makes; known before anything runs."""
    start = {"init": init} if init else {"fresh": model}
    return content_key("model", {"objective": spec, "recipe": recipe, "start": start}, [data])


def spec_meta(spec: NetSpec) -> dict[str, Any]:
    """A network's name as an artefact keeps it beside the weights."""
    kind = {"kind": spec.name} if isinstance(spec, ClassifierSpec) else {}
    return {**kind, **asdict(spec)}  # type: ignore[call-overload]


def spec_of(meta: Mapping[str, Any]) -> NetSpec:
    fields = dict(meta)
    if fields.pop("kind", "model") == ClassifierSpec.name:
        return ClassifierSpec(**{**fields, "classes": tuple(fields["classes"])})
    for name in ("mean", "std"):
        if fields.get(name) is not None:
            fields[name] = tuple(fields[name])
    return ModelSpec(**fields)


class _Partial:
    """Mid-fit checkpoints of one key."""

    def __init__(self, store: Store, key: str) -> None:
        self.store, self.key = store, key

    def load(self) -> Path | None:
        return self.store.load_partial(self.key, "fit.safetensors")

    def save(self, write: Callable[[Path], None]) -> None:
        self.store.save_partial(self.key, "fit.safetensors", write)


# What may look at a model after every epoch of a fit, told which fit it is.
Watch = Callable[[Clip, str, Mapping[str, float]], None]


class Lab:
    """Primitives over a store. One lab serves one stage.

    ``watch`` looks at every model that `train` fits, after each of its epochs; it changes nothing.
    """

    def __init__(
        self,
        store: Store,
        model: NetSpec,
        runtime: Runtime,
        report: Callable[[str], None] = lambda line: None,
        watch: Watch | None = None,
    ) -> None:
        self.store, self.model, self.runtime, self.watch = store, model, runtime, watch
        self.ledger = Ledger()
        self.report = report
        self._views: dict[str, View] = {}

    # --- data

    def put(self, view: View) -> DataRef:
        """Take a view in hand; everyone else holds its reference."""
        self._views[view.key] = view
        return DataRef(view.key, len(view))

    def _view(self, ref: DataRef) -> View:
        if ref.key not in self._views:
            corpus = corpora.open_corpus(self.store, ref.key, Reader.TRAINING)
            self._views[ref.key] = corpora.whole(corpus)
        return self._views[ref.key]

    def captions(self, data: DataRef) -> list[str]:
        """The captions a defender can read, in row order."""
        return self._view(data).captions()

    def classes(self, data: DataRef) -> Sequence[str]:
        """The names of the classes, in the order of their numbers."""
        return self._view(data).corpus.classes

    def labels(self, data: DataRef) -> npt.NDArray[np.int64]:
        """The labels of a labelled set as they were given, in row order."""
        return np.asarray(label_numbers(self.captions(data), self.classes(data)), dtype=np.int64)

    def subset(self, data: DataRef, rows: Rows) -> DataRef:
        """The named rows only, in the order given. Keeping every row keeps the key."""
        named = np.asarray(rows)
        if named.size and not np.issubdtype(named.dtype, np.integer):
            raise GridError(
                f"subset: rows are given by number, got {named.dtype}; np.flatnonzero turns a mask"
                " into numbers"
            )
        return self.put(corpora.subset(self._view(data), named.astype(np.int64)))

    def annotate(self, data: DataRef, **columns: npt.NDArray[Any]) -> DataRef:
        """The same rows with per-row values, which objectives read from ``batch.columns``."""
        return self.put(corpora.annotate(self._view(data), columns))

    def with_text(self, data: DataRef, **texts: TextView) -> DataRef:
        """The same rows with alternative captions, which objectives read from ``batch.texts``."""
        return self.put(corpora.with_text(self._view(data), texts))

    # --- models

    def load(self, ref: ModelRef) -> Clip:
        """The weights, in eval mode on the device: of a victim, or of a CLIP that judges it."""
        artefact = self.store.need(ref.key)
        spec = spec_of(artefact.meta["model"])
        model = load_weights(spec.empty(), artefact.path("weights.safetensors"), ref.key)
        return model.to(self.runtime.device).eval()

    def _start(self, init: ModelRef) -> Clip:
        model = self.load(init)
        if model.spec != self.model:
            raise GridError(f"{init.key} is a {model.spec}, this grid's model is a {self.model}")
        return model

    def plain(self, recipe: Recipe) -> ObjectiveSpec:
        """The loss that this lab's kind of victim is trained with."""
        return plain(self.model, recipe)

    def train(
        self,
        spec: ObjectiveSpec,
        data: DataRef,
        recipe: Recipe,
        *,
        init: ModelRef | None = None,
        held_out: Rows | None = None,
        keep_optimizer: bool = False,
    ) -> ModelRef:
        """Fit ``spec`` on ``data``, from ``init`` or from random weights.

        A recipe with ``lr: select`` is fitted at every rate; the rows to choose by are drawn from
        ``held_out`` (None: all rows) and no fit sees them.
        """
        if isinstance(recipe.lr, Select):
            return self._selected(spec, data, recipe, recipe.lr, init, held_out, keep_optimizer)
        key = model_key(spec, recipe, data.key, init.key if init else None, self.model)

        def make(scratch: Path) -> dict[str, Any]:
            model = self._start(init) if init else fresh(self.model, recipe.seed)
            carried = None
            if recipe.optimizer_state == OptimizerState.CARRY:
                carried = self._carried(init)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive(recipe.seed, "objective"))
                objective = spec.build(model)
                fit = Fit(
                    model,
                    self._view(data),
                    objective,
                    recipe,
                    runtime=self.runtime,
                    checkpoints=_Partial(self.store, key),
                    optimizer_state=carried,
                    on_epoch=self._on_epoch(key, recipe, model),
                )
                done = fit()
            if rank() == 0:
                save_weights(model, scratch / "weights.safetensors")
                (scratch / "curves.json").write_text(json.dumps(done.curves))
                if keep_optimizer or self.runtime.keep_optimizer:
                    save_moments(fit.optimizer, scratch / "optimizer.safetensors")
            return {"model": spec_meta(self.model), "cost": done.cost}

        self._memo(key, make, collective=True)
        return ModelRef(key)

    def held_out(self, data: DataRef, recipe: Recipe, candidates: Rows | None = None) -> Rows:
        """The rows that `train` will choose a learning rate by: none where the recipe names it.

        Drawn by the rows themselves: everyone who trains on these pairs holds out the same ones.
        """
        if not isinstance(recipe.lr, Select):
            return np.zeros(0, dtype=np.int64)
        rows = np.arange(len(data)) if candidates is None else np.sort(candidates)
        count = recipe.lr.num_held_out(len(rows))
        if count < 2:
            raise GridError(f"lr: select: {len(rows)} rows are too few to hold some of them out")
        rng = numpy_rng(recipe.seed, "held_out", self._view(data).origin)
        return np.sort(rng.choice(rows, count, replace=False))

    def _selected(
        self,
        spec: ObjectiveSpec,
        data: DataRef,
        recipe: Recipe,
        how: Select,
        init: ModelRef | None,
        candidates: Rows | None,
        keep_optimizer: bool,
    ) -> ModelRef:
        """The fit at the largest rate that is within one standard error of the best."""
        held = self.held_out(data, recipe, candidates)
        pairs = self.subset(data, held)
        rest = self.subset(data, np.setdiff1d(np.arange(len(data)), held))
        fits = [
            self.train(spec, rest, replace(recipe, lr=r), init=init, keep_optimizer=keep_optimizer)
            for r in how.rates
        ]
        hits = [self._hits(pairs, fit) for fit in fits]
        key = content_key("selection", how, [pairs.key, *(fit.key for fit in fits)])

        def make(scratch: Path) -> dict[str, Any]:
            return {"choice": choose(how.rates, hits)}

        choice: Choice = self._memo(key, make, collective=True).meta["choice"]
        self.ledger.choices[key] = choice
        self.report(f"{key} lr {choice['chosen']:g} of {choice['rates']}: {choice['metric']}")
        return fits[how.rates.index(choice["chosen"])]

    def _hits(self, pairs: DataRef, fit: ModelRef) -> npt.NDArray[np.floating]:
        """What a learning rate is chosen by: retrieval, or the share of labels that are right."""
        if isinstance(self.model, ClassifierSpec):
            return self.score(RightLabel(), pairs, fit)
        image, text = (self.score(ask, pairs, fit) for ask in (ImageFeatures(), TextFeatures()))
        return retrieved(image, text, self.captions(pairs))

    def edit(self, spec: EditSpec, model: ModelRef) -> ModelRef:
        """A copy of a model with its weights changed by ``spec``, such as channels set to zero."""
        key = content_key("model", {"edit": spec}, [model.key])

        def make(scratch: Path) -> dict[str, Any]:
            edited = self._start(model)
            with torch.no_grad():
                spec.edit(edited)
            save_weights(edited, scratch / "weights.safetensors")
            return {"model": spec_meta(self.model), "cost": {}}

        self._memo(key, make)
        return ModelRef(key)

    def curves(self, ref: ModelRef) -> list[dict[str, float]]:
        """What a model's fit recorded, per epoch: loss terms, learning rate, what was watched."""
        text = self.store.need(ref.key).path("curves.json").read_text()
        records: list[dict[str, float]] = json.loads(text)
        return records

    def _carried(self, init: ModelRef | None) -> Path:
        if init is None or "optimizer.safetensors" not in self.store.need(init.key).files:
            raise GridError(
                "optimizer_state: carry needs the optimizer state of the initial weights, which was"
                " not stored. Put `keep_optimizer: true` under `runtime` in the grid file and train"
                " the victims again into a new --store."
            )
        return self.store.need(init.key).path("optimizer.safetensors")

    def _on_epoch(
        self, key: str, recipe: Recipe, model: Clip
    ) -> Callable[[Mapping[str, float]], None]:
        def told(record: Mapping[str, float]) -> None:
            shown = " ".join(f"{n}={v:.4g}" for n, v in record.items() if n != "epoch")
            self.report(f"{key} epoch {int(record['epoch']) + 1}/{recipe.epochs} {shown}")
            if self.watch is not None:
                modes = [(module, module.training) for module in model.modules()]
                with torch.no_grad():
                    self.watch(model.eval(), key, record)
                for module, training in modes:
                    module.training = training

        return told

    # --- scores and tensors

    def score(self, scorer: Scorer, data: DataRef, model: ModelRef) -> npt.NDArray[np.float32]:
        """``scorer`` on every row of ``data``, in row order."""
        key = content_key("score", scorer, [data.key, model.key])

        def make(scratch: Path) -> dict[str, Any]:
            loaded = self.load(model)
            started = device_seconds(self.runtime.device)
            np.save(scratch / "values.npy", score_rows(loaded, self._view(data), scorer))
            seconds = device_seconds(self.runtime.device) - started
            return {"cost": {"train_seconds": seconds, **paid(loaded)}}

        path = self._memo(key, make).path("values.npy")
        values: npt.NDArray[np.float32] = np.load(path, allow_pickle=False)
        return values

    def tensor(
        self, spec: TensorSpec, data: DataRef, model: ModelRef, *others: ModelRef
    ) -> dict[str, Tensor]:
        """Any other crafted artefact: a patch, a mask, the output of a generator."""
        from safetensors.torch import load_file, save_file

        key = content_key("tensor", spec, [data.key, model.key, *(ref.key for ref in others)])

        def make(scratch: Path) -> dict[str, Any]:
            models = [self.load(ref) for ref in (model, *others)]
            started = device_seconds(self.runtime.device)
            crafted = spec.craft(models[0], self._view(data), *models[1:])
            seconds = device_seconds(self.runtime.device) - started
            # Copies: views of one memory are an error in a file.
            tensors = {n: t.detach().cpu().contiguous().clone() for n, t in crafted.items()}
            save_file(tensors, scratch / "tensors.safetensors")
            return {"cost": {"train_seconds": seconds, **paid(*models)}}

        tensors: dict[str, Tensor] = load_file(self._memo(key, make).path("tensors.safetensors"))
        return tensors

    def _memo(
        self, key: Key, make: Callable[[Path], Mapping[str, Any]], *, collective: bool = False
    ) -> Artefact:
        artefact = memo(self.store, key, make, collective=collective, ledger=self.ledger)
        self.ledger.costs[key] = dict(artefact.meta.get("cost", {}))
        return artefact


def memo(
    store: Store,
    key: Key,
    make: Callable[[Path], Mapping[str, Any]],
    *,
    collective: bool,
    ledger: Ledger,
) -> Artefact:
    """The artefact, made at most once: by rank 0, and by all ranks together if ``collective``.

    Whether to make it, and that nobody else is making it, is rank 0's finding; all ranks follow.
    """
    with contextlib.ExitStack() as held:
        state = agreed(_look(store, key, held) if rank() == 0 else 0)
        if state == _BUSY:
            raise Busy(key)
        if state == _OURS:
            if rank() == 0:
                store.make(key, make)
                ledger.made.append(key)
                store.drop_partial(key)
            elif collective:
                with tempfile.TemporaryDirectory() as elsewhere:
                    make(Path(elsewhere))
            barrier()
    return store.need(key)


_FOUND, _OURS, _BUSY = 1, 2, 3


def _look(store: Store, key: Key, held: contextlib.ExitStack) -> int:
    with contextlib.suppress(Damaged):
        if store.get(key) is not None:
            return _FOUND
    try:
        held.enter_context(store.claim(key))
    except Busy:
        return _BUSY
    return _FOUND if store.made_meanwhile(key) else _OURS
