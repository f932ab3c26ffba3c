"""The image tower of a CLIP as compiled graphs: the same formulas in fewer and larger kernels.

Compiled are the passes of a fit that go back to the weights, which is nearly all that a fit costs.
Other passes of the model and those of its frozen copies run as ever, and so does the text tower,
whose captions are cut at another length in every batch: each would want a graph of its own.

A graph is made for one shape and for no range of shapes, and its kernels are not chosen by trying
them out, so that what a step computes depends on no step before it and a fit may be resumed. It
rounds differently from layers that run one by one, which is why a recipe says it and keys hold it.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from victims.distributed import world_size
from victims.errors import GridError
from victims.models import Clip

# Shapes, precisions and networks of one process: more than any has, so that none runs uncompiled.
GRAPHS: Final = 256
Backend = str | Callable[..., Any]
COMPILED_KEEPS: Final = (
    "blocks of a compiled tower are not computed again; leave out `checkpoint_activations`, or"
    " `compile` and let `micro_batch` save the memory"
)


@functools.cache
def _compiled(cls: Any, backend: Backend) -> type[nn.Module]:
    """The class with a forward pass that is compiled where weights are trained."""
    plain = cls.forward
    options: dict[str, str | int | bool | Callable[..., Any]] | None = None
    if backend == "inductor":
        options = {"deterministic": True}
    graph = torch.compile(plain, dynamic=False, backend=backend, options=options)

    def forward(self: nn.Module, image_BCHW: Tensor) -> Tensor:
        trains = torch.is_grad_enabled() and self.training
        features_BD: Tensor = (graph if trains else plain)(self, image_BCHW)
        return features_BD

    return type(f"Compiled{cls.__name__}", (cls,), {"forward": forward})


def _keep_privately() -> None:
    """Kernels are code: they lie where nobody else writes, and not in the common /tmp."""
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        folder = Path.home() / ".backdoor-grid" / "compiled"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


@contextlib.contextmanager
def compiled_tower(model: Clip, backend: Backend = "inductor") -> Iterator[None]:
    """The model's image tower is compiled. Its class is exchanged, as `recomputing_blocks` does."""
    import torch._dynamo as dynamo  # slow to import

    tower: nn.Module = model.net.visual
    cls: Any = type(tower)
    if world_size() > 1 and any(isinstance(m, nn.BatchNorm2d) for m in tower.modules()):
        raise GridError(
            f"compile: the batch norms of {model.spec.arch} speak with other workers, which no"
            " graph can hold. Train it on one worker, or leave `compile` out of the recipe."
        )
    _keep_privately()
    limits = dict.fromkeys(("recompile_limit", "accumulated_recompile_limit"), GRAPHS)
    tower.__class__ = _compiled(cls, backend)
    try:
        with dynamo.config.patch({**limits, "fail_on_recompile_limit_hit": True}):
            yield
    except dynamo.exc.TorchDynamoException as error:
        first = str(error).strip().partition("\n")[0]
        raise GridError(
            f"compile: torch could not compile the image tower of {model.spec.arch}: {first}."
            " It wants a C++ compiler, Triton on a GPU, and what it keeps in"
            f" {os.environ['TORCHINDUCTOR_CACHE_DIR']} whole: remove that after a crash. Leave"
            " `compile` out of the recipe to run the layers one by one."
        ) from error
    finally:
        tower.__class__ = cls
