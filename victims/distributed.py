"""The few collective operations of the training loop. On one process each is the identity.

Every rank runs the same code on its share of the global batch. Features are gathered with
gradient and every rank computes the loss of the whole batch; the backward pass of the gather sums
over ranks, and the mean that DistributedDataParallel takes over ranks then gives each parameter
exactly the gradient that one process would have computed.
"""

from __future__ import annotations

import inspect
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


# Rank 0 works alone for hours where nothing is trained; a rank that dies ends the group anyway.
PATIENCE = timedelta(days=30)
_patient: list[tuple[dist.ProcessGroup, dist.ProcessGroup]] = []


def _patient_group() -> dist.ProcessGroup:
    """All ranks on the CPU, where one waits for another as long as it takes; made once."""
    world = dist.distributed_c10d._get_default_group()
    if not _patient or _patient[0][0] is not world:
        made = dist.new_group(backend="gloo", timeout=PATIENCE)
        assert isinstance(made, dist.ProcessGroup), "every rank is a member"
        _patient[:] = [(world, made)]
    return _patient[0][1]


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier(_patient_group())


def agreed(value: int) -> int:
    """Rank 0's answer, on every rank."""
    if world_size() == 1:
        return value
    flag = torch.tensor([value])
    dist.broadcast(flag, src=0, group=_patient_group())
    return int(flag.item())


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local_BD: Tensor) -> Tensor:
        ctx.rows = len(local_BD)
        parts = [torch.empty_like(local_BD) for _ in range(world_size())]
        dist.all_gather(parts, local_BD.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # Summed in a copy: autograd may hand the same tensor to another branch of the graph.
        grad_BD = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad_BD)
        start = rank() * ctx.rows
        return grad_BD[start : start + ctx.rows]


def gather(local_BD: Tensor) -> Tensor:
    """The rows of every rank, in rank order, with gradient to each."""
    if world_size() == 1:
        return local_BD
    gathered: Tensor = _Gather.apply(local_BD)
    return gathered


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over the global batch, on any backend (torch's own wants a GPU)."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x_BCHW)
        # In float32 at least, under autocast too, as torch's own does.
        kind, channels = x_BCHW.dtype, x_BCHW.shape[1]
        x_BCHW = x_BCHW.to(torch.promote_types(kind, torch.float32))
        # From each rank's statistics, not from sums of squares: far from 0 those lose the variance.
        own = torch.cat(torch.var_mean(x_BCHW, (0, 2, 3), correction=0))
        variance_RC, mean_RC = gather(own[None]).chunk(2, dim=1)
        mean_C = mean_RC.mean(0)
        variance_C = (variance_RC + (mean_RC - mean_C).square()).mean(0)
        count = x_BCHW.numel() // channels * world_size()
        self._track(mean_C.detach(), variance_C.detach(), count)
        scale_C = torch.rsqrt(variance_C + self.eps)
        normal = (x_BCHW - mean_C[:, None, None]) * scale_C[:, None, None]
        scaled: Tensor = normal * self.weight[:, None, None] + self.bias[:, None, None]
        return scaled.to(kind)

    @torch.no_grad()
    def _track(self, mean_C: Tensor, variance_C: Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        momentum = self.momentum if self.momentum is not None else 0.1
        self.running_mean.lerp_(mean_C, momentum)
        self.running_var.lerp_(variance_C * count / (count - 1), momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)


def share_batch_norm(model: nn.Module) -> None:
    """Make every BatchNorm2d of the model normalise over all ranks, in place, names unchanged."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GlobalBatchNorm2d


def parallel(module: nn.Module) -> nn.Module:
    """The module with its gradients averaged over ranks; each rank keeps its own equal buffers."""
    wrap = nn.parallel.DistributedDataParallel
    # torch renamed the option, and warns about the old name.
    renamed = "forward_sync_buffers" in inspect.signature(wrap).parameters
    own: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    wrapped: nn.Module = wrap(module, find_unused_parameters=True, **own)
    return wrapped
