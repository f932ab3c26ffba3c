"""Other pictures, kept with a trigger: what a cover row shows of somebody else.

Which one a row takes is chosen by the bytes of its own picture, never itself, so that it is the
same in every batch, epoch and process. Shapes: B batch, N pictures of the bank.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from victims.draws import image_digest, keyed_bits
from victims.errors import UsageError


def distinct(who: str, image_NCHW: Tensor, key: int) -> Tensor:
    """The pictures, equal ones once: a picture must always have another to take from."""
    _, first_N = np.unique(image_digest(image_NCHW, key).numpy(), return_index=True)
    if len(first_N) < 2:
        raise UsageError(f"{who}: the pool must hold 2 different pictures or more")
    return image_NCHW[torch.from_numpy(np.sort(first_N))]


def other_place(image_BCHW: Tensor, digests_N: Tensor, key: int) -> Tensor:
    """The place in the bank of these digests that each picture takes from, B."""
    digest_B = image_digest(image_BCHW, key).cpu()
    place_B = keyed_bits(digest_B, 1, 1)[:, 0] % len(digests_N)
    return (place_B + (digests_N[place_B] == digest_B)) % len(digests_N)
