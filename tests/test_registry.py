"""The method tables, plug-ins of other distributions, and finding a grid file."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from grid import registry
from grid.registry import KINDS, Kind, code_digest, describe, grid_source, known, presets, resolve
from victims.errors import GridError, UsageError

DEFENSE = '''
"""Shrug: hand the victim back.

More.
"""
from dataclasses import dataclass
from typing import ClassVar
from defenses.base import Defended, Defense, Fidelity, Need, Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrug(Defense):
    name: ClassVar = "shrug"
    version: ClassVar = 3
    paper: ClassVar = "arXiv 0000.00000"
    phase: ClassVar = Phase.INFERENCE
    needs: ClassVar = frozenset({Need.VICTIM, Need.START})
    fidelity: ClassVar = Fidelity.READING
    variants: ClassVar = {"long": {"sighs": 9}}

    sighs: int = 1

    def apply(self, lab, case):
        return Defended(case.victim)
'''


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path, as an environment's site-packages is; its modules go afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    loaded = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - loaded:
        if str(getattr(sys.modules[name], "__file__", "") or "").startswith(str(tmp_path)):
            del sys.modules[name]


def install(site: Path, name: str, points: str, **modules: str) -> None:
    """What an installer leaves of a distribution."""
    info = site / f"{name.replace('-', '_')}-1.2.dist-info"
    info.mkdir()
    importlib.invalidate_caches()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(points)
    for module, text in modules.items():
        (site / f"{module}.py").write_text(text)


def test_the_built_in_tables_resolve_and_describe_themselves() -> None:
    kinds: tuple[Kind, ...] = KINDS
    for kind in kinds:
        infos = describe(kind)
        assert [info.name for info in infos] == list(known(kind))
        for info in infos:
            assert info.error == ""
            assert info.distribution == "backdoor-grid"
            assert info.idea
            assert info.paper
            file, line = info.origin.rsplit(":", 1)
            source = Path(file).read_text().splitlines()
            assert source[int(line) - 1].startswith(f"class {info.cls.split(':')[1]}")
    roclip = next(info for info in describe("defenses") if info.name == "roclip")
    assert roclip.needs == ("suspect_data", "reference")
    assert roclip.fidelity == {"F": "adapted", "S": "exact"}
    assert roclip.phase == "pretraining"


def test_unknown_names_get_a_near_match() -> None:
    with pytest.raises(UsageError, match=r"^m.yaml:3: no attack called 'badnte'. Did you mean 'ba"):
        resolve("attacks", "badnte", "m.yaml:3")
    with pytest.raises(UsageError, match=r"no kind of method called 'attack'. Did you mean"):
        known("attack")  # type: ignore[arg-type]


def test_a_plugin_is_listed_without_being_imported_and_then_works(site: Path) -> None:
    install(site, "grid-shrug", "[backdoor_grid.defenses]\nshrug = shrugging:Shrug\n", shrugging="")
    (site / "shrugging.py").write_text(DEFENSE)
    assert known("defenses")["shrug"] == "shrugging:Shrug"
    assert "shrug" not in known("attacks")
    assert "shrugging" not in sys.modules
    assert resolve("defenses", "shrug")().sighs == 1
    info = describe("defenses")[-1]
    assert (info.name, info.distribution, info.version) == ("shrug", "grid-shrug", 3)
    assert info.idea == "Shrug: hand the victim back."
    assert info.needs == ("victim", "reference")
    assert info.origin == f"{site / 'shrugging.py'}:12"
    assert info.variants == ("long",)


def test_a_plugin_cannot_shadow_a_built_in_method(site: Path) -> None:
    install(site, "grid-evil", "[backdoor_grid.defenses]\ncleanclip = evil:CleanClip\n", evil="")
    with pytest.raises(GridError) as caught:
        known("defenses")
    message = str(caught.value)
    assert "two defenses are called 'cleanclip'" in message
    assert "defenses.cleanclip:CleanClip of backdoor-grid" in message
    assert "evil:CleanClip of grid-evil" in message
    assert known("attacks")


def test_two_plugins_of_one_name_are_both_named(site: Path) -> None:
    install(site, "grid-one", "[backdoor_grid.attacks]\nnova = one:Nova\n")
    install(site, "grid-two", "[backdoor_grid.attacks]\nnova = two:Nova\n")
    with pytest.raises(GridError, match=r"one:Nova of grid-one and two:Nova of grid-two"):
        known("attacks")


@pytest.mark.parametrize("target", ["nowhere", "a b:C", "mod:", ":C", "mod:C [extra]"])
def test_a_malformed_entry_point_names_its_distribution(site: Path, target: str) -> None:
    install(site, "grid-odd", f"[backdoor_grid.attacks]\nodd = {target}\n")
    with pytest.raises(GridError, match=r"^grid-odd: entry point 'odd' .*expected module:Class"):
        known("attacks")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("import missing_thing", "ModuleNotFoundError: No module named 'missing_thing'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("x =", "SyntaxError"),
        ("", "AttributeError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_a_plugin_that_does_not_import_is_named_and_hides_nothing(
    site: Path, body: str, expected: str
) -> None:
    install(site, "grid-ill", "[backdoor_grid.defenses]\nill = illness:Ill\n", illness=body)
    with pytest.raises(GridError) as caught:
        resolve("defenses", "ill", "m.yaml:7: defenses[1]")
    message = str(caught.value)
    assert message.startswith("m.yaml:7: defenses[1]: defense 'ill' is a plug-in of grid-ill 1.2,")
    assert expected in message
    infos = {info.name: info for info in describe("defenses")}
    assert expected in infos["ill"].error
    assert infos["cleanclip"].error == ""


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('name: ClassVar = "shrug"', 'name: ClassVar = "none"', "its `name` is 'none'"),
        ("frozen=True, slots", "slots", "its dataclass is not frozen=True"),
        ("def apply", "def apples", "it lacks apply"),
        ("    version: ClassVar = 3\n", "", "it lacks version"),
        ("@dataclass(frozen=True, slots=True, kw_only=True)", "", "a frozen dataclass of its"),
    ],
)
def test_a_class_that_is_no_method_is_refused(
    site: Path, old: str, new: str, expected: str
) -> None:
    assert old in DEFENSE
    text = DEFENSE.replace(old, new)
    install(site, "grid-shrug", "[backdoor_grid.defenses]\nshrug = shrugging:Shrug\n")
    (site / "shrugging.py").write_text(text)
    with pytest.raises(GridError) as caught:
        resolve("defenses", "shrug")
    assert "shrugging:Shrug of grid-shrug is registered as 'shrug', but" in str(caught.value)
    assert expected in str(caught.value)


def test_code_digest_follows_every_file_of_code_and_no_other(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = site / "ours"
    (package / "views").mkdir(parents=True)
    for name in ("__init__.py", "views/board.sql", "lexicon.tsv", "preset.yaml"):
        (package / name).write_text("1")
    monkeypatch.setattr(registry, "PACKAGES", ("ours",))
    seen = {code_digest()}
    for name in ("__init__.py", "views/board.sql", "lexicon.tsv", "preset.yaml"):
        (package / name).write_text("2")
        seen.add(code_digest())
    assert len(seen) == 5
    before = code_digest()
    (package / "notes.txt").write_text("no code")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "x.py").write_text("no code")
    assert code_digest() == before
    (package / "views" / "board.sql").rename(package / "views" / "other.sql")
    assert code_digest() != before
    assert "ours" not in sys.modules


def test_code_digest_follows_plugins_without_running_them(site: Path) -> None:
    before = code_digest()
    install(site, "grid-boom", "[backdoor_grid.attacks]\nboom = boom:Boom\n", boom="1 / 0")
    with_plugin = code_digest()
    (site / "boom.py").write_text("2 / 0")
    assert len({before, with_plugin, code_digest()}) == 3


def test_names_presets_and_digest_need_no_torch() -> None:
    code = (
        "import sys\nfrom grid import registry as r\n"
        "r.known('attacks'), r.known('defenses'), r.presets(), r.code_digest()\n"
        "heavy = {'torch', 'ray', 'numpy', 'attacks.base', 'defenses.base'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_presets_are_found_and_described(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda package: site)
    assert presets() == {}
    (site / "presets").mkdir()
    (site / "presets" / "demo.yaml").write_text("# Three attacks, in minutes.\n# More.\nname: d\n")
    (site / "presets" / "smoke.yaml").write_text("description: >\n  Very\n  small\nname: s\n")
    (site / "presets" / "bare.yaml").write_text("name: b\n")
    (site / "presets" / "notes.txt").write_text("no preset")
    assert presets() == {
        "bare": "",
        "demo": "Three attacks, in minutes.",
        "smoke": "Very small",
    }
    assert grid_source("smoke").text.startswith("description")
    with pytest.raises(UsageError) as caught:
        grid_source("dmeo")
    assert "called 'dmeo'. Did you mean 'demo'? Presets: bare, demo, smoke." in str(caught.value)
    monkeypatch.chdir(site)
    (site / "demo").mkdir()  # a folder of a preset's name does not hide the preset
    assert grid_source("demo").source == "preset demo"
    with pytest.raises(UsageError, match="a folder, not a grid file"):
        grid_source(str(site))
    (site / "mine.yaml").write_text("name: mine\n")
    found = grid_source("mine.yaml")
    assert (found.name, found.source, found.text) == ("mine", "mine.yaml", "name: mine\n")
