"""What every figure shares: sizes of print, the theme, looks that colour-blind readers can tell
apart, legends below the panels, and files as PNG and SVG."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from grid.schema.errors import ResultsError

COLUMN_INCHES = 3.5
PAGE_INCHES = 7.0
PNG_DPI = 300
SVG_DPI = 200
HANDLE_INCHES, LETTER_INCHES, LINE_INCHES = 0.5, 0.058, 0.155
"""Room in a legend: for a handle, per letter of the longest label, and per line."""
MARKERS, DASHES = "osD^vP", ("-", "--", "-.", ":")
GREY = "0.62"


class Drawn(NamedTuple):
    """The files, and what could not be drawn and why."""

    files: list[Path]
    left_out: list[str]


class NothingToDraw(ResultsError):
    """A figure would be empty; the message says why."""


class Look(NamedTuple):
    """How one of several things is drawn."""

    color: Any
    marker: str
    dash: str


def draw_all(figures: Mapping[str, Callable[[], Any]], folder: Path) -> Drawn:
    """Draw figures into a folder, each as PNG and SVG under its name."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = Drawn([], [])
    for name, draw in figures.items():
        with house_style():
            try:
                figure = draw()
            except NothingToDraw as error:
                drawn.left_out.append(f"{name}: {error}")
                continue
            drawn.files.extend(save(figure, folder / file_name(name)))
    return drawn


@contextmanager
def house_style() -> Iterator[None]:
    """The theme of the documents' pictures, in the sizes of print; undone at the end."""
    import matplotlib as mpl
    import seaborn as sns

    with mpl.rc_context():
        sns.set_theme(style="whitegrid", context="paper", font_scale=0.83)
        mpl.rcParams.update(
            {
                "svg.fonttype": "none",
                # A name that holds dollars is no formula.
                "text.parse_math": False,
                "svg.hashsalt": "campaign",
                "axes.titlelocation": "left",
                "axes.titlesize": 8,
                "legend.frameon": False,
                "legend.columnspacing": 1.2,
                "legend.handletextpad": 0.5,
                "grid.linewidth": 0.5,
                "lines.linewidth": 1.2,
            }
        )
        yield


def save(figure: Any, path: Path) -> list[Path]:
    """Both files of a figure, whose bytes depend on nothing but what is drawn."""
    files = [path.with_name(f"{path.name}.{kind}") for kind in ("png", "svg")]
    figure.savefig(files[0], dpi=PNG_DPI)
    # Solved once: the second file has the layout of the first.
    figure.set_layout_engine("none")
    save_svg(figure, files[1])
    return files


def save_svg(figure: Any, file: Any) -> None:
    """A figure as SVG; many marks are pixels in it, as fine as a screen shows."""
    figure.savefig(file, format="svg", metadata={"Date": None}, dpi=SVG_DPI)


def file_name(name: str) -> str:
    """A name that every file system takes."""
    return re.sub(r"[^\w.@+-]+", "_", name)


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches; its layout is solved when it is drawn."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def looks_of(names: Iterable[str]) -> dict[str, Look]:
    """A look for each name, by its place; the first 36 all differ."""
    import seaborn as sns

    palette = sns.color_palette("colorblind")
    # Its yellow is too pale for a line on white.
    colors = [color for i, color in enumerate(palette) if i != 8]
    return {
        name: Look(colors[i % len(colors)], MARKERS[i % len(MARKERS)], DASHES[i % len(DASHES)])
        for i, name in enumerate(names)
    }


def name_parts(name: str) -> list[str]:
    """What a name consists of, each part with the separator behind it; 1e-05 is one part."""
    return re.split(r"(?<=[_@+,/= ])|(?<=[A-Za-z]{2}-)", name)


def wrapped(name: str, letters: int) -> str:
    """A name in lines of at most so many letters, broken behind a separator if it has one."""
    lines = [""]
    for part in name_parts(name):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > letters:
            lines.append("")
        lines[-1] += part
        while len(lines[-1].rstrip()) > letters:
            lines[-1:] = [lines[-1][:letters], lines[-1][letters:]]
    return "\n".join(line.rstrip() for line in lines)


def legend(
    figure: Any, axes: Iterable[Any], title: str | None = None, *, is_packed: bool = False
) -> None:
    """One legend under the panels, each label once, for which the figure grows.

    A packed one is as low as can be: columns are measured instead of estimated, and long labels
    wrapped for the sake of more columns.
    """
    found: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        for handle, label in zip(handles, labels, strict=True):
            found.setdefault(label, handle)
    if not found:
        return
    width, height = figure.get_size_inches()

    def below(labels: Sequence[str], columns: int) -> Any:
        return figure.legend(
            found.values(),
            labels,
            loc="outside lower center",
            ncols=columns,
            borderaxespad=0.2,
            title=title,
            title_fontsize=7,
        )

    labels = _in_lines(found, width)
    column = HANDLE_INCHES + LETTER_INCHES * max(
        len(line) for label in labels for line in label.split("\n")
    )
    columns = min(len(found), max(1, int(width / column)))
    if is_packed:
        for more in range(columns + 1, min(len(found), 8) + 1):
            for tried in (_in_lines(found, width), _in_lines(found, width / more)):
                if _num_lines(tried, more) >= _num_lines(labels, columns):
                    continue
                trial = below(tried, more)
                if trial.get_window_extent().width <= 0.98 * width * figure.dpi:
                    labels, columns = tried, more
                trial.remove()
    lines = _num_lines(labels, columns) + (title is not None)
    figure.set_size_inches(width, height + LINE_INCHES * (lines + 0.5))
    below(labels, columns)


def _in_lines(labels: Iterable[str], inches: float) -> list[str]:
    """Labels that would be wider than that, with their handles, are wrapped."""
    letters = max(18, int((inches - HANDLE_INCHES) / LETTER_INCHES))
    return [label if len(label) <= letters else wrapped(label, letters) for label in labels]


def _num_lines(labels: Sequence[str], columns: int) -> int:
    """How many lines the longest column of a legend has; the first columns take one more."""
    least, more = divmod(len(labels), columns)
    sizes = [least + (place < more) for place in range(columns)]
    lines = [1 + label.count("\n") for label in labels]
    starts = [sum(sizes[:place]) for place in range(columns)]
    return max(sum(lines[a : a + n]) for a, n in zip(starts, sizes, strict=True))


def subtitle(figure: Any, words: str) -> None:
    """What a figure shows, small and above everything; the figure grows by it."""
    width, height = figure.get_size_inches()
    lines = "\n".join(textwrap.wrap(words, int((width - 0.1) / LETTER_INCHES)))
    figure.set_size_inches(width, height + 0.03 + 0.12 * (lines.count("\n") + 1))
    figure.suptitle(lines, x=0.01, ha="left", fontsize=7, color="0.35", linespacing=1.0)


def whole_ticks(axis: Any, most: int = 5) -> None:
    """Few ticks on the x axis, at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))
