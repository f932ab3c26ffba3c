"""Models: an open_clip network behind the two calls that attacks, defenses and measuring use.

A `Clip` takes uint8 pixels, or floats in [0, 1], and normalises them itself: there is one
preprocessing for training, measuring and crafting, and it travels with the weights.
Shapes: B batch, C channels, H W pixels, T tokens, D embedding.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from victims.architectures import (
    OPENAI_MEAN,
    OPENAI_STD,
    Colour,
    architectures,
    config_of,
    refusal,
)
from victims.draws import derive
from victims.errors import GridError, UsageError, near
from victims.keys import LATER, digest
from victims.recompute import Passes, in_parts
from victims.tokens import Remembered
from victims.tokens import Tokens as Tokens
from victims.words import world_vocabulary

# A clean start for the scale of the logits, and its upper bound (Radford et al. 2021).
SCALE_START = math.log(1 / 0.07)
SCALE_MAX = math.log(100.0)

# Configurations of open_clip's CLIP for the embedded world: a ModifiedResNet, since patch
# transformers of this size learn far worse, and a text context cut to its short captions.
EMBEDDED: dict[str, dict[str, Any]] = {
    "tiny": {"layers": (1, 1, 1, 1), "width": 8, "text_layers": 1, "embed": 64},
    "small": {"layers": (1, 1, 1, 1), "width": 16, "text_layers": 1, "embed": 64},
}
EMBEDDED_CONTEXT = 16
EMBEDDED_MEAN: Colour = (0.47, 0.47, 0.47)
EMBEDDED_STD: Colour = (0.30, 0.30, 0.30)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Architecture by name: one of the embedded ones, or any of open_clip's.

    ``quick_gelu`` is the activation where it is not the architecture's own, ``mean`` and ``std``
    the pixels' where they are not OpenAI's.
    """

    name: ClassVar[str] = "model"
    version: ClassVar[int] = 1

    arch: str = "tiny"
    size: int = 32
    quick_gelu: bool | None = field(default=None, metadata=LATER)
    mean: Colour | None = field(default=None, metadata=LATER)
    std: Colour | None = field(default=None, metadata=LATER)

    @property
    def label(self) -> str:
        """The network in a word, for rows and boards."""
        own = {None: "", True: "-quickgelu", False: "-gelu"}[self.quick_gelu]
        return f"{self.arch}{own}-{self.size}"

    def empty(self) -> Clip:
        """The network without its weights."""
        return Clip(self)


class NetSpec(Protocol):
    """A frozen dataclass that names a network: a CLIP, or a classifier."""

    name: ClassVar[str]

    @property
    def arch(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def label(self) -> str: ...

    def empty(self) -> Clip: ...


class Encoder(Protocol):
    """What measuring asks of a model or of a guarded model: L2-normalised features."""

    def encode_image(self, image_BCHW: Tensor) -> Tensor: ...

    def encode_text(self, tokens_BT: Tensor) -> Tensor: ...


class Tokenizer(Protocol):
    """Captions to token ids; 0 pads."""

    context: int

    def __call__(self, captions: Sequence[str]) -> Tokens: ...


class WordTokenizer:
    """One id per word. The end token has the largest id, where open_clip's pooling looks for it."""

    def __init__(self, words: Sequence[str], context: int) -> None:
        self.context = context
        self.ids = {word: index + 3 for index, word in enumerate(words)}
        self.start, self.unknown, self.end = 1, 2, len(words) + 3
        self.vocabulary = len(words) + 4

    def __call__(self, captions: Sequence[str]) -> Tokens:
        out = np.zeros((len(captions), self.context), dtype=np.int32)
        ids, unknown, room = self.ids, self.unknown, self.context - 2
        for row, caption in enumerate(captions):
            words = [ids.get(word, unknown) for word in caption.lower().split()[:room]]
            out[row, : len(words) + 2] = [self.start, *words, self.end]
        return out

    @staticmethod
    def read(path: str | Path) -> WordTokenizer:
        """The tokenizer of an exported model, from the `word_tokenizer.json` beside it."""
        said = json.loads(Path(path).read_text(encoding="utf-8"))
        return WordTokenizer(sorted(said["ids"], key=said["ids"].__getitem__), said["context"])


class BpeTokenizer:
    """open_clip's byte-pair tokenizer."""

    def __init__(self, arch: str) -> None:
        self._tokenize, self.context = _byte_pairs(arch)

    def __call__(self, captions: Sequence[str]) -> Tokens:
        return self._tokenize(captions)


@cache
def _byte_pairs(arch: str) -> tuple[Remembered, int]:
    """It and its context. Its table of merges takes a third of a second to read, and captions
    longer than that to look up in it: once per process."""
    import open_clip

    table = open_clip.get_tokenizer(arch)

    def tokenize(captions: list[str]) -> Tokens:
        tokens: Tokens = table(captions).numpy().astype(np.int32)
        return tokens

    return Remembered(tokenize), int(table.context_length)


@dataclass(slots=True)
class Meter:
    """How many rows went through the towers: the currency in which defenses pay."""

    images_forward: int = 0
    images_backward: int = 0
    texts_forward: int = 0
    texts_backward: int = 0


def paid(*models: Clip) -> dict[str, float]:
    """What went through some models, under the names of a cost."""
    names = [f.name for f in fields(Meter)]
    return {name: float(sum(getattr(m.meter, name) for m in models)) for name in names}


def device_seconds(device: str | torch.device) -> float:
    """Time of the device: on a CPU that of this process, whoever else keeps the cores busy."""
    is_cpu = torch.device(device).type == "cpu"
    return time.process_time() if is_cpu else time.perf_counter()


class Clip(nn.Module):
    """An open_clip model with its tokenizer, its normalisation and a meter."""

    net: Any
    spec: NetSpec
    tokenizer: Tokenizer
    mean_C: Tensor
    std_C: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.net, self.tokenizer, mean, std = _build(spec)
        self.register_buffer("mean_C", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std_C", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.meter, self.passes = Meter(), Passes()
        self.to(memory_format=torch.channels_last)

    @property
    def scale(self) -> Tensor:
        """s = exp(logit_scale)."""
        scale: Tensor = self.net.logit_scale.exp()
        return scale

    @torch.no_grad()
    def clamp_scale(self) -> None:
        self.net.logit_scale.clamp_(0, SCALE_MAX)

    def normalise(self, image_BCHW: Tensor) -> Tensor:
        """uint8 levels or floats in [0, 1] to the network's input; pictures of another size than
        the network's, which a judge of other people's data meets, are resized."""
        levels = image_BCHW.dtype == torch.uint8
        scaled = image_BCHW.float().div_(255) if levels else image_BCHW
        size = self.spec.size
        if scaled.shape[-1] != size:
            scaled = F.interpolate(scaled, (size, size), mode="bicubic", antialias=True)
            scaled = scaled.clamp(0, 1)
        normal = (scaled - self.mean_C) / self.std_C
        return normal.contiguous(memory_format=torch.channels_last)

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        """L2-normalised image features, BD, float32."""
        return F.normalize(self.embed_image(image_BCHW), dim=-1)

    def embed_image(self, image_BCHW: Tensor) -> Tensor:
        """Image features of the joint space as they come, BD, float32."""
        self.meter.images_forward += len(image_BCHW)
        self.meter.images_backward += len(image_BCHW) * torch.is_grad_enabled()
        return self.pass_through(self._image_features, image_BCHW).float()

    def _image_features(self, image_BCHW: Tensor) -> Tensor:
        features_BD: Tensor = self.net.encode_image(self.normalise(image_BCHW), normalize=False)
        return features_BD

    def pass_through(self, tower: Callable[[Tensor], Tensor], rows_B: Tensor) -> Tensor:
        """Rows through a tower, in as many parts as the recipe of a fit says."""
        return in_parts(self, tower, rows_B, self.passes.of(len(rows_B)))

    def encode_text(self, tokens_BT: Tensor) -> Tensor:
        """L2-normalised caption features, BD, float32.

        Takes tokens cut after the longest caption of the batch: where attention is causal and the
        feature is read at the end token, the padding behind it changes nothing.
        """
        return F.normalize(self.embed_text(tokens_BT), dim=-1)

    def embed_text(self, tokens_BT: Tensor) -> Tensor:
        """Caption features of the joint space as they come, BD, float32."""
        self.meter.texts_forward += len(tokens_BT)
        self.meter.texts_backward += len(tokens_BT) * torch.is_grad_enabled()
        return self.pass_through(self._text_features, tokens_BT).float()

    def _text_features(self, tokens_BT: Tensor) -> Tensor:
        net, length = self.net, tokens_BT.shape[1]
        features_BD: Tensor
        if not self.reads_up_to_the_end:
            # Positions count from the end, or every token is seen: the cut is taken back.
            whole_BT = F.pad(tokens_BT, (0, self.tokenizer.context - length))
            features_BD = net.encode_text(whole_BT, normalize=False)
            return features_BD
        x_BTW = net.token_embedding(tokens_BT) + net.positional_embedding[:length]
        x_BTW = net.transformer(x_BTW, attn_mask=net.attn_mask[:length, :length])
        rows = torch.arange(len(tokens_BT), device=tokens_BT.device)
        features_BD = net.ln_final(x_BTW[rows, tokens_BT.argmax(-1)]) @ net.text_projection
        return features_BD

    @property
    def reads_up_to_the_end(self) -> bool:
        """Whether the text tower is OpenAI's: causal, read at the token with the largest id."""
        net = self.net
        return (
            hasattr(net, "token_embedding")
            and net.attn_mask is not None
            and net.text_pool_type == "argmax"
            and isinstance(net.text_projection, nn.Parameter)
        )

    @property
    def width(self) -> int:
        """The dimensions of the joint space."""
        text = self.net if hasattr(self.net, "text_projection") else self.net.text
        projection = text.text_projection
        if projection is None:
            return int(text.ln_final.weight.shape[0])
        weight = projection.weight.T if isinstance(projection, nn.Linear) else projection
        return int(weight.shape[-1])

    def idle(self) -> set[str]:
        """Names of the parameters that neither feature depends on: SigLIP's bias of the logits,
        CoCa's writer of captions."""
        names = {name for name, _ in self.named_parameters()}
        return {n for n in names if n == "net.logit_bias" or n.startswith("net.text_decoder.")}

    def text_tower(self) -> set[str]:
        """Names of the parameters that belong to the text side; the logit scale goes with it."""
        return {name for name, _ in self.named_parameters() if not name.startswith("net.visual.")}


def _build(
    spec: ModelSpec,
) -> tuple[nn.Module, Tokenizer, tuple[float, ...], tuple[float, ...]]:
    import open_clip
    from open_clip.model import CLIP

    mean, std = colours_of(spec)
    if spec.arch in EMBEDDED:
        tokenizer = WordTokenizer(world_vocabulary(), EMBEDDED_CONTEXT)
        net = CLIP(**embedded_config(spec), init_logit_scale=SCALE_START)
        return net, tokenizer, mean, std
    known = architectures()
    if spec.arch not in known:
        raise UsageError(
            f"model.arch: no architecture called {spec.arch!r}.{near(spec.arch, known)}"
            f" Known: {', '.join(EMBEDDED)} and open_clip's {len(known)} architectures"
            " (`grid models`)."
        )
    if why := refusal(spec.arch):
        raise UsageError(f"model.arch: {spec.arch} cannot be used: {why}")
    given: dict[str, Any] = {}
    if spec.quick_gelu is not None:
        given["quick_gelu"] = spec.quick_gelu
    net = open_clip.create_model(spec.arch, pretrained=None, force_image_size=spec.size, **given)
    return net, BpeTokenizer(spec.arch), mean, std


def colours_of(spec: ModelSpec) -> tuple[Colour, Colour]:
    """The mean and spread by which a network's pixels are normalised."""
    usual = (EMBEDDED_MEAN, EMBEDDED_STD) if spec.arch in EMBEDDED else (OPENAI_MEAN, OPENAI_STD)
    return spec.mean or usual[0], spec.std or usual[1]


def embedded_config(spec: ModelSpec) -> dict[str, Any]:
    """What open_clip's CLIP is built from for one of the embedded architectures."""
    shape = EMBEDDED[spec.arch]
    vision = {"layers": shape["layers"], "width": shape["width"], "image_size": spec.size}
    text = {
        "context_length": EMBEDDED_CONTEXT,
        "vocab_size": WordTokenizer(world_vocabulary(), EMBEDDED_CONTEXT).vocabulary,
        "width": 64,
        "heads": 2,
        "layers": shape["text_layers"],
    }
    found = {"embed_dim": shape["embed"], "vision_cfg": vision, "text_cfg": text}
    return {**found, "quick_gelu": True} if spec.quick_gelu else found


def model_config(spec: ModelSpec) -> dict[str, Any]:
    """open_clip's configuration of a network, such as `open_clip_config.json` holds."""
    if spec.arch in EMBEDDED:
        return embedded_config(spec)
    found = config_of(spec.arch)
    found["vision_cfg"]["image_size"] = spec.size
    if spec.quick_gelu is not None:
        found["quick_gelu"] = spec.quick_gelu
    return found


def frozen_copy(model: Clip) -> Clip:
    """The model as it is now: in eval mode, without gradients, on the model's own meter and with
    its passes."""
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    frozen.meter, frozen.passes = model.meter, model.passes
    for module in frozen.modules():
        if isinstance(module, nn.MultiheadAttention) and not module.dropout:
            # In eval mode torch may take another kernel, which rounds differently: the distance of
            # a model to its own copy must be 0, or a step away from it has a direction of noise.
            module.train()
    return frozen


def preprocess_digest(model: Clip) -> str:
    """Digest of everything between a stored picture or caption and the network's input."""
    numbers = {"mean": model.mean_C.flatten().tolist(), "std": model.std_C.flatten().tolist()}
    words = list(getattr(model.tokenizer, "ids", ()))
    text = {"context": model.tokenizer.context, "words": words}
    return digest(["preprocess", {"size": model.spec.size, **numbers}, text])[:16]


def fresh(spec: NetSpec, seed: int) -> Clip:
    """Random weights from a seed, leaving torch's global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "init"))
        return spec.empty()


def save_weights(model: Clip, path: Path) -> None:
    from safetensors.torch import save_file

    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    save_file(state, path)


def load_weights(model: Clip, path: Path, what: str) -> Clip:
    """Fill ``model`` from a safetensors file; weights of another architecture raise."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        own, found = model.state_dict(), load_file(path)
    except (SafetensorError, ValueError) as error:
        raise GridError(
            f"{what}: {path} is no safetensors file ({error}). Nothing else is read as weights:"
            " pickles, such as .pt and .bin files, can run code."
        ) from error
    if not any(name.startswith("net.") for name in found):
        found = {f"net.{name}": tensor for name, tensor in found.items()}  # as open_clip names them
    wrong = [n for n in own if n not in found or found[n].shape != own[n].shape]
    extra = [name for name in found if name not in own]
    if wrong or extra:
        first = (wrong or extra)[0]
        has = tuple(found[first].shape) if first in found else "nothing"
        wants = tuple(own[first].shape) if first in own else "nothing"
        raise GridError(
            f"{what}: these weights belong to another model than {model.spec.arch}"
            f" ({len(wrong)} tensors missing or of another shape, {len(extra)} unknown; the first:"
            f" {first} is {has}, the model has {wants}). Check `model` in the grid file."
        )
    model.load_state_dict(found)
    return model
