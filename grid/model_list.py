"""What the ``model`` of a grid file can name."""

from __future__ import annotations

from typing import Any

from victims.architectures import architectures, config_of, refusal, tag_names, tag_of
from victims.models import EMBEDDED


def listed_models() -> list[dict[str, Any]]:
    """The embedded architectures, then open_clip's with the tags of its registry, as JSON types."""
    embedded: list[dict[str, Any]] = [
        {
            "arch": name,
            "source": "embedded, of the embedded world",
            "image_size": None,
            "quick_gelu": False,
            "refused": None,
            "tags": [],
        }
        for name in EMBEDDED
    ]
    return [*embedded, *(_listed(name) for name in architectures())]


def _listed(arch: str) -> dict[str, Any]:
    config = config_of(arch)
    tags = [tag for name in tag_names(arch) if (tag := tag_of(arch, name))]
    return {
        "arch": arch,
        "source": "open_clip",
        "image_size": config["vision_cfg"].get("image_size", 224),
        "quick_gelu": bool(config.get("quick_gelu", False)),
        "refused": refusal(arch),
        "tags": [
            {
                "tag": tag.name,
                "quick_gelu": tag.quick_gelu,
                "mean": list(tag.mean),
                "std": list(tag.std),
            }
            for tag in tags
        ],
    }
