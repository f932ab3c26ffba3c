"""Which attacks, defenses and presets there are: the built-in tables and installed plug-ins.

A plug-in is a distribution with entry points ``name = module:Class`` in the groups
``backdoor_grid.attacks`` or ``backdoor_grid.defenses``. Names are known without importing a
method; a method's module is imported when it is asked for. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from importlib import resources
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal

from attacks import ATTACKS
from defenses import DEFENSES
from grid.nodes import parse, read_text
from victims.errors import GridError, UsageError, near, unknown

Kind = Literal["attacks", "defenses"]

BUILT_IN: Mapping[str, Mapping[str, str]] = {"attacks": ATTACKS, "defenses": DEFENSES}
KINDS: tuple[Kind, ...] = ("attacks", "defenses")
OURS = "backdoor-grid"
PACKAGES = ("analysis", "attacks", "defenses", "grid", "victims")
CODE_SUFFIXES = frozenset({".py", ".sql", ".tsv", ".yaml"})


@dataclass(frozen=True, slots=True)
class Method:
    """A line of a table: where a method's class is, and who brings it."""

    name: str
    module: str
    attribute: str
    distribution: str
    release: str = ""

    @property
    def target(self) -> str:
        return f"{self.module}:{self.attribute}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodInfo:
    """What `grid ls` tells about a method. A method that cannot be loaded has only ``error``."""

    name: str
    distribution: str
    cls: str
    origin: str = ""
    idea: str = ""
    paper: str = ""
    version: int = 0
    phase: str = ""  # a defense's phase, or the gate group of an attack
    tracks: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()  # of a defense in regime F
    fidelity: Mapping[str, str] | None = None  # of a defense, per regime
    knob: str = ""  # of a defense: the setting of its trade-off curve
    variants: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """A grid file's text. ``name`` is the preset's or the file's without its suffix."""

    name: str
    source: str
    text: str


def known(kind: Kind) -> dict[str, str]:
    """Name -> ``module:Class`` of every method of a kind."""
    return {name: method.target for name, method in table(kind).items()}


def table(kind: Kind) -> dict[str, Method]:
    """Every method of a kind by name; built-in ones first."""
    if kind not in BUILT_IN:
        raise unknown("kind of method", kind, BUILT_IN)
    found: dict[str, Method] = {}
    for name, target in BUILT_IN[kind].items():
        module, attribute = target.split(":")
        found[name] = Method(name, module, attribute, OURS)
    for point in sorted(entry_points(group=f"backdoor_grid.{kind}"), key=_by_distribution):
        method = _plugin(kind, point)
        other = found.get(method.name)
        if other is not None:
            raise GridError(
                f"two {kind} are called {method.name!r}: {other.target} of {other.distribution} and"
                f" {method.target} of {method.distribution}. A name means one method: uninstall"
                f" one, or have it register another name in its group backdoor_grid.{kind}."
            )
        found[method.name] = method
    return found


def _by_distribution(point: EntryPoint) -> tuple[str, str]:
    return (_distribution(point), point.name)


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unnamed distribution"


def _plugin(kind: str, point: EntryPoint) -> Method:
    owner = _distribution(point)
    module, colon, attribute = point.value.partition(":")
    words = [*module.split("."), *attribute.split(".")]
    if not colon or not all(word.isidentifier() for word in words):
        raise GridError(
            f"{owner}: entry point {point.name!r} in backdoor_grid.{kind} is {point.value!r};"
            " expected module:Class"
        )
    return Method(point.name, module, attribute, owner, point.dist.version if point.dist else "")


def resolve(
    kind: Kind, name: str, where: str = "", methods: Mapping[str, Method] | None = None
) -> type[Any]:
    """The class of a method, its module imported now; ``methods`` saves reading the table."""
    methods = table(kind) if methods is None else methods
    if name not in methods:
        raise unknown(kind.removesuffix("s"), name, methods, where)
    method = methods[name]
    if method.distribution == OURS:
        cls: Any = getattr(importlib.import_module(method.module), method.attribute)
        return _checked(kind, method, cls)
    try:
        cls = importlib.import_module(method.module)
        for word in method.attribute.split("."):
            cls = getattr(cls, word)
    except (Exception, SystemExit) as error:
        place = f"{where}: " if where else ""
        raise GridError(
            f"{place}{kind.removesuffix('s')} {name!r} is a plug-in of {method.distribution}"
            f" {method.release}, and {method.target} cannot be imported:"
            f" {type(error).__name__}: {error}. Repair or uninstall {method.distribution}."
        ) from error
    return _checked(kind, method, cls)


def _checked(kind: Kind, method: Method, cls: Any) -> type[Any]:
    """What a class must show before an instance of it is made."""
    if not isinstance(cls, type) or not is_dataclass(cls):
        raise _broken(method, "a method is a frozen dataclass of its hyperparameters")
    found: Any = cls
    if not found.__dataclass_params__.frozen:
        raise _broken(method, "its dataclass is not frozen=True")
    missing = [name for name in _declared(kind) if not _has(cls, kind, name)]
    if missing:
        raise _broken(method, f"it lacks {', '.join(missing)}")
    if found.name != method.name:
        raise _broken(method, f"its `name` is {found.name!r}")
    if kind == "defenses":
        from defenses.base import check_truth

        check_truth(found)
    return cls


def _has(cls: Any, kind: Kind, name: str) -> bool:
    """Whether a class has a member of its protocol; the one that says nothing there, its own."""
    own = {"attacks": "craft", "defenses": "apply"}[kind]
    found = getattr(cls, name, None)
    return hasattr(cls, name) and not (name == own and found is getattr(_protocol(kind), own))


def _broken(method: Method, problem: str) -> GridError:
    return GridError(
        f"{method.target} of {method.distribution} is registered as {method.name!r}, but"
        f" {problem}. `grid mock {method.name}` runs the whole contract."
    )


def _protocol(kind: Kind) -> Any:
    from attacks.base import Attack
    from defenses.base import Defense

    return Attack if kind == "attacks" else Defense


def _declared(kind: Kind) -> list[str]:
    """The members of the protocol, which are what every method must have."""
    protocol = _protocol(kind)
    methods = [name for name, value in vars(protocol).items() if inspect.isfunction(value)]
    return [n for n in (*protocol.__annotations__, *methods) if not n.startswith("_")]


def describe(kind: Kind) -> list[MethodInfo]:
    """Every method with what it declares. One that cannot be loaded is listed with its error."""
    methods = table(kind)
    return [_describe(kind, method, methods) for method in methods.values()]


def _describe(kind: Kind, method: Method, methods: Mapping[str, Method]) -> MethodInfo:
    common: dict[str, Any] = {
        "name": method.name,
        "distribution": method.distribution,
        "cls": method.target,
    }
    try:
        cls: Any = resolve(kind, method.name, methods=methods)
    except GridError as error:
        return MethodInfo(**common, error=str(error))
    from attacks.base import Track
    from defenses.base import Regime, fidelity_in, resolved_needs

    tracks = getattr(cls, "tracks", frozenset({Track.MULTIMODAL}))
    facts: dict[str, Any] = {"phase": cls.group.value} if kind == "attacks" else {}
    if kind == "defenses":
        facts["phase"] = cls.phase.value
        facts["knob"] = cls.knob.name if cls.knob else ""
        facts["needs"] = tuple(resolved_needs(cls, Regime.F))
        facts["fidelity"] = {regime.value: fidelity_in(cls, regime).value for regime in Regime}
    return MethodInfo(
        **common,
        **facts,
        origin=_origin(cls),
        idea=_idea(cls),
        paper=cls.paper,
        version=cls.version,
        tracks=tuple(track.value for track in Track if track in tracks),
        variants=tuple(cls.variants),
    )


def _origin(cls: type[Any]) -> str:
    """``file:line`` of a class, relative to the working directory where it lies below it."""
    try:
        path = Path(inspect.getfile(cls))
        lines, first = inspect.getsourcelines(cls)
    except (OSError, TypeError):
        return cls.__module__
    ahead = next((i for i, line in enumerate(lines) if line.lstrip().startswith("class ")), 0)
    here = Path.cwd()
    shown = path.relative_to(here) if path.is_relative_to(here) else path
    return f"{shown}:{first + ahead}"


def _idea(cls: type[Any]) -> str:
    """The first line of the class's docstring, else of its module's."""
    text = cls.__doc__ or ""
    if not text or text.startswith(f"{cls.__name__}("):  # the signature that dataclass fills in
        text = sys.modules[cls.__module__].__doc__ or ""
    return next(iter(text.strip().splitlines()), "")


def presets() -> dict[str, str]:
    """Name -> description of each grid file that comes with the package."""
    return _bundled("presets")


def campaigns() -> dict[str, str]:
    """The same of campaign files."""
    return _bundled("campaigns")


def _bundled(folder_name: str) -> dict[str, str]:
    folder = resources.files("grid") / folder_name
    files = sorted(folder.iterdir(), key=lambda file: file.name) if folder.is_dir() else []
    return {
        file.name.removesuffix(".yaml"): _description(file.read_text("utf-8"), file.name)
        for file in files
        if file.name.endswith(".yaml")
    }


def _description(text: str, file: str) -> str:
    """A grid file's first comment line, else its ``description``."""
    if text.startswith("#"):
        return text.splitlines()[0].lstrip("# ").rstrip()
    described = parse(text, file).items().get("description")
    return " ".join(described.node.text.split()) if described else ""


# Beside results: the text of the grid, and the place of its file.
TEXT_FILE, SOURCE_FILE = "grid.yaml", "source.json"


def grid_source(name_or_path: str) -> Source:
    """The text of a grid file, of the preset of that name, or of what ran in a results directory,
    given by its path or by its name at home. Decodes nothing."""
    from grid.places import home, results_meant

    folder = results_meant(name_or_path)
    if folder is not None:
        return _ran(folder)
    is_none = not Path(name_or_path).is_file() and name_or_path not in presets()
    if is_none and (home() / name_or_path / "campaign.yaml").is_file():
        raise UsageError(
            f"{name_or_path} is a campaign: `grid tune` goes on with it, `grid status` and"
            " `grid leaderboard --campaign` tell of it, and its grid is"
            f" {home() / name_or_path / 'held-out.yaml'}."
        )
    return _source(name_or_path, "presets", "grid file", "preset")


def _ran(folder: Path) -> Source:
    """The grid of a results directory: its file as it is now, or else as it was."""
    kept = folder / TEXT_FILE
    path = str(kept)
    with contextlib.suppress(OSError, ValueError, KeyError):
        path = str(json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))["path"])
    if path.startswith("preset ") and path.removeprefix("preset ") in presets():
        # By no word of the command line: there this name may mean the very folder.
        return _shipped(path.removeprefix("preset "), "presets", "preset")
    found = Path(path) if Path(path).is_file() else kept
    return Source(folder.name, str(found), read_text(found))


def campaign_source(name_or_path: str) -> Source:
    """The text of a campaign file, or of the one of that name that comes with the package."""
    return _source(name_or_path, "campaigns", "campaign file", "campaign")


def _source(name_or_path: str, folder: str, file_word: str, word: str) -> Source:
    path = Path(name_or_path)
    if path.exists() and not path.is_dir():
        return Source(path.stem, name_or_path, read_text(path))
    found = _bundled(folder)
    if name_or_path in found:
        return _shipped(name_or_path, folder, word)
    table = ", ".join(found) or "none"
    many = f"{word.capitalize()}s"
    if path.is_dir():
        raise UsageError(
            f"{name_or_path}: a folder, not a {file_word}, and no results of a run are in it (no"
            f" {TEXT_FILE}). Give the directory that `grid run` printed, such as runs/demo, or a"
            f" {file_word}. {many}: {table}."
        )
    raise UsageError(
        f"no {file_word} and no {word} called {name_or_path!r}.{near(name_or_path, found)}"
        f" {many}: {table}. A file is given by its path, such as grids/mine.yaml."
    )


def _shipped(name: str, folder: str, word: str) -> Source:
    """A file that comes with the package."""
    file = resources.files("grid") / folder / f"{name}.yaml"
    return Source(name, f"{word} {name}", file.read_text("utf-8"))


def code_digest() -> str:
    """SHA-256 of all code and tables a plan could depend on: our packages' and the plug-ins'."""
    plugins = [
        method for kind in KINDS for method in table(kind).values() if method.distribution != OURS
    ]
    tops = {method.module.partition(".")[0] for method in plugins}
    digest = hashlib.sha256()
    for method in plugins:
        digest.update(f"{method}\n".encode())
    for package in (*PACKAGES, *sorted(tops - set(PACKAGES))):
        for name, path in _code_files(package):
            content = path.read_bytes()
            digest.update(f"{package}/{name}:{len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()


def _code_files(package: str) -> Iterator[tuple[str, Path]]:
    """The files of a top-level module or package, found without running any of it."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return
    folders = spec.submodule_search_locations
    if folders is None:
        if spec.origin is not None and Path(spec.origin).is_file():
            yield Path(spec.origin).name, Path(spec.origin)
        return
    for folder in folders:
        for place, below, files in os.walk(folder):
            below[:] = sorted(name for name in below if name.isidentifier() and name[0] != "_")
            for file in sorted(files):
                path = Path(place, file)
                if path.suffix in CODE_SUFFIXES:
                    yield path.relative_to(folder).as_posix(), path
