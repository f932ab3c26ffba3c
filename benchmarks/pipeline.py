"""Pictures and captions to batches: ours against open_clip_train's on the same files and core.

Made-up JPEG files of about 300 x 300 px with captions, as webdataset tars and as files in a CSV.

    webdataset  open_clip_train's tar pipeline: read, decode, its training transform, its tokenizer
    csv         its table of files, the same
    ours        an epoch of our loader, out of the memory-mapped pictures at the model's size
    ours, floats  the same with the normalisation, which a fit does on the device
    once        what we pay a single time: decode, resize and crop every picture, tokenise

Seconds are CPU seconds of one process on one thread, files in the page cache; the last figures read
pictures that are not, asked for ahead as the loader does, and page by page. Without the package
webdataset (in the extra `dev`) its lines are left out, and a line says so.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import tarfile
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.common import Figure, Figures, Work, interleaved, median, one_thread, ratio, timed
from benchmarks.training import _quietly, _their_data
from victims.batches import Loader
from victims.corpora import Corpus, whole
from victims.draws import numpy_rng
from victims.keys import Key, content_key
from victims.models import BpeTokenizer, Clip, ModelSpec, fresh
from victims.picture_files import fit, open_picture
from victims.pictures import Pictures

SIZE, BATCH, SHARDS = 224, 64, 4
ARCH = "RN50"
NORMAL = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}


def drawn(rng: np.random.Generator) -> Image.Image:
    """A picture that compresses about as a photograph does: soft shapes under some grain."""
    width, height = rng.integers(260, 361, 2).tolist()
    soft = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    image_HWC = np.asarray(soft.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain_HWC = rng.normal(0, 6, image_HWC.shape).astype(np.int16)
    return Image.fromarray(np.clip(image_HWC + grain_HWC, 0, 255).astype(np.uint8))


@dataclass(frozen=True)
class Files:
    """The same pairs as tars, as files with a table, and in our form."""

    folder: Path
    num_rows: int

    def write(self) -> None:
        rng, captions = numpy_rng(0, "pipeline"), self.captions
        self.pictures.mkdir()
        shards = [tarfile.open(self.folder / f"{n}.tar", "w") for n in range(SHARDS)]  # noqa: SIM115
        with (self.folder / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, delimiter="\t")
            table.writerow(("filepath", "title"))
            for row, caption in enumerate(captions):
                path = self.pictures / f"{row:06d}.jpg"
                drawn(rng).save(path, quality=90)
                table.writerow((path, caption))
                shard = shards[row % SHARDS]
                for name, body in ((path.name, path.read_bytes()), (f"{row:06d}.txt", caption)):
                    data = body.encode() if isinstance(body, str) else body
                    about = tarfile.TarInfo(name)
                    about.size = len(data)
                    shard.addfile(about, io.BytesIO(data))
        for shard in shards:
            shard.close()

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    @property
    def images(self) -> Path:
        return self.folder / "images.npy"

    @cached_property
    def captions(self) -> list[str]:
        return [f"a photo of the {row}th thing, taken from some way off" for row in self._rows]

    @property
    def _rows(self) -> range:
        return range(self.num_rows)

    def ingest(self) -> None:
        """Every picture at the model's size, once."""
        shape = (self.num_rows, 3, SIZE, SIZE)
        images_NCHW = np.lib.format.open_memmap(self.images, mode="w+", dtype=np.uint8, shape=shape)
        for row in self._rows:
            images_NCHW[row] = fit(open_picture(self.pictures / f"{row:06d}.jpg"), SIZE)
        images_NCHW.flush()

    @property
    def mapped(self) -> Any:
        return np.load(self.images, mmap_mode="r", allow_pickle=False)

    @property
    def corpus(self) -> Corpus:
        return Corpus(
            key=Key(content_key("corpus", ["pipeline", self.num_rows])),
            digest="",
            split="suspect",
            images_NCHW=self.mapped,
            captions=self.captions,
            labels=np.zeros(self.num_rows, dtype=np.int64),
            classes=["thing"],
            templates=["{}"],
        )


def _theirs(files: Files, kind: str) -> Work:
    """An epoch of open_clip_train's own data set of that kind."""
    import open_clip

    data = _their_data()
    train = str(
        files.folder / (f"{{0..{SHARDS - 1}}}.tar" if kind == "webdataset" else "pairs.csv")
    )
    options = Namespace(
        **{"dataset_type": kind, "train_data": train, "val_data": None, "batch_size": BATCH},
        **{"workers": 0, "world_size": 1, "distributed": False, "seed": 0},
        **{"train_num_samples": files.num_rows, "train_data_upsampling_factors": None},
        **{"dataset_resampled": False, "imagenet_val": None, "imagenet_v2": None},
        **{"csv_img_key": "filepath", "csv_caption_key": "title", "csv_separator": "\t"},
    )
    transform = open_clip.image_transform(SIZE, is_train=True, **NORMAL)
    tokenize = open_clip.get_tokenizer(ARCH)
    found = data.get_data(options, (transform, transform), tokenizer=tokenize)["train"]
    return lambda: _exhaust(found.dataloader, files.num_rows)


def _exhaust(batches: Any, num_rows: int) -> None:
    seen = sum(len(images) for images, _ in batches)
    if seen < num_rows // BATCH * BATCH:
        raise RuntimeError(f"{seen} of {num_rows} pairs came out of the pipeline")


def _model() -> Clip:
    model = fresh(ModelSpec(size=SIZE), 0)
    model.tokenizer = BpeTokenizer(ARCH)
    return model


def _ours(files: Files, *, floats: bool) -> Work:
    model = _model()
    loader = Loader(whole(files.corpus), model, torch.device("cpu"))
    order = numpy_rng(0, "order").permutation(files.num_rows)
    parts = [order[s : s + BATCH] for s in range(0, files.num_rows // BATCH * BATCH, BATCH)]

    def work() -> None:
        for part in parts:
            batch = loader(part)
            if floats:
                model.normalise(batch.image)

    return work


def _once(files: Files) -> Work:
    model = _model()

    def work() -> None:
        files.ingest()
        model.tokenizer(files.captions)

    return work


def cold_seconds(files: Files, *, ask: bool) -> float:
    """Wall seconds for half of the pictures, in any order, after the system was told to drop them.

    Where it does not, as on a disk in memory, both ways are equally fast.
    """
    order = numpy_rng(0, "cold").permutation(files.num_rows)[: files.num_rows // 2]
    with files.images.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    pictures = Pictures(files.mapped, np.arange(files.num_rows))
    started = time.perf_counter()
    for start in range(0, len(order), BATCH):
        if ask:
            pictures.ask(order[start : start + BATCH])
        pictures.read(order[start : start + BATCH])
    return time.perf_counter() - started


@contextmanager
def made_files(num_rows: int) -> Iterator[Files]:
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder), num_rows)
        files.write()
        files.ingest()
        yield files


def main(*, quick: bool = False, num_rows: int = 512, rounds: int = 5) -> Figures:
    """Samples per second of each pipeline, and what ours is to theirs."""
    if quick:
        num_rows, rounds = 128, 2
    has_tars = importlib.util.find_spec("webdataset") is not None
    theirs = [*(["webdataset"] if has_tars else []), "csv"]
    with one_thread(), _quietly(), made_files(num_rows) as files:
        contenders: dict[str, Callable[[], Work]] = {
            **{kind: lambda kind=kind: _theirs(files, kind) for kind in theirs},  # type: ignore[misc]
            "ours": lambda: _ours(files, floats=False),
            "ours, floats": lambda: _ours(files, floats=True),
        }
        found = interleaved(contenders, rounds)
        once = timed(_once(files)).cpu
        asked, plain = (
            sorted(cold_seconds(files, ask=ask) for _ in range(rounds))[rounds // 2]
            for ask in (True, False)
        )
    figures = {
        f"{name}: samples/s and core": Figure(value=num_rows / median(seconds), unit="/s")
        for name, seconds in found.items()
    }
    figures["once: samples/s and core"] = Figure(value=num_rows / once, unit="/s")
    if not has_tars:
        figures["webdataset: left out, it is not installed"] = Figure(value=0, unit="/s")
    for kind in theirs:
        times = ratio(found[kind], found["ours"])
        figures[f"ours / {kind}"] = Figure(value=times, unit="x", at_least=20.0)
        saved = median(found[kind]) - median(found["ours, floats"])
        figures[f"epochs that pay for once, by {kind}"] = Figure(value=once / saved, unit="epochs")
        times = ratio(found[kind], found["ours, floats"])
        figures[f"ours, floats / {kind}"] = Figure(value=times, unit="x")
    rows = num_rows // 2
    figures["cold pictures, asked for ahead"] = Figure(value=rows / asked, unit="/s")
    figures["cold pictures, page by page"] = Figure(value=rows / plain, unit="/s")
    return figures
