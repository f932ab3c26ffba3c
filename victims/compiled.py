"""The image tower of a CLIP as compiled graphs: the same formulas in fewer and larger kernels.

Compiled are the passes of a fit that go back to the weights, which is nearly all that a fit costs.
Other passes of the model and those of its frozen copies run as ever, and so does the text tower,
whose captions are cut at another length in every batch: each would want a graph of its own.

A graph is made for one shape and for no range of shapes, and its kernels are not chosen by trying
them out, so that what a step computes depends on no step before it and a fit may be resumed. It
rounds differently from uncompiled layers, which is why a recipe says it and keys hold it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from victims.errors import GridError
from victims.models import Clip

# Shapes times precisions times whether batch norms count: far more than any objective has.
GRAPHS = 32


def _compiled(cls: type[nn.Module], backend: str) -> type[nn.Module]:
    """The class with a forward pass that is compiled where weights are to be trained."""
    plain = cls.forward
    options = {"deterministic": True} if backend == "inductor" else None
    graph = torch.compile(plain, dynamic=False, backend=backend, options=options)

    def forward(self: nn.Module, image_BCHW: Tensor) -> Tensor:
        trains = torch.is_grad_enabled() and self.training
        features_BD: Tensor = (graph if trains else plain)(self, image_BCHW)
        return features_BD

    return type(f"Compiled{cls.__name__}", (cls,), {"forward": forward})


@contextlib.contextmanager
def compiled_tower(model: Clip, backend: str = "inductor") -> Iterator[None]:
    """The model's image tower is compiled, by exchange of its class as `recomputing_blocks` does."""
    import torch._dynamo as dynamo
    from torch._dynamo.exc import TorchDynamoException

    tower: nn.Module = model.net.visual
    cls = type(tower)
    # Rather an end than layers that are compiled or not by how many graphs there were before.
    limits = {"recompile_limit": GRAPHS, "fail_on_recompile_limit_hit": True}
    tower.__class__ = _compiled(cls, backend)
    try:
        with dynamo.config.patch(limits):
            yield
    except TorchDynamoException as error:
        raise GridError(
            f"compile: torch could not compile the image tower of {model.spec.arch}:"
            f" {str(error).strip().splitlines()[0]}. It wants a C++ compiler, on a GPU Triton as"
            " well. Leave `compile` out of the recipe to run the layers as they are."
        ) from error
    finally:
        tower.__class__ = cls
