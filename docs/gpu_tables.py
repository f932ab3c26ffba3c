"""Speed at real shapes: tables of what ``python -m benchmarks.gpu --record`` measured, if it did.

`docs/gpu.json` is the record, with the device and the software beside its numbers and a digest;
without it the documents say that nothing was measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from docs import tables
from grid.step_costs import COUNTS

RECORD = tables.DOCS / "gpu.json"
NONE = (
    "Not measured yet: no GPU was at hand when this was written. `python -m benchmarks.gpu"
    " --record` measures and writes `docs/gpu.json`, `make docs` puts it here.\n"
)


def parts() -> dict[str, Callable[[], str]]:
    return {"gpu-speed": gpu_speed, "model-costs": model_costs}


def problems(record: Path | None = None) -> list[str]:
    """A record that is not as the benchmark left it."""
    record = record or RECORD
    if not record.exists():
        return []
    body = json.loads(record.read_text("utf-8"))
    if body.get("digest") == tables.digest_of(body):
        return []
    return [f"{record.name} was edited after it was written: its digest is another one"]


def model_costs() -> str:
    """What a sample of every counted model costs."""
    body: dict[str, Any] = json.loads(COUNTS.read_text("utf-8"))
    lines = []
    for name, flops in body["flops"].items():
        kept = body["activation_bytes"][name]
        memory = [f"{kept[precision] / 2**20:.0f}" for precision in ("fp32", "bf16")]
        whole = [f"{2048 * kept['bf16'] / 2**30:.0f}", f"{128 * kept['bf16'] / 2**30:.1f}"]
        lines.append([name, f"{flops['step'] / 1e9:.0f}", *memory, *whole])
    head = ["model", "GFLOP a step", "MB kept in fp32", "in bf16"]
    text = tables.table([*head, "GB of 2048 rows, bf16", "of `micro_batch: 128`"], lines)
    made = body["made"]
    return f"{text}\ntorch {made['torch']}, open_clip {made['open_clip']}.\n"


def gpu_speed(record: Path | None = None) -> str:
    """A table per network: plans by batch, and what the figures hold for."""
    record = record or RECORD
    if not record.exists():
        return NONE
    body: dict[str, Any] = json.loads(record.read_text("utf-8"))
    text = ""
    for arch in dict.fromkeys(cell["arch"] for cell in body["cells"]):
        own = [cell for cell in body["cells"] if cell["arch"] == arch]
        lines = [_line(cell) for cell in own]
        size, kept = own[0]["size"], body["activation_bytes_per_row"][arch]
        head = ["step", "batch", "samples/s", "share of peak", "memory, GB", "waits for the loader"]
        text += (
            f"{arch} at {size} px, {own[0]['precision']}; estimated {kept / 2**20:.0f} MB of"
            f" activations per row.\n\n{tables.table(head, lines)}\n"
        )
    made = body["made"]
    return text + (
        f"{made['time'][:10]}, commit `{made['commit']}`, {made['device']}, driver"
        f" {made['driver']}, CUDA {made['cuda']}, torch {made['versions']['torch']}.\n"
    )


def _line(cell: dict[str, Any]) -> list[str]:
    objective = cell.get("objective", "")
    head = [f"{cell['plan']} {objective}".strip(), str(cell["batch"])]
    if cell["outcome"] != "ok":
        return [*head, cell["outcome"].split(":")[0], "", "", ""]
    share, memory = cell["share_of_peak"], cell["peak_memory_bytes"]
    return [
        *head,
        f"{cell['samples_per_second']:,.0f}",
        "" if share is None else f"{100 * share:.0f} %",
        "" if memory is None else f"{memory / 2**30:.1f}",
        f"{100 * cell['waiting_share']:.0f} %",
    ]
