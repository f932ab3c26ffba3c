"""Less memory for the same gradients: activations are computed again instead of being kept.

A large contrastive batch needs the features of all its rows at once, but not their activations.
`in_parts` passes the rows through a tower part by part and keeps no more than the features; the
backward pass computes each part's activations again, one part at a time. `recomputing_blocks` does
the same for every block of a network, whose rows stay together.

What is computed again is computed as it was the first time: under the same autocast, with the same
draws of torch's generators, and without counting the rows into running statistics once more.
Shapes: B batch, D features.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from victims.distributed import world_size
from victims.errors import GridError


@dataclass(slots=True)
class Passes:
    """How a fit has the rows of a batch pass through the towers: in at most so many parts, none of
    fewer global rows than a batch's parts have. A model's frozen copies share its own."""

    parts: int = 1
    rows: int = 1

    def of(self, num_rows: int) -> int:
        """The number of parts of a pass of so many rows of this rank."""
        return max(1, min(self.parts, -(-num_rows * world_size() // self.rows), num_rows))


@contextlib.contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms normalise over the batch as ever, and track it in copies that are thrown away."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    own = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        # Not tracking at all would keep fewer tensors than at first, at which torch stumbles.
        copies = {n: b if b is None else b.clone() for n, b in norm._buffers.items()}
        norm._buffers.update(copies)
    try:
        yield
    finally:
        for norm, buffers in zip(norms, own, strict=True):
            norm._buffers.update(buffers)


def recomputed(module: nn.Module, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """``function`` of the inputs, by the layers of ``module``; keeps the inputs alone for the
    backward pass."""
    if not torch.is_grad_enabled():
        return function(*inputs)

    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), frozen_statistics(module)

    # torch's own recomputation would track each batch twice.
    found: Tensor = checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)
    return found


def in_parts(
    module: nn.Module, function: Callable[[Tensor], Tensor], rows_B: Tensor, parts: int
) -> Tensor:
    """``function`` of the rows, BD, part by part.

    Part p of P holds the rows p, p + P, p + 2P, ...: with the share of a rank divisible by P, the
    parts of all ranks together are the parts that one process would have made.
    """
    if parts == 1:
        return function(rows_B)
    found = [recomputed(module, function, rows_B[part::parts]) for part in range(parts)]
    row_B = torch.arange(len(rows_B))
    order_B = torch.cat([row_B[part::parts] for part in range(parts)]).argsort()
    return torch.cat(found)[order_B.to(rows_B.device)]


# --- block by block


@functools.cache
def _blocks() -> Mapping[type[nn.Module], str]:
    """What is computed again as a whole: classes of layers, and by which of their methods."""
    from open_clip.modified_resnet import Bottleneck, ModifiedResNet
    from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock

    from victims.classifiers import PreActBlock

    blocks = (Bottleneck, ResidualAttentionBlock, CustomResidualAttentionBlock, PreActBlock)
    return {**dict.fromkeys(blocks, "forward"), ModifiedResNet: "stem"}


def _recomputing(cls: type[nn.Module], method: str) -> type[nn.Module]:
    """The class with one method that keeps its inputs alone."""
    plain: Callable[..., Tensor] = getattr(cls, method)

    def again(self: nn.Module, *inputs: Any, **named: Any) -> Tensor:
        return recomputed(self, functools.partial(plain, self, **named), *inputs)

    return type(f"Recomputing{cls.__name__}", (cls,), {method: again})


@contextlib.contextmanager
def recomputing_blocks(model: nn.Module, arch: str) -> Iterator[None]:
    """The model's blocks keep their inputs alone, and compute the rest again when it is needed.

    Their class is exchanged, so that names, weights and copies of the model are what they are.
    """
    found = [(m, type(m)) for m in model.modules() if type(m) in _blocks()]
    if not found:
        known = ", ".join(cls.__name__ for cls in _blocks())
        raise GridError(
            f"checkpoint_activations: {arch} has none of the blocks that can be computed again"
            f" ({known}). Leave it out; `micro_batch` in a recipe saves memory in any network."
        )
    for module, cls in found:
        module.__class__ = _recomputing(cls, _blocks()[cls])
    try:
        yield
    finally:
        for module, cls in found:
            module.__class__ = cls
