"""Others' numbers: read strictly, all or none, with where they came from."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grid.schema.columns import IMPORTED
from grid.schema.errors import SchemaError
from tests.grids import call, environment
from tests.imports import numbers, only, table, take

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
        ({"doi": "2206.12654"}, "doi '2206.12654' is none: one begins with 10."),
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
        (table() + "a,b\n", "line 3: 15 fields are wanted, found fewer"),
        (table().replace('"CIFAR-10"', "a,b"), "line 2: 15 fields are wanted, found more"),
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


# --- the command


def test_the_command_says_what_it_did_with_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "bb.md").write_text(WIDE.replace("LC", "LF"))
    (tmp_path / "rows").mkdir()
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
    assert said.splitlines()[1:] == [
        "  badnet, none, rate 1 %, CIFAR 10, PreAct-Resnet18: CA 91.32 %, ASR 95.03 %,"
        " R-Acc 4.67 %",
        "  badnet, finetune, rate 1 %, CIFAR 10, PreAct-Resnet18: CA 89.96 %, ASR 1.48 %,"
        " R-Acc 89.39 %",
        "  LF (as written), none, rate 1 %, CIFAR 10, PreAct-Resnet18: CA 84.59 %, ASR 99.92 %,"
        " R-Acc 0.07 %",
        "  LF (as written), finetune, rate 1 %, CIFAR 10, PreAct-Resnet18: CA 90.6 %, ASR 11.53 %",
        f"board: grid leaderboard {tmp_path}",
    ]
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
    (tmp_path / "rows").mkdir()
    done = call(capsys, "import", tmp_path / "bb.md", "--as", "bb", "--out", tmp_path, *more)
    assert done.code in (1, 2)
    assert says in done.err
    gone = call(capsys, "import", tmp_path / "nothing.csv", "--as", "bb", "--out", tmp_path)
    assert "nothing.csv: cannot be read (No such file" in gone.err


def test_a_large_bare_rate_draws_a_caution_and_many_lines_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows").mkdir()
    many = [{"rate": f"0.{i}", "setting": f"run {i}"} for i in (1, 3, *range(10, 23))]
    few = [{"rate": "30%"}, {"rate": "0.05", "setting": "x"}]
    for name, rows in (("many", many), ("few", few)):
        (tmp_path / f"{name}.csv").write_text(table(*rows))
    words = ("--out", tmp_path, "--as")
    said = call(capsys, "import", tmp_path / "many.csv", *words, "many").out
    assert "caution: rate 0.3 is 30 %: write 0.3% if" in said
    assert f"  and {len(many) - 12} more" in said
    assert "caution" not in call(capsys, "import", tmp_path / "few.csv", *words, "few").out


def test_no_results_directory_is_made_for_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistyped one came into being, and the numbers were never seen beside the board."""
    monkeypatch.setenv("GRID_HOME", str(tmp_path))
    (tmp_path / "demo" / "rows").mkdir(parents=True)
    (tmp_path / "t.csv").write_text(table())
    for out, says in (("dmeo", "Did you mean 'demo'?"), (tmp_path, "no results of a grid")):
        told = call(capsys, "import", tmp_path / "t.csv", "--as", "x", "--out", out)
        assert (told.code, says in told.err) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo", "t.csv"]
