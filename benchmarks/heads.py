"""Zero-shot heads of 1,000 classes and 80 templates: in batches, class by class, and found again.

Class by class is how published code builds them: 80 prompts at a time, uncut. A head that the
store holds costs a digest of the text tower and of the prompts, and the reading of a small file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Figure, Figures, interleaved, median, one_thread, ratio
from victims.heads import WORTH_KEEPING, kept_head
from victims.imagenet_names import imagenet_names
from victims.measuring import text_head
from victims.models import Clip, ModelSpec, fresh
from victims.prompts import IMAGENET80, prompt_templates
from victims.store import Store

CPU = torch.device("cpu")


@torch.no_grad()
def by_class(model: Clip, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """The head as published code builds it, KD."""
    rows = []
    for name in classes:
        tokens = torch.from_numpy(model.tokenizer([t.format(name) for t in templates])).long()
        rows.append(F.normalize(model.encode_text(tokens).mean(0), dim=-1))
    return torch.stack(rows)


def main(
    quick: bool = False, arch: str = "tiny", num_classes: int | None = None, rounds: int = 3
) -> Figures:
    classes = imagenet_names()[: num_classes or (100 if quick else 1000)]
    templates = prompt_templates(IMAGENET80)
    prompts = len(classes) * len(templates)
    if prompts < WORTH_KEEPING:
        raise ValueError(f"{prompts} prompts are too few to be kept")
    model = fresh(ModelSpec(arch=arch), 0).eval()
    with tempfile.TemporaryDirectory() as folder, one_thread():
        store = Store(folder)
        first = kept_head(store, model, classes, templates, CPU)
        if not torch.allclose(first, by_class(model, classes, templates), atol=1e-5):
            raise RuntimeError("the head in batches is not the one class by class")
        times = interleaved(
            {
                "batches": lambda: (
                    lambda: text_head(model, model.tokenizer, classes, templates, CPU)
                ),
                "by class": lambda: lambda: by_class(model, classes, templates),
                "kept": lambda: lambda: kept_head(store, model, classes, templates, CPU),
            },
            rounds,
        )
    return {
        "prompts": Figure(value=prompts, unit=""),
        "prompts in batches": Figure(value=prompts / median(times["batches"]), unit="/s"),
        "class by class / in batches": Figure(
            value=ratio(times["by class"], times["batches"]), unit="x", at_least=1.0
        ),
        "in batches / found in the store": Figure(
            value=ratio(times["batches"], times["kept"]), unit="x", at_least=10.0
        ),
        "found in the store": Figure(value=median(times["kept"]), unit="s"),
    }
