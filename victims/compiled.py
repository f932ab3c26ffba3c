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
DETERMINISTIC: Final[dict[str, str | int | bool | Callable[..., Any]]] = {"deterministic": True}
KERNELS: Final = "TORCHINDUCTOR_CACHE_DIR"
Backend = str | Callable[..., Any]
COMPILED_KEEPS: Final = (
    "blocks of a compiled tower are not computed again; leave out `checkpoint_activations`, or"
    " `compile` and let `micro_batch` save the memory"
)


@functools.cache
def _compiled(cls: Any, backend: Backend) -> type[nn.Module]:
    """The class with a forward pass that is compiled where weights are trained."""
    plain = cls.forward
    options = dict(DETERMINISTIC) if backend == "inductor" else None
    graph = torch.compile(plain, dynamic=False, backend=backend, options=options)

    def forward(self: nn.Module, image_BCHW: Tensor) -> Tensor:
        trains = torch.is_grad_enabled() and self.training
        features_BD: Tensor = (graph if trains else plain)(self, image_BCHW)
        return features_BD

    return type(f"Compiled{cls.__name__}", (cls,), {"forward": forward})


@contextlib.contextmanager
def _kept_privately() -> Iterator[Path]:
    """Kernels are code: they lie where nobody else writes, unless the user says where.

    Torch names a folder of the common /tmp in the environment as soon as it is imported.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    before = os.environ.get(KERNELS)
    if before is not None and Path(before) != Path(default_cache_dir()):
        yield Path(before)
        return
    folder = Path.home() / ".backdoor-grid" / "compiled"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    os.environ[KERNELS] = str(folder)
    try:
        yield folder
    finally:
        del os.environ[KERNELS]
        if before is not None:
            os.environ[KERNELS] = before


@contextlib.contextmanager
def _told(began: Callable[[], None], ended: Callable[[], None]) -> Iterator[None]:
    """Somebody is told when torch begins to compile and when it has ended."""
    from torch._dynamo.callback import callback_handler as handler

    def start(*_: Any) -> None:
        began()

    def end(*_: Any) -> None:
        ended()

    handler.register_start_callback(start)
    handler.register_end_callback(end)
    try:
        yield
    finally:
        handler.remove_start_callback(start)
        handler.remove_end_callback(end)


def _nothing() -> None:
    return None


@contextlib.contextmanager
def compiled_tower(
    model: Clip,
    backend: Backend = "inductor",
    *,
    began: Callable[[], None] = _nothing,
    ended: Callable[[], None] = _nothing,
) -> Iterator[None]:
    """The model's image tower is compiled. Its class is exchanged, as `recomputing_blocks` does."""
    import torch._dynamo as dynamo  # slow to import
    from torch._inductor import list_options

    arch, tower = model.spec.arch, model.net.visual
    cls: Any = type(tower)
    if world_size() > 1 and any(isinstance(m, nn.BatchNorm2d) for m in tower.modules()):
        raise GridError(
            f"compile: the batch norms of {arch} speak with other workers, which no graph can"
            " hold. Train it on one worker, or leave `compile` out of the recipe."
        )
    if backend == "inductor" and not DETERMINISTIC.keys() <= set(list_options()):
        raise GridError(
            f"compile: torch {torch.__version__} chooses kernels by trying them out, and a resumed"
            " fit would end elsewhere. Install a newer torch, or leave `compile` out of the recipe."
        )
    limits = dict.fromkeys(("recompile_limit", "accumulated_recompile_limit"), GRAPHS)
    with contextlib.ExitStack() as around:
        folder = around.enter_context(_kept_privately())
        around.enter_context(_told(began, ended))
        around.enter_context(dynamo.config.patch({**limits, "fail_on_recompile_limit_hit": True}))
        tower.__class__ = _compiled(cls, backend)
        try:
            yield
        except (dynamo.exc.TorchDynamoException, dynamo.exc.FailOnRecompileLimitHit) as error:
            first = str(error).strip().partition("\n")[0]
            raise GridError(
                f"compile: torch could not compile the image tower of {arch}: {first}. It wants a"
                f" C++ compiler, Triton on a GPU, and what it keeps in {folder} whole: remove that"
                " after a crash. Leave `compile` out of the recipe to run the layers one by one."
            ) from error
        finally:
            tower.__class__ = cls
