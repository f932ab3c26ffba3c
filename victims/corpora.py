"""Corpora and views of them.

A *corpus* is a read-only, memory-mapped, digest-pinned set of pairs: uint8 pictures at the model's
input size, captions, class labels where there are any. A *view* is a corpus seen through a choice
of rows, poison edits, columns and alternative captions; nothing is ever copied on disk. Positions
count rows of a view, rows count rows of the corpus.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from victims.errors import Forbidden, GridError
from victims.keys import Key, content_key
from victims.pictures import Pictures
from victims.store import Artefact, Store

Rows = npt.NDArray[np.int64]


class Reader(StrEnum):
    """Who opens a corpus. The report split opens for reporting alone."""

    TRAINING = "training"
    TUNING = "tuning"
    REPORTING = "reporting"


MAY_OPEN = {
    Reader.TRAINING: {"public", "suspect", "clean"},
    Reader.TUNING: {"public", "suspect", "clean", "tuning"},
    Reader.REPORTING: {"public", "suspect", "clean", "tuning", "report", "shifted"},
}


@dataclass(frozen=True, slots=True)
class Corpus:
    """Pairs on disk. ``digest`` pins the bytes, ``split`` says who may open them."""

    key: Key
    digest: str
    split: str
    images_NCHW: npt.NDArray[np.uint8]
    captions: Sequence[str]
    labels: Rows
    classes: Sequence[str]
    templates: Sequence[str]

    def __len__(self) -> int:
        return len(self.images_NCHW)

    @property
    def size(self) -> int:
        return int(self.images_NCHW.shape[-1])

    @property
    def is_labelled(self) -> bool:
        """Whether a caption is the name of a class and nothing else."""
        return tuple(self.templates) == ("{}",) and set(self.captions) <= set(self.classes)


class Chunk(Protocol):
    """Some rendered or ingested pairs."""

    @property
    def image_BCHW(self) -> npt.NDArray[np.uint8]: ...

    @property
    def labels(self) -> Rows: ...

    @property
    def captions(self) -> Sequence[str]: ...


class CorpusSpec(Protocol):
    """A frozen dataclass that names a corpus and can make it."""

    @property
    def split(self) -> str: ...

    @property
    def num_rows(self) -> int: ...

    @property
    def classes(self) -> Sequence[str]: ...

    @property
    def templates(self) -> Sequence[str]: ...

    def chunks(self) -> Any:
        """Iterate over `Chunk`s."""


def corpus_key(spec: CorpusSpec) -> Key:
    return content_key("corpus", spec)


def build_corpus(store: Store, spec: CorpusSpec) -> Artefact:
    """Write the corpus into the store, chunk by chunk, unless it is there."""

    def make(scratch: Path) -> dict[str, Any]:
        return write_corpus(scratch, spec)

    return store.get_or_make(corpus_key(spec), make)


def write_corpus(folder: Path, spec: CorpusSpec) -> dict[str, Any]:
    """The files of a corpus artefact. Ingested pairs stay where they are, and are pointed to."""
    import pyarrow as pa
    import pyarrow.feather as feather

    from victims.ingested import IngestedPairs, write_pointer

    if isinstance(spec, IngestedPairs):
        return write_pointer(folder, spec)
    hashed = hashlib.sha256()
    captions: list[str] = []
    labels: list[Rows] = []
    # Written as a stream, mapped only when read: a mapped write to a full disk kills the process.
    with (folder / "images.npy").open("wb") as file:
        for chunk in spec.chunks():
            image_BCHW = np.ascontiguousarray(chunk.image_BCHW)
            if not captions:
                shape = (spec.num_rows, *image_BCHW.shape[1:])
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(image_BCHW.data)
            hashed.update(image_BCHW.data)
            captions.extend(chunk.captions)
            labels.append(np.asarray(chunk.labels, dtype=np.int64))
    if len(captions) != spec.num_rows or not captions:
        raise GridError(f"corpus {spec.split}: {len(captions)} of {spec.num_rows} rows were made")
    label_N = np.concatenate(labels)
    table = pa.table({"caption": pa.array(captions, pa.string()), "label": label_N})
    feather.write_feather(table, folder / "pairs.arrow", compression="uncompressed")
    hashed.update("\n".join(captions).encode())
    hashed.update(label_N.tobytes())
    return {
        "split": spec.split,
        "rows": spec.num_rows,
        "digest": hashed.hexdigest()[:16],
        "classes": list(spec.classes),
        "templates": list(spec.templates),
    }


def open_corpus(store: Store, key: str, reader: Reader, root: str = "") -> Corpus:
    """Map a corpus into memory. A split that ``reader`` may not see raises.

    ``root`` is where the pictures lie that the store only points to, as whoever asks has them.
    """
    artefact = store.need(key)
    if "split" not in artefact.meta:
        raise Forbidden(f"{key} holds no pictures: it is poisoned data, which the lab alone opens")
    split = str(artefact.meta["split"])
    if split not in MAY_OPEN[reader]:
        raise Forbidden(
            f"{reader} code asked for the {split} split ({key}); it may open"
            f" {', '.join(sorted(MAY_OPEN[reader]))}. Only measuring opens the report split."
        )
    if "pairs" in artefact.meta:
        from victims.ingested import open_pointer

        return open_pointer(artefact, root)
    import pyarrow.feather as feather

    table = feather.read_table(artefact.path("pairs.arrow"), memory_map=True)
    return Corpus(
        key=Key(key),
        digest=str(artefact.meta["digest"]),
        split=split,
        images_NCHW=np.load(artefact.path("images.npy"), mmap_mode="r", allow_pickle=False),
        captions=table["caption"].to_pylist(),
        labels=table["label"].to_numpy(),
        classes=list(artefact.meta["classes"]),
        templates=list(artefact.meta["templates"]),
    )


class Stamper(Protocol):
    """What measuring needs of a trigger: pictures in, stamped pictures out, uint8."""

    def stamp(self, image_BCHW: Tensor) -> Tensor: ...


Stamp = Callable[[Tensor], Tensor]


class Show(IntEnum):
    """How an edited row shows its picture."""

    PLAIN = 0
    STAMPED = 1
    COVER = 2


@dataclass(frozen=True, slots=True)
class Edits:
    """Poison as edits of rows, in rising order of their ids: captions, the corpus row whose
    picture is shown, and how. Ids beyond the corpus are pairs that were added."""

    rows: Rows
    captions: Sequence[str]
    images: Rows
    shows: npt.NDArray[np.int8]


class TextView(Protocol):
    """A frozen dataclass that rewrites all captions of a view, once per run or once per epoch."""

    @property
    def per_epoch(self) -> bool: ...

    def rewrite(self, captions: Sequence[str], epoch: int) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class View:
    """What a training run or a scorer reads."""

    key: Key
    corpus: Corpus
    rows: Rows
    edits: Edits | None = None
    stamps: Mapping[Show, Stamp] = field(default_factory=dict)
    columns: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    texts: Mapping[str, TextView] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def origin(self) -> Key:
        """Which rows of which corpus these are, whatever was edited or laid beside them."""
        return content_key(
            "origin", hashlib.sha256(self.rows.tobytes()).hexdigest(), [self.corpus.key]
        )

    def captions(self) -> list[str]:
        """The caption of every position, edits applied."""
        edited, captions = self._edited(), self.corpus.captions
        # Rows that were added have no caption of the corpus to fall back on.
        return [edited[row] if row in edited else captions[row] for row in self.rows.tolist()]

    def _edited(self) -> dict[int, str]:
        if self.edits is None:
            return {}
        return dict(zip(self.edits.rows.tolist(), self.edits.captions, strict=True))

    def pictures(self) -> Pictures:
        """The pictures by position, edits applied."""
        corpus, edits = self.corpus, self.edits
        if edits is None or not len(edits.rows):
            return Pictures(corpus.images_NCHW, self.rows)
        num_ids = max(len(corpus), int(edits.rows[-1]) + 1)
        image_N, show_N = np.arange(num_ids), np.zeros(num_ids, dtype=np.int8)
        image_N[edits.rows], show_N[edits.rows] = edits.images, edits.shows
        return Pictures(
            corpus.images_NCHW, image_N[self.rows], show_N[self.rows], self.stamps.items()
        )

    def reader(self, device: torch.device) -> Callable[[Rows], Tensor]:
        """A function from positions to uint8 pictures on the device, stamped where edited."""
        pictures = self.pictures()

        def read(positions: Rows) -> Tensor:
            pictures.ask(positions)
            return pictures.shown(positions, pictures.read(positions).to(device))

        return read


def whole(corpus: Corpus) -> View:
    """Every row of a corpus, as it is."""
    return View(corpus.key, corpus, np.arange(len(corpus), dtype=np.int64))


def subset(view: View, positions: Rows) -> View:
    """The named positions, in the order given. All of them in order is the view itself."""
    if np.array_equal(positions, np.arange(len(view))):
        return view
    if len(positions) and (positions.min() < 0 or positions.max() >= len(view)):
        raise GridError(f"subset: positions must lie in 0..{len(view) - 1}")
    key = content_key("subset", hashlib.sha256(positions.tobytes()).hexdigest(), [view.key])
    columns = {name: column[positions] for name, column in view.columns.items()}
    return replace(view, key=key, rows=view.rows[positions], columns=columns)


def annotate(view: View, columns: Mapping[str, npt.NDArray[Any]]) -> View:
    """The same pairs with per-row values, which objectives read from ``batch.columns``."""
    for name, column in columns.items():
        if len(column) != len(view):
            raise GridError(f"annotate: {name} has {len(column)} values for {len(view)} rows")
    digests = {
        name: [str(c.dtype), list(c.shape), hashlib.sha256(c.tobytes()).hexdigest()]
        for name, c in columns.items()
    }
    key = content_key("annotated", digests, [view.key])
    return replace(view, key=key, columns={**view.columns, **columns})


def with_text(view: View, texts: Mapping[str, TextView]) -> View:
    """The same pairs with alternative captions, which objectives read from ``batch.texts``."""
    key = content_key("texts", dict(texts), [view.key])
    return replace(view, key=key, texts={**view.texts, **texts})
