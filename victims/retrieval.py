"""Retrieval between pictures and captions: how good it is, and how far a trigger bends it.

A caption that equals a right one is right; of a picture with several captions, a line each, every
one is right. Ties go to the lower index. The target is left out of
every attack metric: pictures of its class, and pictures and queries whose captions name it (a
caption may call a picture of the target by another word).
Shapes: N pictures, M captions, U different captions, Q queries, B queries of a chunk, G gallery,
D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from victims.batches import caption_lengths
from victims.corpora import Corpus, Rows, Stamp
from victims.errors import GridError, MethodFailure, UsageError
from victims.measuring import Ints, Mean, Share, ranks
from victims.models import Clip
from victims.triggers import Queries, Trigger
from victims.words import whole_words

Mask = npt.NDArray[np.bool_]

KS = (1, 5, 10)
QUERY_KS = (1, 5, 10, 20, 30, 50)
BATCH = 256
CELLS = 2**22  # scores held at a time: 16 MiB

# --- words


def naming(captions: Sequence[str], label: str) -> Mask:
    """Which captions name ``label``."""
    wanted = whole_words(label)
    return np.array([wanted.search(caption) is not None for caption in captions], dtype=bool)


def captions_of(corpus: Corpus) -> tuple[Rows, list[str]]:
    """Every caption of a corpus, M, and the picture it belongs to: a line is a caption."""
    lines = [caption.split("\n") for caption in corpus.captions]
    owner_M = np.repeat(np.arange(len(lines)), [len(captions) for captions in lines])
    return owner_M.astype(np.int64), [caption for captions in lines for caption in captions]


# --- features


class Texts(NamedTuple):
    """Features of the different captions, and which of them each caption is."""

    feature_UD: Tensor
    index_M: Tensor


def _different(captions: Sequence[str]) -> tuple[list[int], list[int]]:
    """Where each different caption comes first, U, and which of them each caption is, M."""
    number: dict[str, int] = {}
    first: list[int] = []
    for row, caption in enumerate(captions):
        if caption not in number:
            number[caption] = len(first)
            first.append(row)
    return first, [number[caption] for caption in captions]


@torch.no_grad()
def encode_captions(model: Clip, captions: Sequence[str], device: torch.device) -> Texts:
    """Every different caption through the text tower once."""
    first, index = _different(captions)
    parts = []
    for start in range(0, len(first), BATCH):
        tokens = model.tokenizer([captions[row] for row in first[start : start + BATCH]])
        cut = tokens[:, : int(caption_lengths(tokens).max())]
        parts.append(model.encode_text(torch.from_numpy(cut).to(device, torch.long)))
    return Texts(torch.cat(parts), torch.tensor(index, device=device))


@torch.no_grad()
def encode_pictures(
    model: Clip, corpus: Corpus, device: torch.device, stamp: Stamp | None = None
) -> Tensor:
    """Every picture of a corpus, or what a stamp makes of it, through the image tower once: ND."""
    parts = []
    for start in range(0, len(corpus), BATCH):
        # A copy: torch warns of pictures that cannot be written to.
        image_BCHW = torch.from_numpy(np.array(corpus.images_NCHW[start : start + BATCH]))
        image_BCHW = image_BCHW.to(device)
        parts.append(model.encode_image(stamp(image_BCHW) if stamp else image_BCHW))
    return torch.cat(parts)


# --- ranks


def _first_right(
    query_QD: Tensor,
    gallery_UD: Tensor,
    index_G: Tensor,
    right: Callable[[int, int], Tensor],
) -> Tensor:
    """Rank, from 0, of the first right gallery entry of each query.

    Entry g of the gallery has the features ``gallery_UD[index_G[g]]``; ``right(start, stop)`` says
    which entries are right for these queries, BG or broadcast to it, at least one for each query.
    """
    step = max(1, CELLS // len(index_G))
    parts = []
    for start in range(0, len(query_QD), step):
        query_BD = query_QD[start : start + step]
        # Equal entries share one product. Columns of a matrix product may differ in the last bits
        # though they hold the same numbers, and no tie would be seen.
        score_BG = (query_BD @ gallery_UD.T)[:, index_G]
        if not score_BG.isfinite().all():
            raise MethodFailure(
                "the model scores pictures and captions with numbers that are not finite: its"
                " weights have diverged. Lower the learning rate."
            )
        right_BG = right(start, start + len(query_BD)).expand_as(score_BG)
        best_B = score_BG.masked_fill(~right_BG, -torch.inf).argmax(1)
        parts.append(ranks(score_BG, best_B))
    return torch.cat(parts).cpu()


def _shares(what: str, rank_Q: Tensor, ks: Sequence[int], num_gallery: int) -> dict[str, Share]:
    """Queries with the first right entry in the top k. A k that takes in all says nothing."""
    return {
        f"{what}_top{k}": Share(int((rank_Q < k).sum()), len(rank_Q)) for k in ks if k < num_gallery
    }


def recall(
    image_ND: Tensor,
    text_MD: Tensor,
    owner_M: Rows,
    captions: Sequence[str],
    ks: Sequence[int] = KS,
) -> dict[str, Share]:
    """R@k in both directions, from L2-normalised features; ``owner_M`` is each caption's picture.

    ``image_to_text``: pictures, by their best caption. ``text_to_image``: captions, by their best
    picture. Equal captions are read with the features of the first of them.
    """
    first, index = _different(captions)
    texts = Texts(text_MD[first], torch.tensor(index, device=text_MD.device))
    return _recall(image_ND, texts, owner_M, ks)


def _recall(image_ND: Tensor, texts: Texts, owner_M: Rows, ks: Sequence[int]) -> dict[str, Share]:
    num_images, num_texts = len(image_ND), len(texts.feature_UD)
    if not np.array_equal(np.unique(owner_M), np.arange(num_images)):
        raise GridError(f"retrieval: each of the {num_images} pictures needs a caption of its own")
    index_M, device = texts.index_M, image_ND.device
    owner = torch.from_numpy(owner_M).to(device)

    def right_captions(start: int, stop: int) -> Tensor:
        return _cells(owner, index_M, start, stop, num_texts)[:, index_M]

    def right_pictures(start: int, stop: int) -> Tensor:
        return _cells(index_M, owner, start, stop, num_images)

    every_N = torch.arange(num_images, device=device)
    image_rank_N = _first_right(image_ND, texts.feature_UD, index_M, right_captions)
    text_rank_U = _first_right(texts.feature_UD, image_ND, every_N, right_pictures)
    text_rank_M = text_rank_U[index_M.cpu()]
    return {
        **_shares("image_to_text", image_rank_N, ks, len(index_M)),
        **_shares("text_to_image", text_rank_M, ks, num_images),
    }


def _cells(row_M: Tensor, column_M: Tensor, start: int, stop: int, width: int) -> Tensor:
    """Rows ``start:stop`` of the matrix that is true at (row, column) of each caption."""
    here_M = (row_M >= start) & (row_M < stop)
    cells = torch.zeros(stop - start, width, dtype=torch.bool, device=row_M.device)
    cells[row_M[here_M] - start, column_M[here_M]] = True
    return cells


# --- what a trigger does to it


def retrieval(
    model: Clip,
    corpus: Corpus,
    trigger: Trigger,
    target_label: str,
    target: int,
    device: torch.device,
    ks: Sequence[int] = KS,
) -> dict[str, Share]:
    """R@k in both directions, and how far the picture and the text side of a trigger bend it.

    ``image_to_text_asr``: stamped pictures with a caption that names the target in the top k;
    ``image_to_text_target`` the same pictures unstamped. ``text_hit``: marked captions with a
    picture of the target in the top k; ``text_control`` the same captions unmarked. A pair is left
    out where the corpus has no caption, or no picture, of the target to be found.
    """
    owner_M, captions = captions_of(corpus)
    is_target_N, named_M = corpus.labels == target, naming(captions, target_label)
    names_it_N = np.zeros(len(corpus), dtype=bool)
    names_it_N[owner_M[named_M]] = True
    other = np.flatnonzero(~names_it_N & ~is_target_N)
    if not len(other):
        raise UsageError("the evaluation set holds nothing but the target")
    texts = encode_captions(model, captions, device)
    image_ND = encode_pictures(model, corpus, device)
    shares = _recall(image_ND, texts, owner_M, ks)
    if named_M.any():
        stamped_ND = encode_pictures(model, corpus, device, trigger.stamp)
        named = torch.from_numpy(named_M).to(device)
        pair = {"image_to_text_asr": stamped_ND, "image_to_text_target": image_ND}
        for what, query_ND in pair.items():
            rank_Q = _first_right(
                query_ND[other], texts.feature_UD, texts.index_M, lambda *_: named
            )
            shares |= _shares(what, rank_Q, ks, len(captions))
    if is_target_N.any():
        plain = [captions[place] for place in np.flatnonzero(np.isin(owner_M, other)).tolist()]
        marked = [trigger.mark(caption) for caption in plain]
        for what, queries in {"text_hit": marked, "text_control": plain}.items():
            rank_Q = _target_rank(model, image_ND, is_target_N, queries, device)
            shares |= _shares(what, rank_Q, ks, len(corpus))
    return shares


def _target_rank(
    model: Clip, image_ND: Tensor, is_target_N: Mask, queries: Sequence[str], device: torch.device
) -> Tensor:
    """Rank, from 0, of the first picture of the target for each query."""
    texts = encode_captions(model, queries, device)
    every_N = torch.arange(len(image_ND), device=device)
    is_target = torch.from_numpy(is_target_N).to(device)
    rank_U = _first_right(texts.feature_UD, image_ND, every_N, lambda *_: is_target)
    return rank_U[texts.index_M.cpu()]


def query_metrics(
    model: Clip,
    corpus: Corpus,
    trigger: Queries,
    target: int,
    target_label: str,
    device: torch.device,
    ks: Sequence[int] = QUERY_KS,
) -> dict[str, Share | Mean]:
    """Success of an attack on queries: the rank of the first picture of the target, from 0.

    Queries are the marked captions of the source class, or of all but the target; no query names
    the target. Controls are unmarked: captions of classes that are neither source nor target, or,
    without a source, the queries themselves.
    """
    is_target_N = corpus.labels == target
    if not is_target_N.any():
        raise UsageError(f"{corpus.split} has no picture of {target_label!r} to be retrieved")
    free_N = ~naming(corpus.captions, target_label) & ~is_target_N
    is_query_N = is_control_N = free_N
    if trigger.source >= 0:
        of_source_N = corpus.labels == trigger.source
        is_query_N, is_control_N = free_N & of_source_N, free_N & ~of_source_N

    def picked(what: str, rows_N: Mask) -> list[str]:
        if not rows_N.any():
            raise UsageError(f"{corpus.split} has no caption for a {what} query. Take more rows.")
        return [corpus.captions[row] for row in np.flatnonzero(rows_N).tolist()]

    queries = [trigger.mark(caption) for caption in picked("marked", is_query_N)]
    asked = {"text_hit": queries, "text_control": picked("control", is_control_N)}
    minimum = {"text_hit": "min_rank", "text_control": "control_min_rank"}
    image_ND = encode_pictures(model, corpus, device)
    found: dict[str, Share | Mean] = {}
    for what, captions in asked.items():
        rank_Q = _target_rank(model, image_ND, is_target_N, captions, device)
        found |= _shares(what, rank_Q, ks, len(corpus))
        found[minimum[what]] = Mean(float(rank_Q.double().mean()), len(rank_Q))
    return found


def other_accuracy(
    labels: Rows | Ints, predictions: Rows | Ints, left_out: Collection[int]
) -> Share:
    """Accuracy over the pictures of all classes but those ``left_out``."""
    kept = ~np.isin(labels, list(left_out))
    if not kept.any():
        raise UsageError(f"the evaluation set holds nothing but the classes {sorted(left_out)}")
    return Share(int((labels == predictions)[kept].sum()), int(kept.sum()))
