"""The picture of the packages: what may import what, and who may know whom by name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from attacks import ATTACKS
from defenses import DEFENSES
from grid.schema.writing import write_grid, write_rows
from tests.rows import cell_columns, cell_rows

ROOT = Path(__file__).parents[1]
# What a package may import besides itself. A dotted name allows that module and what lies below.
ALLOWED: dict[str, set[str]] = {
    "victims": set(),
    "attacks": {"victims"},
    "defenses": {"victims"},
    "grid": {"victims", "attacks", "defenses"},
    "analysis": {"grid.schema", "victims.errors"},
}
ALSO = {
    "grid/leaderboard_command.py": {"analysis"},
    "grid/board_commands.py": {"analysis"},
    "grid/import_commands.py": {"analysis"},
    "grid/view.py": {"analysis"},
}
# Stages on a cluster; the machines of the cluster that was joined; and the Jobs API, which is
# reached from outside by a client that must neither start nor join a cluster.
MAY_IMPORT_RAY = {
    *("grid/cluster/joining.py", "grid/cluster/notes.py", "grid/cluster/warm.py"),
    *("grid/cluster/group.py", "grid/cluster/guard.py"),
    *("grid/machines.py", "grid/jobs.py", "grid/tuning/search.py"),
}
# Answered at once, so nothing heavy may be imported before there is work to do.
LIGHT = (
    *("grid/cli.py", "grid/quick.py", "grid/registry.py", "grid/places.py"),
    *("grid/operations.py", "grid/control.py", "grid/chains.py", "grid/journal.py"),
    *("grid/board_commands.py", "grid/campaign_status.py", "grid/execution.py", "grid/room.py"),
    *("grid/import_commands.py", "grid/model_commands.py", "grid/run_commands.py"),
    *("grid/plan_commands.py", "grid/cell_commands.py", "grid/leaderboard_command.py"),
    *("grid/list_command.py", "grid/method_commands.py", "grid/cache_commands.py"),
    *("grid/lock.py", "grid/status.py", "grid/status_words.py", "grid/cache.py", "grid/collect.py"),
    "grid/corpus_commands.py",
)
HEAVY = {"torch", "ray"}

FILES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
    for package in ALLOWED
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imports(name: str, tree: ast.AST) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, as an absolute dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = name.removesuffix(".py").split("/")[: -node.level or None]
            base = ".".join([*parents, node.module or ""] if node.level else [node.module or ""])
            # `from package import module` names the module only together with the alias.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def module_level(tree: ast.Module) -> ast.Module:
    """What runs on import: no function bodies, no blocks for type checkers."""

    def runs(node: ast.AST) -> bool:
        checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        return not (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or checking)

    return ast.Module([node for node in tree.body if runs(node)], [])


def is_in(name: str, allowed: set[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in allowed)


def test_imports_point_down() -> None:
    upwards = []
    for name, tree in FILES.items():
        package = name.split("/")[0]
        allowed = {package} | ALLOWED[package] | ALSO.get(name, set())
        ours = [found for found in imports(name, tree) if found.split(".")[0] in ALLOWED]
        upwards += [(name, found) for found in ours if not is_in(found, allowed)]
    assert upwards == []


def test_a_paper_stands_alone() -> None:
    leaning, papers = [], 0
    for name, tree in FILES.items():
        package = name.split("/")[0]
        if package in ("attacks", "defenses") and "base" not in name:
            papers += 1
            own = [found for found in imports(name, tree) if is_in(found, {package})]
            leaning += [(name, found) for found in own if not is_in(found, {f"{package}.base"})]
    assert leaning == []
    assert papers > 30


def test_ray_stays_where_it_belongs() -> None:
    users = {n for n, tree in FILES.items() if any(is_in(i, {"ray"}) for i in imports(n, tree))}
    assert users <= MAY_IMPORT_RAY
    assert users, "the search for imports finds nothing"


def test_nothing_heavy_where_answers_are_quick() -> None:
    quick = [n for n in FILES if n.startswith(("analysis/", "grid/schema/")) or n in LIGHT]
    slow = []
    for name in quick:
        whole = name.startswith("analysis/")
        tree = FILES[name] if whole else module_level(FILES[name])
        slow += [(name, n) for n in imports(name, tree) if n.split(".")[0] in HEAVY]
    assert slow == []
    assert set(quick) >= set(LIGHT)


def test_every_file_answers_for_annotations_that_run_late() -> None:
    bare = [
        name
        for name, tree in FILES.items()
        if "__future__.annotations" not in imports(name, tree) and len(tree.body) > 1
    ]
    assert bare == []


# A byte order mark; features with their shape; what becomes of Ctrl-C.
MEANS_SOMETHING_ELSE = {"utf-8-sig", "a_BD", "SIG_IGN"}

# --- names of methods: `grid` and `victims` know methods through their tables alone


def paper_names() -> set[str]:
    """Names and classes of every method of a paper, in lower case without underscores."""
    tables = {**ATTACKS, **DEFENSES}
    papers = {n: target for n, target in tables.items() if "controls:" not in target}
    classes = {target.split(":")[1] for target in papers.values()}
    return {name.replace("_", "").lower() for name in (*papers, *classes)}


def _docstrings(tree: ast.AST) -> set[int]:
    """Identities of the string constants that stand alone as statements."""
    return {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def spoken(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every identifier and every string of the code, with its line."""
    exempt = _docstrings(tree)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        for field in ("id", "attr", "name", "arg", "module", "asname"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield line, value
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in exempt:
            yield line, str(getattr(node, "value", ""))


def words(text: str) -> set[str]:
    """The words of a text: whole, and in the parts that underscores make."""
    whole = {word.lower() for word in re.findall(r"\w+", text)}
    return whole | {w.replace("_", "") for w in whole} | {p for w in whole for p in w.split("_")}


def test_no_method_is_known_by_name() -> None:
    known, named = paper_names(), []
    for name, tree in FILES.items():
        if name.startswith(("grid/", "victims/")):
            found = [(line, text) for line, text in spoken(tree) if words(text) & known]
            named += [(name, *at) for at in found if at[1] not in MEANS_SOMETHING_ELSE]
    assert named == []


def test_the_search_for_names_finds_them() -> None:
    seen = 'x = {"cleanclip": 1}\nfrom attacks.badnet import BadNet\nsig_delta = 3\n"doc roclip"\n'
    lines = [line for line, text in spoken(ast.parse(seen)) if words(text) & paper_names()]
    assert set(lines) == {1, 2, 3}
    assert not words("design signal sigma") & paper_names()


# --- start-up


def run(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LOADED = "print('HEAVY', sorted({'torch', 'ray'} & set(sys.modules)))"


def test_importing_the_light_modules_imports_nothing_heavy() -> None:
    modules = "grid.cli, grid.quick, grid.schema.writing, grid.registry, analysis.board"
    modules += ", analysis.render"
    assert run(f"import sys, {modules}, attacks, defenses, victims\n{LOADED}") == "HEAVY []\n"


def test_a_plan_without_a_cluster_imports_no_ray(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom grid.cli import main\n"
        f"try:\n    main(['plan', 'smoke', '--out', sys.argv[1]])\nfinally:\n    {LOADED}\n"
    )
    assert "'ray'" not in run(code, str(tmp_path)).splitlines()[-1]


@pytest.mark.parametrize("arguments", [["--help"], ["leaderboard", "DIR"], ["ls", "presets"]])
def test_quick_commands_import_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    write_grid(tmp_path, "demo", "0123456789abcdef", [cell_columns()])
    write_rows(tmp_path, cell_rows())
    code = (
        "import sys\nfrom grid.cli import main\n"
        f"try:\n    main(sys.argv[1:])\nfinally:\n    {LOADED}\n"
    )
    shown = run(code, *(str(tmp_path) if a == "DIR" else a for a in arguments))
    assert shown.endswith("HEAVY []\n")
    expected = {"--help": "leaderboard", "leaderboard": "badnet", "ls": "smoke"}[arguments[0]]
    assert expected in shown
