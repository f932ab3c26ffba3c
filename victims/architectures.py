"""What open_clip knows by name: architectures, and the weights that its registry has tags for.

A tag says more than where the weights lie: the activation that they were trained with and the mean
and spread of the pixels that they expect. Weights under another activation still give numbers, and
these are wrong, so both go with the weights and never with the name of the architecture alone.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from victims.errors import GridError

Colour = tuple[float, float, float]

OPENAI_MEAN: Colour = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD: Colour = (0.26862954, 0.26130258, 0.27577711)
# How pictures are made to a model's size, here always: bicubic, by the short side, the middle cut.
RESAMPLED: Final = ("bicubic", "shortest")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """Published weights of an architecture, as open_clip's registry describes them."""

    arch: str
    name: str
    quick_gelu: bool
    mean: Colour
    std: Colour
    interpolation: str = RESAMPLED[0]
    resize_mode: str = RESAMPLED[1]
    hub: str = ""
    url: str = ""
    entry: Mapping[str, Any] = field(default_factory=dict, repr=False)


def architectures() -> list[str]:
    """The names of open_clip's architectures."""
    import open_clip

    return list(open_clip.list_models())


def config_of(arch: str) -> dict[str, Any]:
    """An architecture's configuration, a copy."""
    from open_clip.factory import get_model_config

    found: dict[str, Any] = get_model_config(arch)
    return found


def has_quick_gelu(arch: str) -> bool:
    """Whether an architecture has OpenAI's activation, x sigmoid(1.702 x), by its own name."""
    return bool(config_of(arch).get("quick_gelu", False))


def refusal(arch: str) -> str | None:
    """Why an architecture cannot be a model here, if it cannot."""
    text = config_of(arch).get("text_cfg", {})
    if name := text.get("hf_model_name"):
        return f"its text tower is Hugging Face's {name}, which open_clip would download"
    if name := text.get("hf_tokenizer_name"):
        return f"its tokenizer is Hugging Face's {name}, which open_clip would download"
    return None


def keeps_activations(arch: str) -> str | None:
    """Why an architecture's pictures cannot be computed again, block by block, if they cannot."""
    if name := config_of(arch).get("vision_cfg", {}).get("timm_model_name"):
        return f"its image tower is timm's {name}, of whose blocks none can be computed again"
    return None


def tag_names(arch: str) -> list[str]:
    """The tags of an architecture."""
    from open_clip.pretrained import list_pretrained_tags_by_model

    return list(list_pretrained_tags_by_model(arch))


def tag_of(arch: str, name: str) -> Tag | None:
    """What the registry says of a tag; ``-`` and ``_`` are one there."""
    from open_clip.pretrained import get_pretrained_cfg

    entry: Mapping[str, Any] = get_pretrained_cfg(arch, name)
    if not entry:
        return None
    return Tag(
        arch=arch,
        name=name,
        quick_gelu=bool(entry.get("quick_gelu", False)),
        mean=_colour(entry.get("mean", OPENAI_MEAN)),
        std=_colour(entry.get("std", OPENAI_STD)),
        interpolation=str(entry.get("interpolation", RESAMPLED[0])),
        resize_mode=str(entry.get("resize_mode", RESAMPLED[1])),
        hub=str(entry.get("hf_hub", "")),
        url=str(entry.get("url", "")),
        entry=entry,
    )


def _colour(values: Any) -> Colour:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def agreed_colours(arch: str) -> tuple[Colour, Colour] | None:
    """The mean and the spread that all tags of an architecture have in common."""
    found = {(tag.mean, tag.std) for name in tag_names(arch) if (tag := tag_of(arch, name))}
    return next(iter(found)) if len(found) == 1 else None


def resampling_doubts(whose: str, interpolation: str, resize_mode: str) -> list[str]:
    """What to know of weights that were trained on pictures that were resized in another way."""
    wanted, here = (interpolation, resize_mode), RESAMPLED
    if wanted == here:
        return []
    other = [
        f"{there} ({own} here)" for there, own in zip(wanted, here, strict=True) if there != own
    ]
    return [
        f"model: {whose} want pictures that are resized otherwise: {', '.join(other)}. All pictures"
        " here are resized alike, so that their accuracy may be some points below what is published"
    ]


def cached(tag: Tag) -> Path | None:
    """The file of a tag, where open_clip would find it on this machine; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache

    if tag.hub:
        repo, names = _on_hub(tag.hub)
        for name in names:
            found = try_to_load_from_cache(repo, name)
            if isinstance(found, str):
                return Path(found)
    if tag.url:
        path = Path.home() / ".cache" / "clip" / tag.url.rpartition("/")[2]
        if path.is_file() and not is_torchscript(path):
            return path
    return None


def _on_hub(place: str) -> tuple[str, list[str]]:
    """The repository and the names that open_clip asks it for, in its order."""
    repo, _, name = place.rpartition("/")
    if not name:
        return repo, ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    stem, dot, kind = name.rpartition(".")
    return repo, [f"{stem}.safetensors", name] if dot and kind in ("bin", "pth") else [name]


def fetched(tag: Tag) -> Path:
    """The file of a tag: cached, or fetched by open_clip if there is a network."""
    if (found := cached(tag)) is not None:
        return found
    from open_clip.pretrained import download_pretrained

    try:
        _reach(tag)
        return Path(download_pretrained(dict(tag.entry)))
    except (OSError, RuntimeError, ValueError) as error:
        repo, names = _on_hub(tag.hub) if tag.hub else ("", [])
        place = f"{names[0]} of https://huggingface.co/{repo}" if names else tag.url
        command = f" (hf download {repo} {names[0]})" if names else ""
        raise GridError(
            f"the weights {tag.name!r} of {tag.arch} are not on this machine and cannot be fetched"
            f" ({_first_line(error)}). Where there is a network, download {place}{command}; then"
            " either copy that cache here (HF_HOME names it), or write the file's path in place of"
            " the tag, with quick_gelu:"
            f" {str(tag.quick_gelu).lower()}."
        ) from error


def _reach(tag: Tag) -> None:
    """Fail at once where the name of the server cannot even be looked up: the hub's client would
    try for most of a minute. Behind a proxy only the proxy can know."""
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "ALL_PROXY")):
        return
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co") if tag.hub else tag.url
    if host := urlsplit(address).hostname:
        socket.getaddrinfo(host, None)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def is_torchscript(path: Path) -> bool:
    """Whether a file is a program of torch.jit, such as the originals of OpenAI: no plain weights.

    An archive of tensors has its data beside ``data.pkl``; a program, its code and constants.
    """
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False
