"""A third party's package: installed beside this one, its methods are used in a grid by name."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from grid import cli

HERE = Path(__file__).parent
GRID = """
data:
  world: {public: 256, suspect: 256, clean: 128, tuning: 128, report: 128, shifted: 128}
target: fish
rates: [0, 0.1]
seeds: [0]
attacks:
  - tint: {variant: strong, as: tint-strong}
defenses:
  - none
  - hush: {noise: 0.2}
recipes:
  reference: {epochs: 1, batch_size: 64, lr: 5.0e-3}
  victim: {epochs: 1, batch_size: 64, lr: 5.0e-3}
  repair: {epochs: 1, batch_size: 64, lr: 3.0e-3}
evaluate: {sets: [report]}
gate: {medium: {asr: 0, lift: 0, clean_loss: 1}, init_loss: 1}
execution: {device: cpu}
"""


def install(site: Path, project: Path) -> None:
    """What an installer leaves of a project: its package, and a dist-info with entry points."""
    facts = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    for package in project.iterdir():
        if (package / "__init__.py").exists():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(package, site / package.name, ignore=ignore)
    name, version = facts["name"], facts["version"]
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines: list[str] = []
    for group, points in facts["entry-points"].items():
        lines += [f"[{group}]", *(f"{point} = {target}" for point, target in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An environment's folder of packages, on the path of this process, with the plug-in in it."""
    folder = tmp_path / "site"
    folder.mkdir()
    install(folder, HERE / "plugin")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    loaded = set(sys.modules)
    yield folder
    for name in set(sys.modules) - loaded:
        if str(getattr(sys.modules[name], "__file__", "") or "").startswith(str(folder)):
            del sys.modules[name]


def grid_exits(*arguments: str) -> int:
    """The command, in this process; its exit code."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return int(caught.value.code or 0)


def break_defense(site: Path) -> None:
    (site / "grid_tint" / "hush.py").write_text("import a_package_nobody_has\n")


def test_a_grid_runs_with_a_plugin_s_attack_and_defense(site: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(GRID)
    paths = os.pathsep.join([str(site), str(HERE.parent)])
    command = [sys.executable, "-m", "grid.cli", "run", "mine.yaml", "--executor", "serial"]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": paths, "GRID_HOME": str(tmp_path / "runs")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = pq.read_table(tmp_path / "runs" / "mine" / "rows").to_pylist()
    cells = {(r["attack"], r["rate_text"], r["defense"]) for r in rows if r["status"] == "ok"}
    assert ("tint-strong", "0.1", "hush") in cells
    assert {defense for _, _, defense in cells} == {"none", "hush"}
    hush = next(r for r in rows if r["defense"] == "hush")
    assert hush["needs"] == ["victim", "clean_data"]
    assert hush["fidelity"] == "reading"
    assert "tint-strong" in done.stdout  # the board


def test_ls_names_the_distribution_that_brings_a_method(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert grid_exits("ls", "attacks") == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("tint "))
    assert lines[at + 1].strip() == "Tint: one colour channel of the whole picture is raised."
    distribution, file, line = lines[at + 2].strip().split(":")
    assert distribution == "grid-tint"
    assert Path(file.strip()).read_text().splitlines()[int(line) - 1] == "class Tint(Attack):"
    assert grid_exits("ls", "defenses") == 0
    out = capsys.readouterr().out
    assert "hush                  finetuning; reading; victim, clean_data; knob: noise" in out


@pytest.mark.parametrize(
    ("name", "checks"), [("tint", 28), pytest.param("hush", 13, marks=pytest.mark.exhaustive)]
)
def test_mock_passes_for_a_plugin_s_methods(
    site: Path, capsys: pytest.CaptureFixture[str], name: str, checks: int
) -> None:
    assert grid_exits("mock", name) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{name}: ")
    assert lines[-1].startswith(f"{checks} checks, 0 failed, ")


def test_mock_fails_for_a_method_that_breaks_its_contract(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = site / "grid_tint" / "hush.py"
    text = path.read_text().replace("Idea:", "Thought:")
    path.write_text(text.replace("needs: ClassVar[frozenset[Need]] = ", "wants: ClassVar[Any] = "))
    assert grid_exits("mock", "hush") == 1
    out = capsys.readouterr().out
    # The table refuses this class, and the contract says all that it lacks.
    assert "FAILED  declares what it is: found AttributeError" in out
    assert "FAILED  says how it works: found the blocks Reference, Symbols" in out


def test_a_plugin_that_does_not_import_gives_one_message(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_defense(site)
    (tmp_path / "mine.yaml").write_text(GRID)
    out = tmp_path / "runs"
    expected = (
        "defense 'hush' is a plug-in of grid-tint 0.3, and grid_tint.hush:Hush cannot be imported:"
        " ModuleNotFoundError: No module named 'a_package_nobody_has'. Repair or uninstall"
        " grid-tint.\n"
    )
    run = ("run", "mine.yaml", "--executor", "serial", "--out", str(out), "--store", str(out))
    for arguments, place in ((run, "mine.yaml:11: defenses[1]: "), (("mock", "hush"), "")):
        assert grid_exits(*arguments) == 1
        assert capsys.readouterr().err == f"grid: {place}{expected}"
    assert not out.exists()
