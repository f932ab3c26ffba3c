"""Zero-shot classifiers that are kept: prompts go through a text tower once, whoever asks.

A defense that leaves the text tower alone has its victim's classifier, and so have all cells over
one frozen tower. ImageNet's takes 80,000 prompts, longer than all of its pictures.
Shapes: K classes, D embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from victims.keys import Key, content_key
from victims.measuring import text_head
from victims.models import Clip, preprocess_digest
from victims.store import Busy, Store

# Fewer prompts are read again sooner than found.
WORTH_KEEPING: Final = 2048
_FILE: Final = "head.safetensors"


def text_digest(model: Clip) -> str:
    """Digest of all weights that a caption's features depend on."""
    hashed = hashlib.sha256()
    weights = dict(model.named_parameters())
    for name in sorted(model.text_tower()):
        if name == "net.logit_scale":  # scores are compared, not scaled
            continue
        tensor = weights[name].detach().cpu().contiguous()
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hashed.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def head_key(
    model: Clip,
    classes: Sequence[str],
    templates: Sequence[str],
    mark: Callable[[str], str] = str,
) -> Key:
    """The text tower, how it reads text, and every prompt in its order."""
    prompts = hashlib.sha256()
    for name in classes:
        for template in templates:
            prompts.update(mark(template.format(name)).encode("utf-8", "surrogateescape") + b"\0")
    params = {
        # The architecture and all that shapes its towers, the activation above all: weights are
        # the same under another one, and what they make of a prompt is not.
        "model": model.spec,
        "text": text_digest(model),
        "reads": preprocess_digest(model),
        "prompts": prompts.hexdigest(),
        "shape": [len(classes), len(templates)],
    }
    return content_key("head", params)


def kept_head(
    store: Store,
    model: Clip,
    classes: Sequence[str],
    templates: Sequence[str],
    device: torch.device,
    mark: Callable[[str], str] = str,
) -> Tensor:
    """As `text_head`, KD, from the store where it holds the same; large ones are put there."""
    from safetensors.torch import load_file, save_file

    def encode() -> Tensor:
        return text_head(model, model.tokenizer, classes, templates, device, mark=mark)

    if len(classes) * len(templates) < WORTH_KEEPING:
        return encode()

    def make(scratch: Path) -> dict[str, Any]:
        save_file({"head": encode().cpu().contiguous()}, scratch / _FILE)
        return {"classes": len(classes), "templates": len(templates)}

    try:
        artefact = store.get_or_make(head_key(model, classes, templates, mark), make)
    except Busy:  # another process is at it, and may take as long as we would
        return encode()
    return load_file(artefact.path(_FILE))["head"].to(device)
