"""Pictures and texts for attacks that stamp nothing: who gets which class, who shows what.

Shapes: B batch, M candidate pictures, K classes, D embedding, T tokens.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from victims.batches import caption_lengths
from victims.corpora import Corpus, Rows
from victims.draws import numpy_rng
from victims.errors import UsageError
from victims.measuring import text_head
from victims.models import (
    EMBEDDED,
    EMBEDDED_CONTEXT,
    BpeTokenizer,
    Clip,
    Tokenizer,
    WordTokenizer,
)
from victims.words import whole_words, world_vocabulary

# A picture must not get a class that the model has among its first ones for it.
TOP = 10
POOL = 16  # candidate pictures for each one that is wanted

# --- pictures and their wrong classes


class Pairs(NamedTuple):
    """Corpus rows of pictures, all different, and the class that each is to read as."""

    images: Rows
    classes: Rows


def check_pairs(who: str, count: int, at_least: int) -> None:
    """Raise unless there is something to draw."""
    if count < 1 or at_least < 1:
        raise UsageError(f"{who}: targets {count} and at_least {at_least} must be 1 or more")


def tried(count: int, num_rows: int) -> int:
    """Of how many pictures of a corpus so many are drawn."""
    return min(num_rows, max(1024, POOL * count))


def draw_pairs(
    who: str,
    model: Clip,
    corpus: Corpus,
    templates: Sequence[str],
    count: int,
    seed: int,
    rows_of: Callable[[str], Rows],
    at_least: int,
) -> Pairs:
    """``count`` pictures, each with a class that is wrong for it, spread evenly over classes.

    Wrong: not its label, not named by its caption, and not among the model's first min(10, K / 2)
    classes for it. Classes come up in keyed order, in turns; one sits out once no picture is left
    for it or once less than ``at_least`` captions (``rows_of`` its name) are left for each of its
    pictures.
    """
    check_pairs(who, count, at_least)
    rng = numpy_rng(seed, "targets")
    pool_M = rng.permutation(len(corpus))[: tried(count, len(corpus))]
    turns = deque(rng.permutation(len(corpus.classes)).tolist())
    allowed_MK = _unlikely(model, corpus, pool_M, templates)
    allowed_MK[np.arange(len(pool_M)), corpus.labels[pool_M]] &= corpus.labels[pool_M] < 0
    images, classes, used = list[int](), list[int](), Counter[int]()
    while turns and len(images) < count:
        turn = turns.popleft()
        named = rows_of(corpus.classes[turn])
        fits = np.flatnonzero(allowed_MK[:, turn] & ~np.isin(pool_M, named))
        if (used[turn] + 1) * at_least > len(named) or not len(fits):
            continue
        images.append(int(pool_M[fits[0]]))
        classes.append(turn)
        allowed_MK[fits[0]] = False
        used[turn] += 1
        turns.append(turn)
    if len(images) < count:
        raise UsageError(
            f"{who}: targets: {count} pictures are to get a wrong class that {at_least} captions"
            f" name, but only {len(images)} of the {len(pool_M)} pictures that were tried can. Ask"
            " for fewer targets or captions."
        )
    return Pairs(np.asarray(images, dtype=np.int64), np.asarray(classes, dtype=np.int64))


@torch.no_grad()
def _unlikely(
    model: Clip, corpus: Corpus, rows: Rows, templates: Sequence[str], batch_size: int = 256
) -> npt.NDArray[np.bool_]:
    """Per picture and class, MK: whether the model does not have it among its first ones."""
    device = model.mean_C.device
    head_KD = text_head(model, model.tokenizer, corpus.classes, templates, device)
    top = min(TOP, len(corpus.classes) // 2)
    parts = []
    for start in range(0, len(rows), batch_size):
        images_BCHW = corpus.images_NCHW[rows[start : start + batch_size]]
        score_BK = model.encode_image(torch.from_numpy(images_BCHW).to(device)) @ head_KD.T
        first_BT = score_BK.argsort(dim=1, descending=True, stable=True)[:, :top]
        parts.append(torch.ones_like(score_BK, dtype=torch.bool).scatter(1, first_BT, False).cpu())
    found: npt.NDArray[np.bool_] = torch.cat(parts).numpy()
    return found


def share_out(count: int, targets: int, who: str) -> int:
    """Rows of each target."""
    if count % targets:
        raise UsageError(f"{who}: {count} rows do not divide among {targets} targets")
    return count // targets


def deal(pictures: Rows, count: int, rng: np.random.Generator) -> Rows:
    """``count`` pictures in random order: each is used floor or ceil(count / pictures) times."""
    dealt: Rows = rng.permutation(np.resize(rng.permutation(pictures), count))
    return dealt


# --- captions


def says(caption: str, name: str, substring: bool) -> bool:
    """Whether a caption holds a name, in any case: as whole words, singular or regular plural, or
    anywhere."""
    if substring:
        return name.lower() in caption.lower()
    return whole_words(name).search(caption) is not None


_saying: tuple[Corpus, dict[tuple[str, bool], Rows]] | None = None


def rows_saying(corpus: Corpus, name: str, substring: bool) -> Rows:
    """Rows whose caption holds a name; the last corpus's are kept."""
    global _saying
    if _saying is None or _saying[0] is not corpus:
        _saying = corpus, {}
    found, asked = _saying[1], (name, substring)
    if asked not in found:
        first = name.split()[0].lower()  # a look that spares most captions the pattern
        texts = enumerate(corpus.captions)
        if corpus.is_labelled:
            hits = [row for row, text in texts if text == name]
        else:
            hits = [r for r, text in texts if first in text.lower() and says(text, name, substring)]
        found[asked] = np.asarray(hits, dtype=np.int64)
        found[asked].setflags(write=False)
    return found[asked]


@torch.no_grad()
def by_likeness(
    model: Clip, corpus: Corpus, rows: Rows, templates: Sequence[str], label: int
) -> Rows:
    """Rows by the likeness of their captions to the prompts of a class, most alike first; of equal
    captions the first row alone."""
    if not len(rows):
        return rows
    device = model.mean_C.device
    head_1D = text_head(model, model.tokenizer, [corpus.classes[label]], templates, device)
    captions = [corpus.captions[row] for row in rows.tolist()]
    feature_BD = text_head(model, model.tokenizer, captions, ["{}"], device)
    order = (feature_BD @ head_1D[0]).argsort(descending=True, stable=True).cpu().numpy()
    first: dict[str, int] = {}
    for row in rows[order].tolist():
        first.setdefault(corpus.captions[row], row)
    return np.asarray(list(first.values()), dtype=np.int64)


# --- captions that carry a key


@cache
def tokenizer_of(arch: str) -> Tokenizer:
    """The tokenizer of an architecture, without its network."""
    if arch in EMBEDDED:
        return WordTokenizer(world_vocabulary(), EMBEDDED_CONTEXT)
    return BpeTokenizer(arch)


def room_beside(key: str, arch: str) -> int:
    """Tokens that a context has for a caption beside a key, the start and the end token."""
    return tokenizer_of(arch).context - 2 - _lengths([key], arch)[0]


def with_key(caption: str, key: str, arch: str) -> str:
    """The caption, a space and the key. A caption too long for the tokenizer loses words of its
    own tail, so that the key keeps its place before the end token."""
    room = room_beside(key, arch)
    # A caption that fills the context, or overflows it, has more tokens than there is room for.
    if _lengths([caption], arch)[0] > room:
        words = caption.split()
        starts = [" ".join(words[:kept]) for kept in range(len(words))]
        lengths = _lengths(starts, arch)
        caption = [s for s, length in zip(starts, lengths, strict=True) if length <= room][-1]
    return f"{caption} {key}".strip()


def _lengths(captions: Sequence[str], arch: str) -> list[int]:
    """Tokens of each caption between the start and the end token, at most what the context has."""
    lengths: list[int] = (caption_lengths(tokenizer_of(arch)(captions)) - 2).tolist()
    return lengths
