"""What goes through a network, known before anything runs: the unit in which a plan counts.

It is the currency of a model's meter (`victims.models.Meter`): pictures and captions, each seen
(forward) or trained on (forward and backward, be it for the weights or for pixels).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

from victims.recipe import Recipe, Select

# A forward pass over a training step: 1 to 3, for the backward pass takes two.
FORWARD: Final = 1 / 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Pictures and captions that are only seen, and those that a gradient goes through."""

    images: float = 0.0
    texts: float = 0.0
    images_trained: float = 0.0
    texts_trained: float = 0.0

    def __add__(self, other: Work) -> Work:
        named = (f.name for f in fields(self))
        return Work(**{name: getattr(self, name) + getattr(other, name) for name in named})

    def __mul__(self, times: float) -> Work:
        return Work(**{f.name: getattr(self, f.name) * times for f in fields(self)})

    def steps(self, image_share: float) -> float:
        """As many training steps of one pair, of which the picture takes a share."""
        images = self.images_trained + FORWARD * self.images
        texts = self.texts_trained + FORWARD * self.texts
        return image_share * images + (1 - image_share) * texts


SEEN: Final = Work(images=1, texts=1)
TRAINED: Final = Work(images_trained=1, texts_trained=1)


def rates_of(recipe: Recipe) -> int:
    """How many fits a recipe asks for: one per learning rate."""
    return len(recipe.lr.rates) if isinstance(recipe.lr, Select) else 1


def held_out_of(recipe: Recipe, num_rows: int) -> int:
    """How many rows a recipe keeps to choose its rate by."""
    return recipe.lr.num_held_out(num_rows) if isinstance(recipe.lr, Select) else 0


def fitted(
    recipe: Recipe, num_rows: float, row: Work = TRAINED, *, most_rows: float | None = None
) -> Work:
    """The fits of a recipe on so many rows, of which at most ``most_rows`` come in an epoch.

    ``row`` is what one of them costs; batches that are not full are left out. Rows that a rate is
    chosen by are seen once per rate.
    """
    held = held_out_of(recipe, int(num_rows))
    rest = num_rows - held
    listed = rest if most_rows is None else min(rest, most_rows)
    whole = max(listed // recipe.batch_size, 1) * min(recipe.batch_size, listed)
    return (row * (recipe.epochs * whole) + SEEN * held) * rates_of(recipe)
