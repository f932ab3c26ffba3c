"""Steps at real shapes: that the benchmark runs anywhere, and counts and reports what it should."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu, gpu_fit, gpu_steps
from benchmarks.gpu_steps import Shape, Stand
from benchmarks.objectives import plans
from docs import gpu_tables
from docs.tables import digest_of
from grid import step_costs
from tests.test_architecture import imports, module_level
from victims.recipe import Precision

QUICK = Shape(arch="tiny", size=32, batch=16, precision=Precision.FP32)
# As on a machine where only torch and open_clip are installed.
BARE = """
import sys
for name in ("ray", "pyarrow", "duckdb"):
    sys.modules[name] = None
from benchmarks.gpu import main
sys.exit(main(sys.argv[1:]))
"""


class NoBodies(ast.NodeTransformer):
    """A module without the bodies of its functions, which import nothing when it is imported."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        return None


def test_nothing_is_imported_that_a_bare_machine_lacks() -> None:
    """By name, through all of our own modules; the next test runs it without them."""
    root, seen, waiting = Path(__file__).parents[1], set[str](), ["benchmarks/gpu.py"]
    found = set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        tree = NoBodies().visit(ast.parse((root / name).read_text()))
        for module in imports(name, module_level(tree)):
            found.add(module.split(".")[0])
            path = module.replace(".", "/")
            parent = path.rpartition("/")[0]
            own = [f"{path}.py", f"{parent}.py", f"{path}/__init__.py"]
            waiting += [file for file in own if (root / file).is_file()]
    assert {"grid/registry.py", "victims/lab.py", "defenses/base.py"} <= seen
    assert "torch" in found
    assert found & {"ray", "pyarrow", "duckdb"} == set()


def test_a_plan_s_own_steps_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_fit, "STEPS", 2)
    stand = Stand(tmp_path, QUICK, 64, "cpu")
    kept = stand.store.keys("model")
    plain, twice = (gpu.cells_of(stand, title, QUICK)[0] for title in ("plain", "cleanclip"))
    assert (plain["objective"], twice["objective"]) == ("PlainClip", "InModal")
    assert twice["flops_per_sample"] == pytest.approx(2 * plain["flops_per_sample"], rel=0.15)
    assert stand.store.keys("model") == kept, "what plans made is dropped"
    assert "PlainClip" in gpu.line(plain)


@pytest.mark.exhaustive
def test_it_needs_neither_ray_nor_pyarrow_nor_duckdb(tmp_path: Path) -> None:
    record = tmp_path / "found.json"
    asked = ["--quick", "--device", "cpu", "--plans", "plain", "cleanclip", "--record", str(record)]
    done = subprocess.run(
        [sys.executable, "-c", BARE, *asked],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    body = json.loads(record.read_text())
    assert body["digest"] == digest_of(body)
    assert {"device", "driver", "cuda", "versions", "time", "commit"} <= set(body["made"])
    found = {(c["arch"], c["plan"]): c for c in body["cells"]}
    assert set(found) == {("tiny", "plain"), ("tiny", "cleanclip"), ("preact_tiny", "plain")}
    for cell in found.values():
        assert cell["outcome"] == "ok"
        assert cell["samples_per_second"] > 0
        assert 0 <= cell["waiting_share"] < 1
        assert cell["share_of_peak"] is None, "a CPU has none"
        assert cell["peak_memory_bytes"] is None
    assert body["activation_bytes_per_row"]["tiny"] > 10_000


def test_what_does_not_fit_is_a_line_and_the_rest_is_measured() -> None:
    class Full:
        def measured(self, title: str, shape: Shape) -> list[dict[str, Any]]:
            if title == "plain":
                raise torch.OutOfMemoryError("CUDA out of memory")
            if title == "abd":
                raise ValueError("no")
            return [{"objective": "Away"}] if title == "par" else []

    stand: Any = Full()
    outcomes = {t: gpu.cells_of(stand, t, QUICK) for t in ("plain", "abd", "anp", "par")}
    assert {t: cells[0]["outcome"] for t, cells in outcomes.items()} == {
        "plain": "out of memory",
        "abd": "failed: ValueError: no",
        "anp": "trains nothing",
        "par": "ok",
    }
    assert "out of memory" in gpu.line(outcomes["plain"][0])


def test_flops_are_those_of_the_layers() -> None:
    """Of one linear layer by hand; of the embedded model as on a device that computes."""
    layer, x_BD = nn.Linear(8, 4, bias=False), torch.ones(2, 8)
    with FlopCounterMode(display=False) as counter:
        layer(x_BD).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 2 * 8 * 4), "forward, and the weight's gradient"
    counted = gpu_steps.counts_of(QUICK)
    model = QUICK.spec.empty()
    # Fused attention of a CPU is not counted by torch; that of a GPU is.
    plain = sdpa_kernel(SDPBackend.MATH)
    with plain, FlopCounterMode(display=False) as counter, torch.no_grad():
        image_BCHW: Tensor = torch.zeros((2, 3, 32, 32), dtype=torch.uint8)
        model.embed_image(image_BCHW)
        model.embed_text(torch.ones((2, model.tokenizer.context), dtype=torch.long))
    assert counted["forward"] == counter.get_total_flops() / 2
    assert 2.5 < counted["step"] / counted["forward"] < 3


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", ["RN50", "ViT-B-32"])
def test_the_counts_of_real_models_are_kept_as_they_are_counted(arch: str) -> None:
    found = gpu_steps.counts_of(Shape(arch=arch, size=224, batch=1))
    assert step_costs.counts()[f"{arch}@224"] == step_costs.Count(**found)


@pytest.mark.exhaustive
@pytest.mark.timeout(300)
def test_every_plan_that_trains_is_measured(tmp_path: Path) -> None:
    for arch in ("tiny", "preact_tiny"):
        shape = Shape(arch=arch, size=32, batch=16, precision=Precision.FP32)
        folder = tmp_path / arch
        folder.mkdir()
        stand = Stand(folder, shape, 64, "cpu")
        for title in (t for t in plans() if gpu_steps.suits(t, shape)):
            cells = gpu.cells_of(stand, title, shape)
            assert cells[0]["outcome"] == "ok" or title == "anp", cells


def test_documents_tell_what_was_measured_or_that_nothing_was(tmp_path: Path) -> None:
    assert gpu_tables.gpu_speed(tmp_path / "none.json").startswith("Not measured yet")
    about = {"arch": "RN50", "size": 224, "precision": "bf16", "plan": "par"}
    measured = {
        **{"objective": "Away", "samples_per_second": 1234.4, "share_of_peak": 0.312},
        **{"waiting_share": 0.02, "peak_memory_bytes": 3 * 2**30},
    }
    made = {"time": "2030-01-02T00:00:00Z", "commit": "abc", "device": "NVIDIA H100 80GB HBM3"}
    body: dict[str, Any] = {
        "made": {**made, "driver": "1", "cuda": "2", "versions": {"torch": "3"}},
        "activation_bytes_per_row": {"RN50": 2**26},
        "cells": [
            {**about, "batch": 2048, "outcome": "out of memory"},
            {**about, "batch": 128, "outcome": "ok", **measured},
        ],
    }
    record = tmp_path / "gpu.json"
    record.write_text(json.dumps({**body, "digest": digest_of(body)}))
    shown = gpu_tables.gpu_speed(record)
    assert "| par | 2048 | out of memory |  |  |  |" in shown
    assert "| par Away | 128 | 1,234 | 31 % | 3.0 | 2 % |" in shown
    assert "estimated 64 MB of activations per row" in shown
    assert gpu_tables.problems(record) == []
    record.write_text(record.read_text().replace("1234.4", "9999.9"))
    assert "was edited" in gpu_tables.problems(record)[0]
