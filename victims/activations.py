"""What a training step keeps of every row for its backward pass, in bytes: an estimate.

Counted is what autograd saves of one pass through both towers. Not counted are buffers of single
kernels, the gradients of activations and what the allocator loses, so that a step's peak is higher.
Of a fit with a `micro_batch` it holds for the rows of a part.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from victims.models import Clip
from victims.recipe import Precision
from victims.recompute import Passes, frozen_statistics


def kept_bytes(model: Clip, run: Callable[[], object]) -> int:
    """Bytes that autograd saves while ``run`` runs, the model's own weights and buffers apart."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # a storage that was freed would leave its number to another

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(kept.values())


def activation_bytes(model: Clip, precision: Precision, num_tokens: int, num_rows: int = 2) -> int:
    """Bytes per row that a plain step keeps, captions of so many tokens, on the model's device.

    The difference of two batches, the larger of twice ``num_rows``: what does not grow is left out.
    """
    device, size = model.mean_C.device, model.spec.size
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == Precision.BF16)
    passes, was_training = model.passes, model.training
    meter = model.meter
    model.passes, model.meter = Passes(), type(meter)()

    def of(rows: int) -> int:
        image_BCHW = torch.zeros((rows, 3, size, size), dtype=torch.uint8, device=device)
        tokens_BT = torch.ones((rows, num_tokens), dtype=torch.long, device=device)
        return kept_bytes(
            model, lambda: (model.embed_image(image_BCHW), model.embed_text(tokens_BT))
        )

    try:
        with frozen_statistics(model.train()), autocast, torch.enable_grad():
            return (of(2 * num_rows) - of(num_rows)) // num_rows
    finally:
        model.train(was_training)
        model.passes, model.meter = passes, meter
