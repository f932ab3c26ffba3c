"""``python -m benchmarks.gpu [--quick] [--record FILE]``: every objective at real shapes.

RN50 and ViT-B/32 at 224 px (image classifiers: the PreAct-ResNet18 at 32 px), batches of 128 to
2048, bf16, the plain step and the steps of every defense's own objective: samples per second, the
share of the device's peak (FLOPs counted by torch, forward and backward), peak memory beside what
was estimated, and the share of time that the device waits for the loader. What does not fit into
memory is a line that says so. A figure is the mean of a few steps after a warm-up; pixels are noise
and weights random, on which speed does not depend.

``--quick`` runs tiny shapes to see that it works; its figures mean nothing. ``--count`` counts
FLOPs and bytes of activations on any machine and writes them where `grid plan` looks for them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch

from benchmarks.common import machine
from benchmarks.gpu_steps import PLAIN, Shape, Stand, counts_of, suits
from benchmarks.objectives import plans
from grid.step_costs import COUNTS, peak_of
from victims.activations import activation_bytes
from victims.compiled import COMPILED_KEEPS
from victims.models import fresh
from victims.recipe import Precision

ARCHS = (("RN50", 224), ("ViT-B-32", 224), ("preact18", 32))
QUICK = (("tiny", 32), ("preact_tiny", 32))
BATCHES = (128, 256, 512, 1024, 2048)
COUNTED = tuple((arch, 224) for arch in ("RN50", "RN101", "ViT-B-32", "ViT-B-16", "ViT-L-14"))
RECORD = Path(__file__).parents[1] / "docs" / "gpu.json"
Cell = dict[str, Any]


def shapes(given: argparse.Namespace) -> Iterator[Shape]:
    """Networks and batches, the largest batch of each network first."""
    archs = QUICK if given.quick else [a for a in ARCHS if a[0] in given.archs]
    batches = [16] if given.quick else sorted(given.batches, reverse=True)
    for arch, size in archs:
        for batch in batches:
            yield Shape(
                arch=arch,
                size=size,
                batch=batch,
                precision=Precision(given.precision),
                micro_batch=given.micro_batch,
                checkpoint_activations=given.checkpoint_activations,
                compile=given.compile,
            )


def cells_of(stand: Stand, title: str, shape: Shape) -> list[Cell]:
    """The lines of one plan at one shape; what breaks is a line, too, and ends nothing."""
    about: Cell = {
        **{"arch": shape.arch, "size": shape.size, "batch": shape.batch, "plan": title},
        **{"precision": str(shape.precision), "micro_batch": shape.micro_batch},
        "checkpoint_activations": shape.checkpoint_activations,
        "compile": shape.recipe.compile,
    }
    try:
        found = stand.measured(title, shape)
    except torch.OutOfMemoryError:
        return [{**about, "outcome": "out of memory"}]
    except Exception as error:
        return [{**about, "outcome": f"failed: {type(error).__name__}: {error}"}]
    if not found:
        return [{**about, "outcome": "trains nothing"}]
    return [{**about, "outcome": "ok", **cell} for cell in found]


def line(cell: Cell) -> str:
    """A cell as a line of the terminal."""
    head = f"{cell['arch']:10}{cell['batch']:6}  {cell['plan']:18}"
    if cell["outcome"] != "ok":
        return f"{head}{cell['outcome'][:120]}"
    share, memory = cell["share_of_peak"], cell["peak_memory_bytes"]
    words = [
        f"{cell['samples_per_second']:10.0f}/s",
        f"{cell['flops_per_sample'] / 1e9:8.2f} GFLOP",
    ]
    words.append("" if share is None else f"{100 * share:5.1f} % of peak")
    words.append("" if memory is None else f"{memory / 2**30:6.1f} GB")
    words.append(f"waits {100 * cell['waiting_share']:4.1f} %")
    return f"{head}{cell['objective']:22}{'  '.join(words)}"


def measure(given: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything that was asked for, and what it holds for."""
    body: dict[str, Any] = {"made": about_device(given.device), "quick": given.quick}
    cells, estimates = list[Cell](), dict[str, int]()
    every = list(shapes(given))
    titles = [t for t in (PLAIN, *plans()) if not given.plans or t in given.plans]
    for arch in dict.fromkeys(shape.arch for shape in every):
        own = [shape for shape in every if shape.arch == arch]
        with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
            stand = Stand(Path(folder), own[0], 4 * own[0].batch, given.device)
            estimates[arch] = stand.bytes_per_row(own[0].precision)
            say(f"{arch}: about {estimates[arch] / 2**20:.1f} MB of activations per row")
            for shape in own:
                for title in (t for t in titles if suits(t, shape)):
                    found = cells_of(stand, title, shape)
                    cells += found
                    for cell in found:
                        say(line(cell))
    return {**body, "activation_bytes_per_row": estimates, "cells": cells}


def about_device(device: str) -> dict[str, Any]:
    """The device, its driver and the software."""
    named = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    peaks = {str(p): peak_of(named, p) for p in Precision}
    about = {"device": named, "driver": driver(), "cuda": torch.version.cuda, "peaks": peaks}
    return {**machine(), **about}


def driver() -> str:
    """The version of the GPU's driver, where its own tool is there to tell."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip().split("\n")[0] or "unknown"


def count() -> None:
    """Write what a sample costs, for `grid plan` and the documents: FLOPs, bytes of activations."""
    flops, kept = dict[str, Any](), dict[str, Any]()
    for arch, size in COUNTED:
        shape = Shape(arch=arch, size=size, batch=1)
        model = fresh(shape.spec, 0)
        context = model.tokenizer.context
        flops[f"{arch}@{size}"] = counts_of(shape)
        kept[f"{arch}@{size}"] = {str(p): activation_bytes(model, p, context) for p in Precision}
    made = {"torch": torch.__version__, "open_clip": open_clip.__version__}
    body = {"made": made, "flops": flops, "activation_bytes": kept}
    COUNTS.write_text(json.dumps(body, indent=1) + "\n", "utf-8")


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, figures of no meaning")
    parser.add_argument("--count", action="store_true", help="count, measure nothing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=[str(p) for p in Precision])
    parser.add_argument("--archs", nargs="+", default=[a for a, _ in ARCHS], metavar="ARCH")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), metavar="N")
    parser.add_argument(
        "--plans", nargs="+", metavar="NAME", help=f"of {PLAIN}, {', '.join(plans())}"
    )
    parser.add_argument("--micro-batch", type=int, metavar="N")
    parser.add_argument("--checkpoint-activations", action="store_true")
    parser.add_argument("--compile", action="store_true", help="image towers of CLIPs, that is")
    parser.add_argument("--scratch", type=Path, help="where pictures lie meanwhile: gigabytes")
    parser.add_argument("--record", type=Path, nargs="?", const=RECORD, help=f"default {RECORD}")
    given = parser.parse_args(arguments)
    if given.record == RECORD and given.quick:
        parser.error("--record keeps figures for the documents, and those of --quick are none")
    known = {PLAIN, *plans()}
    if unknown := [name for name in given.plans or () if name not in known]:
        parser.error(f"no plan called {unknown[0]!r}; there are {', '.join(sorted(known))}")
    if unknown := [name for name in given.archs if name not in dict(ARCHS)]:
        parser.error(f"no shape for {unknown[0]!r}; there are {', '.join(dict(ARCHS))}")
    if given.compile and given.checkpoint_activations:
        parser.error(f"--compile: {COMPILED_KEEPS}")
    if given.precision is None:
        given.precision = "bf16" if given.device.startswith("cuda") else "fp32"
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """0, whatever did not fit; 1 if a plan failed for another reason."""
    given = _parsed(arguments)
    if given.count:
        count()
        print(f"written to {COUNTS}")
        return 0

    def say(words: str) -> None:
        print(words, flush=True)

    started = time.perf_counter()
    body = measure(given, say)
    say(f"{time.perf_counter() - started:.0f} s")
    if given.record is not None:
        from docs.tables import digest_of

        body["digest"] = digest_of(body)
        given.record.write_text(json.dumps(body, indent=1) + "\n", "utf-8")
        say(f"written to {given.record}")
    return int(any(cell["outcome"].startswith("failed") for cell in body["cells"]))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
