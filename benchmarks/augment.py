"""Images per second of batched augmentation against torchvision's transforms in a loop.

Run ``python -m benchmarks.augment``; one thread, the fastest of several rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import v2

from victims.augment import POLICIES, SimClr, augment
from victims.draws import Draws, torch_rng
from victims.eda import eda_all

BATCHES = ((32, 64), (224, 32))  # (pixels, images)
SECONDS = 0.6  # of rounds per number


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest round, after one that does not count."""
    work()
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < SECONDS:
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def looped(name: str, size: int) -> Callable[[Tensor], Tensor] | None:
    """torchvision's transform of one image that does what a policy does."""
    if name == "autoaugment":
        transform: Callable[[Tensor], Tensor] = v2.AutoAugment()
        return transform
    if name == "simclr":
        parts = [
            v2.RandomHorizontalFlip(),
            v2.RandomResizedCrop(size),
            v2.RandomApply([v2.ColorJitter(0.5, 0.5, 0.5, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.GaussianBlur(SimClr().kernel_at(size), (0.1, 2.0)),
        ]
        transform = v2.Compose(parts)
        return transform
    return None


def main() -> dict[str, float]:
    """Images per second by policy and size, the ratio to the loop, and captions per second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    for size, num in BATCHES:
        rng = torch_rng(0, "benchmark", size)
        images = torch.randint(0, 256, (num, 3, size, size), dtype=torch.uint8, generator=rng)
        draws = Draws(rng, num, 0, num)
        for name in POLICIES:
            batched = num / fastest(lambda n=name, i=images, d=draws: augment(n, i, d))  # type: ignore[misc]
            found[f"{name} {size}px images/s"] = batched
            if one := looped(name, size):
                loop = num / fastest(lambda t=one, i=images: torch.stack([t(x) for x in i]) / 255)  # type: ignore[misc]
                found[f"{name} {size}px over loop"] = batched / loop
    captions = ["a photo of a small red striped triangle on a blue background"] * 2000
    synonyms = {"photo": ("picture",), "small": ("little", "tiny"), "red": ("crimson",)}
    seconds = fastest(lambda: eda_all(captions, lambda word: synonyms.get(word, ()), 0))
    found["eda captions/s"] = len(captions) / seconds
    torch.set_num_threads(threads)
    return found


if __name__ == "__main__":
    for what, number in main().items():
        print(f"{what:32s} {number:12,.1f}")
