"""A small architecture under a name of open_clip's, for tests of what goes by such names."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from open_clip import factory

ARCH = "Tiny-Test-16"
VIT = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
CONFIG: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": VIT,
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let open_clip know it, with GELU and with QuickGELU."""
    monkeypatch.setitem(factory._MODEL_CONFIGS, ARCH, CONFIG)
    monkeypatch.setitem(factory._MODEL_CONFIGS, f"{ARCH}-quickgelu", CONFIG | {"quick_gelu": True})


def network(quick: bool, size: int = 16) -> Any:
    """open_clip's own network of that name, with the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        arch = f"{ARCH}-quickgelu" if quick else ARCH
        return open_clip.create_model(arch, force_image_size=size).eval()
