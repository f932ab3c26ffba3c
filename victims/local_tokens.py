"""The part of a pair on which its match hangs: words of its caption, or patches of its picture.

Every word (or patch) is left out in turn; those whose absence costs the pair the most similarity
are its local tokens. A word of several tokens is one thing here, and start and end always stay.
Shapes: N rows, B batch, C channels, H W pixels, T tokens of a caption, P patches, L = P + 1 tokens
of a picture, W words or patches, D embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from victims.batches import caption_lengths, score_rows
from victims.corpora import View
from victims.errors import UsageError
from victims.models import Clip, Tokenizer
from victims.selection import ImageFeatures, TextFeatures


class TokenSide(StrEnum):
    """Where tokens are looked for; `none` takes the pair as a whole."""

    TEXT = "text"
    IMAGE = "image"
    NONE = "none"


def words_of_tokens(tokenizer: Tokenizer, captions: Sequence[str]) -> npt.NDArray[np.int64]:
    """The number of the word that each token belongs to, NT; -1 at start, end and padding.

    A word reaches as far as its caption's tokens do when the caption ends with it: true of every
    tokenizer that breaks at white space, and no matter how it cuts a word.
    """
    word_NT = np.full((len(captions), tokenizer.context), -1, dtype=np.int64)
    for row, caption in enumerate(captions):
        words = caption.split()
        heads = [" ".join(words[:count]) for count in range(len(words) + 1)]
        ends = caption_lengths(tokenizer(heads)) - 1
        for word, (begin, end) in enumerate(pairwise(ends)):
            word_NT[row, begin:end] = word
    return word_NT


def telling_word(
    tokenizer: Tokenizer, captions: Sequence[str], kept_UT: Tensor, rows: Sequence[int]
) -> tuple[str, float]:
    """The word for which what is kept of some rows stands out among all captions (term frequency
    times inverse document frequency), and the share of these rows that keep it.

    Of a word of several tokens the most telling one speaks; captions without a word have none.
    """
    all_NT = tokenizer(captions)
    documents, counts = np.zeros((2, int(all_NT.max()) + 1))
    for tokens_T in all_NT:
        documents[np.unique(tokens_T)] += 1
    names: dict[int, str] = {}
    words_UT = words_of_tokens(tokenizer, [captions[row] for row in rows])
    for row, word_T, kept_T in zip(rows, words_UT, kept_UT.cpu().numpy(), strict=True):
        words = captions[row].split()
        own = {int(t): words[w] for t, w in zip(all_NT[row], word_T, strict=True) if w >= 0}
        kept = sorted(own.keys() & set(kept_T.tolist()))
        counts[kept] += 1
        names |= {token: own[token] for token in kept if token not in names}
    if not names:
        return "", 0.0
    weight = counts * np.log(len(all_NT) / np.maximum(documents, 1))
    token = max(names, key=lambda token: (weight[token], counts[token]))
    return names[token], float(counts[token] / len(rows))


def leave_out(tokens_T: Tensor, gone_T: Tensor) -> Tensor:
    """The caption without some tokens, closed up and padded to its old width."""
    return F.pad(tokens_T[~gone_T], (0, int(gone_T.sum())))


def word_gains(model: Clip, image_D: Tensor, tokens_T: Tensor, word_T: Tensor) -> Tensor:
    """d_W: what each word adds to the similarity of its caption and a picture."""
    num_words = int(word_T.max()) + 1
    shorter = [leave_out(tokens_T, word_T == word) for word in range(num_words)]
    similar = model.encode_text(torch.stack([tokens_T, *shorter])) @ image_D
    return similar[0] - similar[1:]


def chosen(gain_W: Tensor, size_W: Sequence[int], mass: float, cap: float) -> list[bool]:
    """The smallest set of the largest gains that holds ``mass`` of all positive ones.

    It stops before it has more than ceil(cap L) of the L tokens or would take a gain that is not
    positive; the largest gain is always in it, whatever its size and sign.
    """
    # Not 4 of 30 tokens for 0.1 * 30 = 3.0000000000000004.
    room = math.ceil(cap * sum(size_W) - 1e-9)
    gains = gain_W.double().tolist()
    goal = mass * sum(gain for gain in gains if gain > 0)
    kept, used, reached = [False] * len(gains), 0, 0.0
    for word in sorted(range(len(gains)), key=lambda w: (-gains[w], w)):
        used += size_W[word]
        if any(kept) and (reached >= goal or gains[word] <= 0 or used > room):
            break
        kept[word] = True
        reached += gains[word]
    return kept


# --- patches of a picture


def num_patches(model: Clip) -> int:
    """How many patch tokens a picture has; a network without a class token raises."""
    visual = model.net.visual
    if not hasattr(visual, "class_embedding") or visual.attn_pool or visual.pool_type != "tok":
        raise UsageError(
            f"token_side: image needs a vision transformer that is read at its class token, and"
            f" {model.spec.arch} has no such patch tokens. Allowed for it: text, none."
        )
    return len(visual.positional_embedding) - 1


def encode_patches(model: Clip, image_BCHW: Tensor, kept_BP: Tensor) -> Tensor:
    """L2-normalised features of pictures of which some patches are not there, BD.

    No token attends to a missing patch, which for the class token is the same as its removal.
    """
    model.meter.images_forward += len(image_BCHW)
    model.meter.images_backward += len(image_BCHW) * torch.is_grad_enabled()

    def tower(row_B: Tensor) -> Tensor:
        return _patch_features(model, image_BCHW[row_B], kept_BP[row_B])

    row_B = torch.arange(len(image_BCHW), device=image_BCHW.device)
    return F.normalize(model.pass_through(tower, row_B).float(), dim=-1)


def _patch_features(model: Clip, image_BCHW: Tensor, kept_BP: Tensor) -> Tensor:
    visual = model.net.visual
    x_BPW = visual.conv1(model.normalise(image_BCHW)).flatten(2).transpose(1, 2)
    start_BW = visual.class_embedding.expand(len(x_BPW), 1, -1)
    x_BLW = visual.ln_pre(torch.cat([start_BW, x_BPW], dim=1) + visual.positional_embedding)
    missing_BL = F.pad(~kept_BP, (1, 0))
    bias_BL = torch.zeros_like(missing_BL, dtype=x_BLW.dtype).masked_fill(missing_BL, -math.inf)
    bias_BLL = bias_BL[:, None].expand(-1, bias_BL.shape[1], -1)
    heads = visual.transformer.resblocks[0].attn.num_heads
    x_BLW = visual.transformer(x_BLW, attn_mask=bias_BLL.repeat_interleave(heads, dim=0))
    features_BD: Tensor = visual.ln_post(x_BLW[:, 0]) @ visual.proj
    return features_BD


def patch_gains(model: Clip, image_CHW: Tensor, text_D: Tensor) -> Tensor:
    """d_P: what each patch adds to the similarity of its picture and a caption."""
    patches = num_patches(model)
    # In the first row nothing is left out, in row p + 1 patch p.
    kept_BP = torch.cat([torch.zeros(1, patches), torch.eye(patches)]).to(image_CHW.device) == 0
    similar = encode_patches(model, image_CHW.expand(patches + 1, -1, -1, -1), kept_BP) @ text_D
    return similar[0] - similar[1:]


# --- pairs with their local tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTokens:
    """Crafts what a fit needs to see pairs by their local tokens alone.

    ``image`` are the pictures, ``tokens`` the captions (on the side of the text without what is
    not local), ``share`` the part of its tokens that a pair keeps; on the side of the picture
    ``patches`` are the local ones, NP.
    """

    name: ClassVar[str] = "local_tokens"
    version: ClassVar[int] = 1

    side: TokenSide
    mass: float
    cap: float

    @torch.no_grad()
    def craft(self, model: Clip, view: View, *others: Clip) -> Mapping[str, Tensor]:
        device = model.mean_C.device
        image_NCHW = view.reader(device)(np.arange(len(view)))
        tokens_NT = torch.from_numpy(model.tokenizer(view.captions())).long().to(device)
        found = {"image": image_NCHW, "tokens": tokens_NT, "share": torch.ones(len(view))}
        if self.side == TokenSide.TEXT:
            word_NT = torch.from_numpy(words_of_tokens(model.tokenizer, view.captions())).to(device)
            image_ND = torch.from_numpy(score_rows(model, view, ImageFeatures())).to(device)
            rows = zip(image_ND, tokens_NT, word_NT, strict=True)
            gone_NT = torch.stack([self._gone(model, *row) for row in rows])
            pairs = zip(tokens_NT, gone_NT, strict=True)
            found["tokens"] = torch.stack([leave_out(*pair) for pair in pairs])
            length_N = (word_NT >= 0).sum(1).clamp(min=1)
            found["share"] = 1 - gone_NT.sum(1) / length_N
        elif self.side == TokenSide.IMAGE:
            text_ND = torch.from_numpy(score_rows(model, view, TextFeatures())).to(device)
            rows_P = []
            for image_CHW, text_D in zip(image_NCHW, text_ND, strict=True):
                gain_P = patch_gains(model, image_CHW, text_D)
                rows_P.append(chosen(gain_P, [1] * len(gain_P), self.mass, self.cap))
            found["patches"] = torch.tensor(rows_P)
            found["share"] = found["patches"].float().mean(1)
        return found

    def _gone(self, model: Clip, image_D: Tensor, tokens_T: Tensor, word_T: Tensor) -> Tensor:
        """Which tokens of a caption are words, and not local."""
        gain_W = word_gains(model, image_D, tokens_T, word_T)
        size_W = [int((word_T == word).sum()) for word in range(len(gain_W))]
        kept_W = chosen(gain_W, size_W, self.mass, self.cap)
        local = torch.tensor([word for word, kept in enumerate(kept_W) if kept])
        return (word_T >= 0) & ~torch.isin(word_T, local.to(word_T))
