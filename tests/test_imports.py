"""Others' numbers: read strictly, kept apart, and never among ours."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis import Results
from analysis.drawing import figures_of
from analysis.imports import Told, import_file, imported_in
from analysis.imports.figure import Known
from analysis.imports.points import beside
from analysis.leaderboard import Asked, load, text
from analysis.reader import Tables
from analysis.report import write_report
from attacks import ATTACKS
from defenses import DEFENSES
from grid.schema import IMPORTED, ResultsError, SchemaError
from tests.boards import steady, write_board
from tests.grids import call, environment

ROW = {
    "paper": "Wu et al.",
    "arxiv": "2206.12654",
    "table": "Table 2",
    "attack": "badnet",
    "rate": "0.1",
    "defense": "anp",
    "dataset": "CIFAR-10",
    "model": "PreAct-ResNet18",
    "metric": "asr_top1",
    "variant": "non-target images",
    "value": "0.73",
    "unit": "%",
    "setting": "",
    "as_written": "",
}
# As the benchmark prints it: defenses over the columns, percents, a cell left open.
WIDE = """\
|                 | BackdoorDefense→ | Nodefense | Nodefense | Nodefense | FT | FT | FT |
| --------------- | ---------------- | --------- | --------- | --------- | -- | -- | -- |
| TargetedModel | BackdoorAttack↓ | C-Acc (%) | ASR (%) | R-Acc (%) | C-Acc(%) | ASR (%) | R-Acc(%)
| PreAct-Resnet18 | BadNets          | 91.32     | 95.03     | 4.67      | 89.96 | 1.48 | 89.39 |
| PreAct-Resnet18 | LC               | 84.59     | 99.92     | 0.07      | 90.6 | 11.53 | - |
"""
# As its runs write them: shares by epoch, and a summary whose maxima are of different epochs.
EPOCHS = """\
,epoch,train_acc,test_acc,test_asr,test_ra
0,1,0.5,0.61,0.99,0.01
1,2,0.8,0.83,0.97,0.02
2,3,0.9,,,
"""
SUMMARY = """\
,epoch,test_acc,test_asr,test_ra
last,100,0.4605,0.8867,0.0837
valid_max,100,0.6892,0.9911,0.6333
exist_nan_value,False,False,False,False
"""
RUN = {"attack": "badnet", "defense": "ft", "rate": "10%", "dataset": "cifar10", "model": "vgg19"}


def table(*changes: Mapping[str, str]) -> str:
    """A CSV of rows that differ from a sound one."""
    rows = [{**ROW, **change} for change in changes or ({},)]
    quoted = [",".join(f'"{value}"' for value in row.values()) for row in rows]
    return "\n".join([",".join(rows[0]), *quoted]) + "\n"


def take(out: Path, content: str | bytes, name: str = "x", **more: Any) -> Told:
    """Import a file of this content."""
    file = out.parent / "source.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    declared = frozenset(more.pop("declared", ()))
    known = Known(attacks=ATTACKS, defenses=DEFENSES, declared=declared)
    return import_file(file, name, out, known, by="me", **more)


def numbers(out: Path) -> list[dict[str, Any]]:
    with closing(Tables(out, of="imported")) as tables:
        return imported_in(tables)


def only(out: Path) -> dict[str, Any]:
    (record,) = numbers(out)
    return record


# --- tables


def test_a_sound_line_is_stored_with_where_it_came_from(tmp_path: Path) -> None:
    told = take(tmp_path / "in", table())
    assert told.path is not None
    assert told.path.parent == tmp_path / "in" / "imported"
    record = only(tmp_path / "in")
    assert list(record) == [column.name for column in IMPORTED]
    assert (record["provenance"], record["kind"], record["imported_by"]) == (
        *("imported", "table", "me"),
    )
    assert record["source_sha256"] == hashlib.sha256(table().encode()).hexdigest()
    assert (record["source_file"], record["source_line"]) == ("source.csv", 2)
    assert (record["value"], record["printed"], record["unit"]) == (0.0073, "0.73", "%")
    assert (record["rate"], record["rate_text"], record["count"]) == (0.1, "0.1", None)
    assert (record["identifier"], record["geometry"]) == ("arXiv 2206.12654", "not stated")
    assert not record["attack_as_written"]


@pytest.mark.parametrize(
    ("given", "share"),
    [("1%", "0.01"), ("0.5 %", "0.005"), ("0.0015", "0.0015"), ("100%", "1"), ("0", "0")],
)
def test_rates_are_exact_shares(tmp_path: Path, given: str, share: str) -> None:
    take(tmp_path / "in", table({"rate": given}))
    assert only(tmp_path / "in")["rate_text"] == share


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"variant": ""}, "variant is empty"),
        ({"variant": "top-1"}, "variant 'top-1' of asr_top1; allowed: all images, non-target im"),
        ({"metric": "ASR"}, "no metric of ours is called 'ASR'. Did you mean 'asr_top1'?"),
        ({"metric": "C-Acc"}, "called 'C-Acc'. Did you mean 'clean_top1'?"),
        ({"metric": "asr_top_1"}, "called 'asr_top_1'. Did you mean 'asr_top1'?"),
        ({"attack": "badnets"}, "no attack of ours is called 'badnets'. Did you mean 'badnet'?"),
        ({"defense": "NAD"}, "no defense of ours is called 'NAD'. A name of the paper's own is"),
        ({"arxiv": ""}, "neither arxiv nor doi"),
        ({"arxiv": "page 4"}, "'page 4' is neither an arXiv id such as 2206.12654 nor a DOI"),
        ({"rate": ""}, "neither rate nor count"),
        ({"rate": "1"}, "rate '1'; a share below 1, or percent with its sign"),
        ({"rate": "10 percent"}, "rate '10 percent'; a share"),
        ({"value": "101"}, "value '101' %; it must lie in 0 to 100"),
        ({"value": "7.3", "unit": "share"}, "value '7.3' share; it must lie in 0 to 1"),
        ({"value": "nan"}, "value 'nan' is no finite number"),
        ({"value": "high"}, "value 'high' is no finite number"),
        ({"unit": ""}, "unit is empty"),
        ({"unit": "points"}, "unit 'points'; allowed: %, share"),
        ({"as_written": "atack"}, "as_written names columns, found 'atack'. Did you mean 'attack'"),
        ({"model": ""}, "model is empty"),
        (
            {"paper": "\x1b[31mred"},
            "paper holds '\\x1b[31mred': line breaks and control characters",
        ),
        ({"setting": "a\tb"}, "setting holds 'a\\tb': line breaks"),
        # Without a variant, not even a metric of the paper's own.
        ({"metric": "DER", "as_written": "metric", "variant": ""}, "variant is empty"),
    ],
)
def test_a_line_that_does_not_say_all_it_must_is_refused(
    tmp_path: Path, change: dict[str, str], says: str
) -> None:
    """T48: above all, a number without its metric's variant; and nothing is written."""
    with pytest.raises(SchemaError) as refused:
        take(tmp_path / "in", table({}, {"table": "Table 3", **change}))
    assert "line 3: " in str(refused.value)
    assert says in str(refused.value)
    assert not (tmp_path / "in").exists()


def test_names_of_the_paper_s_own_are_taken_when_declared(tmp_path: Path) -> None:
    own = {"defense": "NAD", "metric": "DER", "unit": "points", "value": "-3.5", "variant": "test"}
    told = take(
        tmp_path / "in", table({**own, "as_written": "metric"}), declared={"NAD", "not there"}
    )
    assert told.as_written == ["DER", "NAD"]
    record = only(tmp_path / "in")
    assert (record["value"], record["unit"]) == (-3.5, "points"), "not ours to convert"
    assert record["defense_as_written"]
    assert record["metric_as_written"]
    assert not record["attack_as_written"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (table().replace("variant", "variants"), "no column 'variant'; unknown column 'variants'."),
        (table().replace(",rate,", ",rates,"), "neither a column 'rate' nor 'count'"),
        (table({}, {}), "line 3: asr_top1 of badnet x anp is given twice, first in line 2"),
        (table() + "a,b\n", "line 3: 14 fields are wanted, found fewer"),
        (table().replace('"CIFAR-10"', "a,b"), "line 2: 14 fields are wanted, found more"),
        ("", "the file is empty"),
        ("paper;arxiv\nx;y\n", "'paper;arxiv'. Fields are separated by commas."),
        (table() + '"' + "x" * 200_000, ": field larger than field limit"),
        (table().replace("Table 2", "a\x00b"), "line 2: "),
        ("a,b\n1,2\n", "line 1 tells neither a table nor BackdoorBench's results: 'a,b'"),
        (table().splitlines()[0], "there are no numbers in it"),
        (b"PK\x03\x04\xff\xfe", "not text in UTF-8"),
    ],
)
def test_files_that_are_no_tables_say_so(tmp_path: Path, content: str | bytes, says: str) -> None:
    with pytest.raises(SchemaError) as refused:
        take(tmp_path / "in", content)
    assert says in str(refused.value)
    assert not (tmp_path / "in").exists()


def test_faults_are_told_once_each_and_not_by_the_hundred(tmp_path: Path) -> None:
    same = [{"table": f"T{n}", "defense": "NAD"} for n in range(40)]
    others = [{"table": "T", "dataset": "d", "value": f"{n}x"} for n in range(9)]
    with pytest.raises(SchemaError) as refused:
        take(tmp_path / "in", table(*same, *others))
    lines = str(refused.value).splitlines()
    assert lines[1].startswith("line 2 and 39 more: no defense of ours is called 'NAD'")
    assert (len(lines), lines[-1]) == (7, "... and 5 other faults")


# --- BackdoorBench


def test_a_leaderboard_is_read_defense_by_defense(tmp_path: Path) -> None:
    take(tmp_path / "in", WIDE, about={"dataset": "cifar10", "rate": "1%"})
    found = numbers(tmp_path / "in")
    values = {(r["attack"], r["defense"], r["metric"]): r["value"] for r in found}
    assert len(values) == len(found) == 11, "the open cell is no number"
    assert values["badnet", "none", "clean_top1"] == pytest.approx(0.9132)
    assert values["badnet", "finetune", "asr_top1"] == pytest.approx(0.0148)
    assert values["label_consistent_adversarial", "finetune", "clean_top1"] == pytest.approx(0.906)
    assert {r["variant"] for r in found} == {"top-1", "non-target images"}
    assert {(r["model"], r["dataset"], r["rate_text"]) for r in found} == {
        ("PreAct-Resnet18", "cifar10", "0.01")
    }
    assert {r["identifier"] for r in found} == {"arXiv 2206.12654"}


def test_merged_headings_and_long_tables_say_the_same(tmp_path: Path) -> None:
    about = {"dataset": "cifar10", "rate": "1%"}
    cells = [[c.strip() for c in line.strip().strip("|").split("|")] for line in WIDE.splitlines()]
    del cells[1]
    merged = [c if c not in cells[0][:i] else "" for i, c in enumerate(cells[0])]
    long = [["dataset", "pratio", "model", "attack", "defense", "C-Acc", "ASR", "R-Acc"]]
    for row in cells[2:]:
        for defense, place in (("Nodefense", 2), ("FT", 5)):
            long.append(["cifar10", "0.01", row[0], row[1], defense, *row[place : place + 3]])

    def csv(rows: list[list[str]]) -> str:
        return "\n".join(map(",".join, rows))

    take(tmp_path / "a", WIDE, about=about)
    take(tmp_path / "b", csv([merged, *cells[1:]]), about=about)
    take(tmp_path / "c", csv(long))
    kept = ("attack", "defense", "metric", "value", "dataset", "model", "rate_text", "variant")

    def told(out: Path) -> set[tuple[Any, ...]]:
        return {tuple(record[name] for name in kept) for record in numbers(out)}

    assert told(tmp_path / "a") == told(tmp_path / "b") == told(tmp_path / "c")


@pytest.mark.parametrize(
    ("content", "clean", "asr", "robust", "line"),
    [(SUMMARY, 0.4605, 0.8867, 0.0837, 2), (EPOCHS, 0.83, 0.97, 0.02, 3)],
)
def test_a_run_counts_as_it_ended(
    tmp_path: Path, content: str, clean: float, asr: float, robust: float, line: int
) -> None:
    """Never its maxima, which are of different epochs; nor an epoch that was not measured."""
    take(tmp_path / "in", content, about=RUN)
    found = {record["metric"]: record for record in numbers(tmp_path / "in")}
    assert {metric: record["value"] for metric, record in found.items()} == {
        "clean_top1": clean,
        "asr_top1": asr,
        "r_acc": robust,
    }
    assert {record["source_line"] for record in found.values()} == {line}
    assert {record["setting"] for record in found.values()} == {"a run of its code, last epoch"}


@pytest.mark.parametrize(
    ("content", "about", "says"),
    [
        (SUMMARY, {}, "does not tell its attack, defense, dataset, model, rate: say --about 'att"),
        (WIDE, {}, "line 4 does not tell its dataset, rate: say --about 'dataset=... rate=...'"),
        (WIDE, {"datset": "x"}, "--about datset: not known. Did you mean 'dataset'?"),
        (WIDE.replace("91.32", "bad"), RUN, "line 4: value 'bad' is no finite number"),
        (WIDE.replace("BadNets", "LF"), RUN, "no attack of ours is called 'LF'."),
        (SUMMARY.replace("0.4605", "nan_value"), RUN, "value 'nan_value' is no finite number"),
        ("model,attack,C-Acc,ASR\nm,BadNets,0.9,0.5\n", RUN, "no heading says (%), and no value"),
    ],
)
def test_what_a_benchmark_s_file_leaves_out_must_be_said(
    tmp_path: Path, content: str, about: dict[str, str], says: str
) -> None:
    with pytest.raises(SchemaError) as refused:
        take(tmp_path / "in", content, about=about)
    assert says in str(refused.value)
    assert not (tmp_path / "in").exists()


# --- again


def test_the_same_again_is_nothing_and_another_needs_to_be_told(tmp_path: Path) -> None:
    out = tmp_path / "in"
    take(out, table())
    assert take(out, table()).path is None
    with pytest.raises(SchemaError, match=r"there is an import 'x' already, of source\.csv on 20"):
        take(out, table({"value": "1.5"}))
    assert only(out)["printed"] == "0.73"
    assert take(out, table({"value": "1.5"}), replace=True).replaced
    assert only(out)["printed"] == "1.5", "the newest counts"
    take(out, table(), name="y")
    assert [record["import_name"] for record in numbers(out)] == ["x", "y"]
    for name in ("a/b", "_hidden", ""):
        with pytest.raises(SchemaError, match="a name is letters and digits"):
            take(out, table(), name=name)


# --- beside a board

NAMES = ("badnet", "blended", "sig", "wanet", "ssba", "bpp")
OURS = {
    "none": steady(0.95, 0.01),
    "finetune": steady(0.4, 0.03),
    "anp": steady(0.2, 0.03),
}
# Better than anything of ours, and of everything on the board.
BEST = [
    {"attack": a, "defense": d, "rate": "0.01", "metric": m, "variant": v, "value": x}
    for a in NAMES
    for d in OURS
    for m, v, x in (("clean_top1", "top-1", "99.9"), ("asr_top1", "non-target images", "0"))
]


@pytest.fixture(scope="module")
def boards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A board, and the same with others' numbers in it."""
    plain = tmp_path_factory.mktemp("boards") / "plain"
    write_board(plain, OURS, attacks=NAMES, rates=("0", "0.01"))
    both = plain.parent / "both"
    shutil.copytree(plain, both)
    take(both, table(*BEST), name="best")
    return plain, both


def test_nothing_that_is_counted_compared_or_ranked_knows_them(
    boards: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plain, both = boards
    asked = Asked(part="lines")
    for form in ("html", "tex"):
        assert text(load(plain, asked), asked, form) == text(load(both, asked), asked, form)
    first, second = (Results(folder).board(worst_case=True) for folder in boards)
    for frame in ("lines", "tiers", "cells"):
        # A mean of several threads may differ in its last digit from one reading to the next.
        pd.testing.assert_frame_equal(getattr(first, frame)(), getattr(second, frame)(), rtol=1e-9)
    assert repr(first.compare("anp", "finetune")) == repr(second.compare("anp", "finetune"))
    for view in ("rows", "newest", "cells", "board", "completeness", "samples"):
        counted = [len(Results(folder).sql(f"FROM {view}")) for folder in boards]
        assert counted[0] == counted[1]
    assert call(capsys, "compact", both).code == 0
    assert len(numbers(both)) == len(BEST)


def test_a_board_ends_with_them_in_grey(boards: tuple[Path, Path]) -> None:
    asked = Asked(part="lines")
    plain, both = (text(load(f, asked), asked, "table", 300, color=True) for f in boards)
    assert both.startswith(plain)
    added = both.removeprefix(plain).splitlines()
    assert added[1].startswith("\x1b[90mImported (other models, data and victims; not comparable")
    assert all(line.startswith("\x1b[90m") for line in added[1:])
    line = "badnet, anp (rate 1 %): CA 99.9 % (geometry: not stated), ASR 0.0 % (counted over: non-"
    assert line in both
    assert "- badnet, anp (rate 1 %): CA 99.9 %" in text(load(boards[1], asked), asked, "md")


def test_they_have_a_frame_and_a_key_of_their_own(boards: tuple[Path, Path]) -> None:
    plain, both = boards
    asked = Asked(part="lines")
    bodies = [json.loads(text(load(folder, asked), asked, "json")) for folder in boards]
    assert "imported" not in bodies[0]
    assert len(bodies[1].pop("imported")) == len(BEST)
    first, second = (pd.DataFrame(body.pop("rows")) for body in bodies)
    pd.testing.assert_frame_equal(first, second, rtol=1e-9)
    assert bodies[0] == bodies[1]
    frame = Results(both).published(bundled=False)
    assert set(frame["provenance"]) == {"imported"}
    assert len(frame) == len(BEST)
    assert len(Results(plain).published(bundled=False)) == 0
    everything = Results(both).published()
    assert set(everything["provenance"]) == {"imported", "bundled"}
    assert not everything[["metric", "variant", "value"]].isna().any().any()
    assert Results(both).sql("SELECT count(*) AS n FROM published")["n"][0] == len(BEST)


def test_a_file_in_the_wrong_folder_is_read_by_nobody(
    boards: tuple[Path, Path], tmp_path: Path
) -> None:
    """Somebody moves files about: what others measured does not become ours, nor the reverse."""
    plain, both = boards
    folder = tmp_path / "moved"
    shutil.copytree(plain, folder)
    for file in (both / "imported").glob("*.parquet"):
        shutil.copy(file, folder / "rows")
    (folder / "imported").mkdir()
    for file in (plain / "rows").glob("*.parquet"):
        shutil.copy(file, folder / "imported")
    with closing(Tables(folder)) as tables, closing(Tables(plain)) as before:
        assert imported_in(tables) == []
        count = "SELECT count(*) FROM rows"
        assert tables.query(count).rows == before.query(count).rows
        assert sum("skipped, not a" in warning for warning in tables.warnings) == 2


# --- in figures


def drawn(folder: Path, eval_set: str = "report") -> Any:
    figure = figures_of(folder, Asked(eval_set=eval_set))["trade_off"]()
    figure.canvas.draw()
    return figure


def marks(figure: Any, gid: str) -> list[Any]:
    return [line for line in figure.axes[0].lines if line.get_gid() == gid]


def words(figure: Any) -> list[str]:
    return [t.get_text().replace("\n", " ") for t in figure.legends[0].get_texts()]


def test_the_front_is_ours_alone(boards: tuple[Path, Path]) -> None:
    plain, both = (drawn(folder) for folder in boards)
    (front,), (same) = marks(plain, "front"), marks(both, "front")
    np.testing.assert_array_equal(front.get_xydata(), same[0].get_xydata())
    crosses = [p for p in both.axes[0].lines if p.get_marker() == "x" and len(p.get_xdata())]
    assert len(crosses) == len(BEST) // 2
    assert {p.get_color() for p in crosses} == {"0.62"}
    # More than twelve are not named one by one.
    assert not [t for t in both.axes[0].texts if "(badnet)" in t.get_text()]
    # Broken into lines behind the hyphen.
    source = "best: Wu et al., CIFAR-10, PreAct- ResNet18, rate 1\N{NO-BREAK SPACE}%"
    assert f"{source} (18 points)" in words(both)
    assert "grey: one attack each, ours are means" in words(both)
    assert not [word for word in words(plain) if "best" in word or "grey" in word]


def test_only_what_is_counted_as_ours_is_drawn(boards: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(boards[0], folder)
    clean = {"metric": "clean_top1", "variant": "top-1", "value": "90"}
    take(
        folder,
        table(
            *({**c, "setting": "fair"} for c in ({}, clean)),
            # All images; a bound; no clean accuracy; not on this board; a name of its own.
            *({**c, "setting": "all"} for c in ({"variant": "all images"}, clean)),
            {"setting": "alone"},
            *({**c, "attack": "trojannn"} for c in ({}, clean)),
            *({**c, "attack": "sig", "as_written": "attack"} for c in ({}, clean)),
        ),
        name="mine",
    )
    figure = drawn(folder)
    crosses = [p for p in figure.axes[0].lines if p.get_marker() == "x" and len(p.get_xdata())]
    assert [tuple(map(float, *p.get_xydata().tolist())) for p in crosses] == [(90.0, 0.73)]
    assert "anp (badnet)" in [t.get_text() for t in figure.axes[0].texts]
    note = "grey: one attack each, ours are means; 7 of 9 imported numbers left out"
    assert note in " ".join(words(figure))
    with closing(Tables(folder)) as tables:
        records = imported_in(tables)
    shifted = beside(records, set(NAMES), set(OURS), "shifted")
    assert (len(shifted.points), shifted.note) == (0, "9 of 9 imported numbers left out")


def test_every_source_has_a_mark_of_its_own(boards: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(boards[0], folder)
    for name, value in (("one", "80"), ("two", "70")):
        rows = [{}, {"metric": "clean_top1", "variant": "top-1", "value": value}]
        # No formula, nor markup.
        hostile = {"paper": "Wu $\\x$ <b>", "model": "m_1"}
        take(folder, table(*({**row, **hostile} for row in rows)), name=name)
    figure = drawn(folder)
    assert [p.get_marker() for p in marks(figure, "point anp (badnet)")] == ["x", "+"]
    assert [w.split(":")[0] for w in words(figure) if "Wu" in w] == ["one", "two"]


def test_the_report_has_them_in_a_section_of_their_own(
    boards: tuple[Path, Path], tmp_path: Path
) -> None:
    page = write_report(boards[1], tmp_path / "x.html", Asked()).read_text().replace("&#x27;", "'")
    assert ">Others' numbers</h2>" in page
    assert "Nothing here is in a mean, a rank, a tier, a comparison or a front" in page
    assert hashlib.sha256(table(*BEST).encode()).hexdigest()[:12] in page


# --- the command


def test_the_command_says_what_it_did_with_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "bb.md").write_text(WIDE.replace("LC", "LF"))
    code = (
        "import sys; from grid.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as ended: assert not ended.code\n"
        "assert not {'torch', 'ray', 'open_clip'} & set(sys.modules)"
    )
    said = subprocess.run(
        [
            *(sys.executable, "-c", code, "import", str(tmp_path / "bb.md"), "--as", "bb"),
            *("--out", str(tmp_path), "--about", "dataset='CIFAR 10' rate=1%"),
            *("--as-written", "LF, XY"),
        ],
        env=environment(),
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert said.startswith(f"bb: 11 numbers of a backdoorbench file in {tmp_path / 'imported'}/")
    assert said.splitlines()[0].endswith("; names as written: LF")
    assert {record["dataset"] for record in numbers(tmp_path)} == {"CIFAR 10"}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--about", "dataset"], "'dataset' is no NAME=VALUE"),
        (["--about", "dataset=a dataset=b"], "dataset is given twice"),
        (["--about", "dataset='a"], "No closing quotation"),
        (["--kind", "excel"], "no kind 'excel' of file. There are: table, backdoorbench."),
        (["--about", "rate=1%"], "does not tell its dataset"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    more: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bb.md").write_text(WIDE)
    done = call(capsys, "import", tmp_path / "bb.md", "--as", "bb", "--out", tmp_path, *more)
    assert done.code in (1, 2)
    assert says in done.err
    gone = call(capsys, "import", tmp_path / "nothing.csv", "--as", "bb", "--out", tmp_path)
    assert "nothing.csv: cannot be read (No such file" in gone.err


def test_imports_alone_are_no_board(tmp_path: Path) -> None:
    take(tmp_path / "in", table())
    assert len(Results(tmp_path / "in").published(bundled=False)) == 1
    with pytest.raises(ResultsError, match="No results in"):
        load(tmp_path / "in", Asked())
