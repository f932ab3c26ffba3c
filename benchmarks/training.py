"""Samples per second of our training loop, against open_clip_train's and against the limit.

All train the same open_clip model from the same weights on the same pairs of the embedded world,
batch 64, one process, one thread:

    ours     `Fit` with its checks, curve and schedule, on a corpus in a store
    theirs   open_clip_train's `train_one_epoch` on its `CsvDataset`: PNG files, open_clip's
             training transform and BPE tokenizer (ids looked up in a small table, so that the
             model stays the same), its optimizer groups, its DataLoader without workers
    lean     the same without the random crop and with our word tokenizer: equal pixels and tokens
    decoded  the same loop on normalised tensors in memory: what is left without decoding
    bare     forward, loss, backward and fused AdamW on staged batches, and nothing else

Ratios are of CPU seconds unless said otherwise, round by round; their medians are shown.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import logging
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import (
    Figure,
    Figures,
    Seconds,
    Work,
    interleaved,
    median,
    one_thread,
    ratio,
    timed,
)
from victims.batches import Loader
from victims.corpora import Corpus, Reader, build_corpus, corpus_key, open_corpus, whole
from victims.draws import numpy_rng
from victims.embedded import WorldCorpus
from victims.losses import clip_loss
from victims.models import Clip, ModelSpec, fresh
from victims.recipe import Recipe, Runtime
from victims.store import Store
from victims.training import Fit, PlainClip, optimizer_for
from victims.world import World

BATCH = 64
MODEL = ModelSpec(arch="tiny", size=32)
Tokenize = Callable[[Sequence[str]], Tensor]


class Pairs(NamedTuple):
    """Seconds of neighbouring epochs."""

    ours: list[Seconds]
    bare: list[Seconds]


@dataclass(frozen=True, slots=True)
class Arena:
    """The pairs, in our store and as files, and the recipe."""

    corpus: Corpus
    recipe: Recipe
    table: Path

    def ours(self) -> Work:
        model, view = fresh(MODEL, 0), whole(self.corpus)
        return lambda: Fit(model, view, PlainClip(), self.recipe, runtime=Runtime())()

    def bare(self) -> Work:
        """One epoch of the bare step, everything it reads made before."""
        model = fresh(MODEL, 0).train()
        optimizer = optimizer_for(model, PlainClip(), self.recipe)
        loader = Loader(whole(self.corpus), model, torch.device("cpu"))
        order = numpy_rng(0, "order", 0).permutation(len(self.corpus))
        positions = order[: len(order) // BATCH * BATCH].reshape(-1, BATCH)
        batches = [loader(rows) for rows in positions]
        staged = [(model.normalise(batch.image), batch.tokens) for batch in batches]

        def work() -> None:
            for normal_BCHW, tokens_BT in staged:
                image_BD = F.normalize(model.net.encode_image(normal_BCHW), dim=-1)
                loss = clip_loss(image_BD, model.encode_text(tokens_BT), model.scale)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()

        return work

    def paired(self) -> Pairs:
        """Epochs of ours, each with an epoch of the bare step right behind it.

        A few steps of one, then of the other: a machine that others use changes its speed by
        tens of percent within seconds, and the two differ by a few.
        """
        ours, bare, work = list[Seconds](), list[Seconds](), self.bare()
        model, view = fresh(MODEL, 0), whole(self.corpus)
        wall, cpu = 0.0, 0.0

        def after_epoch(_: object) -> None:
            nonlocal wall, cpu
            ours.append(Seconds(time.perf_counter() - wall, time.process_time() - cpu))
            bare.append(timed(work))
            wall, cpu = time.perf_counter(), time.process_time()

        fit = Fit(model, view, PlainClip(), self.recipe, runtime=Runtime(), on_epoch=after_epoch)
        fit()
        # The first epoch warms up, and began before there was a clock.
        return Pairs(ours[1:], bare[1:])

    def theirs(self) -> Work:
        return self._from_files(is_train=True, own_tokenizer=True)

    def lean(self) -> Work:
        return self._from_files(is_train=False, own_tokenizer=False)

    def _from_files(self, *, is_train: bool, own_tokenizer: bool) -> Work:
        import open_clip

        model, their_data = fresh(MODEL, 0), _their_data()
        tokenize = _table_of(self.corpus, model) if own_tokenizer else _words_of(model)
        mean, std = (tuple(t.flatten().tolist()) for t in (model.mean_C, model.std_C))
        transform = open_clip.image_transform(MODEL.size, is_train=is_train, mean=mean, std=std)
        options = _options(self.table)

        def load() -> Any:
            return their_data.get_data(options, (transform, transform), tokenizer=tokenize)

        return self._their_loop(model, load)

    def decoded(self) -> Work:
        from torch.utils.data import DataLoader, TensorDataset

        model, their_data = fresh(MODEL, 0), _their_data()
        images_NCHW = torch.from_numpy(np.array(self.corpus.images_NCHW))
        pairs = TensorDataset(
            model.normalise(images_NCHW).contiguous(), _words_of(model)(self.corpus.captions)
        )

        def load() -> Any:
            loader: Any = DataLoader(pairs, batch_size=BATCH, shuffle=True, drop_last=True)
            loader.num_samples, loader.num_batches = len(pairs), len(loader)
            return {"train": their_data.DataInfo(loader)}

        return self._their_loop(model, load)

    def _their_loop(self, model: Clip, load: Callable[[], Any]) -> Work:
        """Optimizer, schedule and epochs as open_clip_train's main sets them up."""
        import open_clip
        from open_clip_train.scheduler import cosine_lr
        from open_clip_train.train import train_one_epoch

        net = model.net.to(memory_format=torch.contiguous_format)
        net.output_dict = True
        recipe, options = self.recipe, _options(self.table)

        def work() -> None:
            plain = [p for n, p in net.named_parameters() if _undecayed(n, p)]
            decayed = [p for n, p in net.named_parameters() if not _undecayed(n, p)]
            optimizer = torch.optim.AdamW(
                [
                    {"params": plain, "weight_decay": 0.0},
                    {"params": decayed, "weight_decay": recipe.weight_decay},
                ],
                lr=recipe.rate,
                betas=(recipe.beta1, recipe.beta2),
                eps=recipe.eps,
            )
            data = load()
            steps = len(data["train"].dataloader) * recipe.epochs
            schedule = cosine_lr(optimizer, recipe.rate, recipe.warmup_steps, steps)
            loss = open_clip.ClipLoss()
            for epoch in range(recipe.epochs):
                train_one_epoch(net, data, loss, epoch, optimizer, None, schedule, None, options)

        return work


def _undecayed(name: str, parameter: Tensor) -> bool:
    parts = ("bn", "ln", "bias", "logit_scale")
    return parameter.ndim < 2 or any(part in name for part in parts)


def _options(table: Path) -> Namespace:
    """The command-line options that the loop and the CSV data set read."""
    return Namespace(
        **{"device": "cpu", "precision": "fp32", "batch_size": BATCH, "accum_freq": 1},
        **{"world_size": 1, "rank": 0, "local_rank": 0, "log_local": False, "workers": 0},
        **{"distributed": False, "distill": False, "horovod": False, "wandb": False},
        **{"skip_scheduler": False, "grad_clip_norm": None, "log_every_n_steps": 100},
        **{"dataset_type": "csv", "train_data": str(table), "val_data": None},
        **{"csv_img_key": "filepath", "csv_caption_key": "title", "csv_separator": "\t"},
        **{"imagenet_val": None, "imagenet_v2": None},
    )


def _words_of(model: Clip) -> Tokenize:
    return lambda captions: torch.from_numpy(model.tokenizer(captions)).long()


def _table_of(corpus: Corpus, model: Clip) -> Tokenize:
    """open_clip's tokenizer, its ids looked up in a table of the model's size."""
    import open_clip

    tokenizer = open_clip.SimpleTokenizer(context_length=model.tokenizer.context)
    used = sorted({i for caption in corpus.captions for i in tokenizer.encode(caption)})
    start, unknown, end = 1, 2, model.net.vocab_size - 1
    table_V = torch.full((tokenizer.vocab_size,), unknown)
    for index, token in enumerate(used[: end - 3]):
        table_V[token] = index + 3
    table_V[0], table_V[tokenizer.sot_token_id], table_V[tokenizer.eot_token_id] = 0, start, end
    return lambda captions: table_V[tokenizer(list(captions))]


def _their_data() -> Any:
    """The module `open_clip_train.data`.

    It imports the packages of its tar reader, which open_clip_torch does not install and a CSV
    does not need: empty modules stand in for them while it is imported.
    """
    try:
        return importlib.import_module("open_clip_train.data")
    except ModuleNotFoundError as error:
        if error.name not in ("braceexpand", "webdataset"):
            raise
    names = ("braceexpand", "webdataset", "webdataset.filters", "webdataset.tariterators")
    stand_ins: dict[str, Any] = {name: ModuleType(name) for name in names}
    stand_ins["webdataset"].PipelineStage = object
    stand_ins["webdataset.filters"]._shuffle = None
    for name in ("base_plus_ext", "url_opener", "tar_file_expander", "valid_sample"):
        setattr(stand_ins["webdataset.tariterators"], name, None)
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("open_clip_train.data")
    finally:
        for name in names:
            del sys.modules[name]


def write_files(corpus: Corpus, folder: Path) -> Path:
    """The pairs as PNG files and the table that open_clip_train reads."""
    from PIL import Image

    table = folder / "pairs.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(("filepath", "title"))
        for row, image_CHW in enumerate(corpus.images_NCHW):
            path = folder / f"{row:06d}.png"
            Image.fromarray(np.ascontiguousarray(image_CHW.transpose(1, 2, 0))).save(path)
            writer.writerow((path, corpus.captions[row]))
    return table


@contextlib.contextmanager
def arena(num_rows: int, epochs: int) -> Iterator[Arena]:
    """A corpus of ``num_rows`` in a store and as files, both gone afterwards."""
    recipe = Recipe(
        **{"epochs": epochs, "batch_size": BATCH, "lr": 5e-3, "text_lr_ratio": 0.2},  # type: ignore[arg-type]
        **{"warmup_steps": 20, "weight_decay": 0.05, "beta2": 0.98},  # type: ignore[arg-type]
    )
    spec = WorldCorpus(world=World(size=MODEL.size), split="suspect", num_rows=num_rows)
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(Path(scratch, "store"))
        build_corpus(store, spec)
        corpus = open_corpus(store, corpus_key(spec), Reader.TRAINING)
        folder = Path(scratch, "files")
        folder.mkdir()
        yield Arena(corpus, recipe, write_files(corpus, folder))


def main(
    *, quick: bool = False, num_rows: int = 1280, epochs: int = 4, rounds: int = 9, pairs: int = 100
) -> Figures:
    """Samples per second of each contender, and what ours is to the others."""
    if quick:
        epochs, rounds, pairs = 2, 3, 30
    names = ("ours", "theirs", "lean", "decoded")
    with one_thread(), _quietly():
        with arena(num_rows, epochs) as place:
            found = interleaved({name: getattr(place, name) for name in names}, rounds)
        with arena(min(num_rows, 512), pairs) as place:
            near = place.paired()
    samples = num_rows // BATCH * BATCH * epochs
    bare_samples = min(num_rows, 512) // BATCH * BATCH
    ours = found["ours"]
    against = {
        "open_clip_train": "theirs",
        "open_clip_train, equal pixels, our tokens": "lean",
        "open_clip_train, from tensors": "decoded",
    }
    figures = {
        **{f"{n} samples/s": Figure(value=samples / median(found[n]), unit="/s") for n in names},
        "bare samples/s": Figure(value=bare_samples / median(near.bare), unit="/s"),
        "ours samples/s, wall": Figure(value=samples / median(ours, "wall"), unit="/s"),
    }
    for words, name in against.items():
        aim = 2.2 if name == "theirs" else None
        value = ratio(found[name], ours)
        figures[f"ours / {words}"] = Figure(value=value, unit="x", at_least=aim)
    wall = ratio(found["theirs"], ours, "wall")
    figures["ours / open_clip_train, wall"] = Figure(value=wall, unit="x")
    figures["ours / bare step"] = Figure(value=ratio(near.bare, near.ours), unit="x", at_least=0.95)
    wall = ratio(near.bare, near.ours, "wall")
    figures["ours / bare step, wall"] = Figure(value=wall, unit="x")
    return figures


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Their loop logs every hundredth step, and their loader warns that it finds no GPU."""
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
