"""The report of results: what it holds, and how it behaves in a real browser."""

from __future__ import annotations

import re
import subprocess
import sys
from html import unescape
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from analysis.appendix import BLOCKS, appendix, in_blocks
from analysis.board import load_board
from analysis.captions import TITLES, caption
from analysis.leaderboard import Asked, load
from analysis.leaderboard import text as leaderboard_text
from analysis.methods import method_of, methods_of
from analysis.page import Shown, Told
from analysis.render import COLUMNS
from analysis.report import _duration, write_report
from analysis.report_tables import sorted_cell
from analysis.standing_render import HEADINGS
from analysis.words import BY_HEADING, amount
from grid.schema.writing import write_grid, write_rows, write_table
from tests.boards import steady, write_board, write_pictures
from tests.grids import call, environment
from tests.rows import EPOCH, cell_columns, cell_rows

if TYPE_CHECKING:
    from tests.browsers import Open

ATTACKS = ("badnet", "blended", "sig", "wanet", "trojvqa", "badclip")
HOSTILE = "<img src=x onerror=window.hit=1>"
ASR = {
    "none": steady(0.95, 0.01),
    "finetune": steady(0.4, 0.03),
    "cleanclip": steady(0.3, 0.03),
    "roclip": steady(0.1, 0.03),
    "oracle_filter": steady(0.01, 0.01),
    HOSTILE: steady(0.5, 0.03),
}
SECTIONS = (
    *("What was run", "Are the victims sound?", "Where defenses stand", "The board"),
    *("Against finetune", "Figures", "Attack by attack", "What this can and cannot tell"),
    "Methods",
)


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("board")
    gone = {("roclip", "sig", "0.01", 0): "failed_method"}
    write_board(folder, ASR, attacks=ATTACKS, rates=("0", "0.01"), status=gone)
    for defense in ("none", "finetune"):
        write_pictures(folder, f"badnet-0.01-{defense}-0-0", [True, False], [True, True], [1, 2])
    return folder


@pytest.fixture(scope="module")
def page(board: Path) -> str:
    return write_report(board, board / "report.html", Asked()).read_text()


def test_every_part_is_there_and_nothing_is_fetched(page: str) -> None:
    for title in SECTIONS:
        assert f">{title}</h2>" in page
    for drawn in ("ASR by attack and defense", "Accuracy against safety", "Ranks", "Cost"):
        assert f'alt="{drawn}: ' in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert HOSTILE not in page
    assert "3 seeds, indicative" in page
    assert "failed" in page
    assert "ft (FT)" not in page
    assert "Fine-tune (FT): keep training the victim" in page, "the appendix is the docstring"


def test_the_command_writes_it_beside_the_results_with_nothing_heavy(
    board: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = call(capsys, "report", board, "--out", tmp_path / "deep" / "x.html")
    assert said.out.strip() == str(tmp_path / "deep" / "x.html")
    assert (tmp_path / "deep" / "x.html").stat().st_size > 10_000
    code = (
        "import sys; from grid.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as ended: assert not ended.code\n"
        "assert not {'torch', 'ray', 'open_clip'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code, "report", str(board), "--out", str(tmp_path / "y.html")],
        env=environment(),
        check=True,
        capture_output=True,
    )
    nowhere = call(capsys, "report", tmp_path / "nothing")
    assert (nowhere.code, "there is no such directory" in nowhere.err) == (2, True)


def test_a_grid_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    failed = {("none", a, "0.01", s): "invalid_victim" for a in ATTACKS for s in (0, 1, 2)}
    write_board(tmp_path, {"none": steady(0.3)}, attacks=ATTACKS, status=failed)
    text = write_report(tmp_path, tmp_path / "report.html", Asked()).read_text()
    assert "No sound victim has numbers yet." in text
    assert "Against" not in text


def test_pictures_of_attacks_join_where_they_were_drawn(board: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "board"
    shutil.copytree(board, folder)
    from PIL import Image

    Image.new("RGB", (8, 8), "red").save(folder / "gallery.png")
    text = write_report(folder, folder / "report.html", Asked()).read_text()
    assert 'alt="Pairs before and after each attack' in text


def test_methods_are_found_by_their_labels() -> None:
    assert method_of("cleanclip@tune-demo", "defenses") == "cleanclip"
    assert method_of("cgd_classifier-strong", "defenses") == "cgd_classifier"
    assert method_of("badnet-big", "attacks") == "badnet"
    assert method_of("badnets", "attacks") is None
    assert all(method.told and method.idea for method in methods_of("attacks").values())
    assert methods_of("defenses")["finetune"].told.startswith("Fine-tune (FT)")


def test_methods_are_told_block_by_block_and_those_of_one_file_each_in_its_own_words() -> None:
    head, named = in_blocks(
        "A: b.\n\nIdea: c\n    d.\nSymbols: P = ``p`` (1; 2); Q = q.\nWhere: x -> `f`.\nCost: none."
    )
    assert head == "A: b."
    symbols = ("Symbols", ["P = ``p`` (1; 2)", "Q = q."])
    assert named == [("Idea", ["c d."]), symbols, ("Where", ["x -> `f`."]), ("Cost", ["none."])]
    told = appendix(["badnet"], ["none", "oracle_filter", "finetune"])
    assert [part.title for part in told.parts] == [
        *("badnet (attack)", "none, oracle_filter (defenses)", "finetune (defense)")
    ]
    (own,) = [block for block in told.parts[1].blocks if isinstance(block, Told)][:1]
    assert dict(own.pairs)["none"] == ["The undefended victim."]
    for package in ("attacks", "defenses"):
        for method in methods_of(package).values():
            assert [name for name, _ in in_blocks(method.told)[1]] == list(BLOCKS), method.name


def test_every_column_of_boards_is_explained() -> None:
    headings = {*HEADINGS, *(column.heading for column in COLUMNS)}
    assert headings - {"Defense"} - set(BY_HEADING) == set()


def test_captions_promise_no_more_than_there_is() -> None:
    for name in TITLES:
        assert "seeds" not in caption(name, 1)
    assert "victim seeds" in caption("trade_off", 3)


def test_rates_have_one_form(page: str) -> None:
    assert amount(0.0003, 15) == "0.03 % (15 rows)"
    assert (amount(None, 1), amount(0.0, 0)) == ("1 row", "0 %")
    for cell in (">1 %<", ">1 % (41 rows)<"):
        assert cell in page
    assert ">rate 1 %" not in page


def test_what_is_said_of_many_comparisons_follows_holm_over_seeds_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each by itself has p = 0.0286 over three seeds, t = 5.77; of two that is 0.057."""
    monkeypatch.setattr("analysis.report.figures_in", lambda *_: {})
    lean = (0.47, 0.5, 0.53)
    asr = {"none": steady(0.95), "finetune": steady(0.6)}
    asr |= dict.fromkeys(("d0", "d1"), lambda attack, rate, seed: lean[seed])
    write_board(tmp_path, asr, attacks=[f"attack{i}" for i in range(9)])
    text = write_report(tmp_path, tmp_path / "report.html", Asked()).read_text()
    table = text[text.index('id="comparisons"') : text.index('id="against-d0"')]
    assert "by no more than victim seeds vary it (p 0.057)" in table
    assert "leaves the smaller ASR" not in table
    monkeypatch.setattr("analysis.report.MOST_COMPARED", 1)
    text = write_report(tmp_path, tmp_path / "report.html", Asked()).read_text()
    assert "d0 leaves the smaller ASR over strata." in text


def test_what_is_said_of_many_comparisons_follows_holm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six attacks give p = 0.031 at best, and no p of a family of five is below 0.05 then."""
    monkeypatch.setattr("analysis.report.figures_in", lambda *_: {})
    better = {f"d{i}": steady(0.2 + i / 50, 0.01, seed=i) for i in range(5)}
    write_board(
        tmp_path,
        {"none": steady(0.95), "finetune": steady(0.6, 0.01), **better},
        attacks=ATTACKS,
        seeds=[0, 1, 2],
    )
    text = write_report(tmp_path, tmp_path / "report.html", Asked()).read_text()
    table = text[text.index('id="comparisons"') : text.index('id="against-d0"')]
    assert "0.0312" in table
    assert "leaves the smaller ASR" not in table
    assert table.count(">Not told apart over strata.<") == 5
    assert "left out" not in table
    monkeypatch.setattr("analysis.report.MOST_COMPARED", 1)
    text = write_report(tmp_path, tmp_path / "report.html", Asked()).read_text()
    said = "4 of 5 defenses are left out: <code>grid compare DEFENSE finetune</code> compares them."
    assert said in text
    assert "d0 leaves the smaller ASR over strata." in text


def test_what_was_run_is_told_in_full(tmp_path: Path) -> None:
    """A changed working tree looked like its commit, invalid victims were not there, and 14.6
    seconds were 0.00 hours."""
    rows, cells = [], []
    for seed, attack in product(range(2), ("badnet", "blended", "sig")):
        ended = "invalid_victim" if attack == "sig" else "ok"
        about: Any = {"victim_key": f"victim-{attack}-{seed}", "commit": "0123456789abcdef-dirty"}
        cells.append(cell_columns(attack, "0.01", "none", seed))
        rows += cell_rows(attack, "0.01", "none", seed, status=ended, **about)
    write_rows(tmp_path, rows)
    write_grid(tmp_path, "told", "0", cells)
    stage: dict[str, Any] = {"key": "victim-0", "kind": "victim", "name": "a victim", "inputs": []}
    stage |= {"started_at": EPOCH, "ended_at": EPOCH, "reused": False}
    write_table(tmp_path, "stages", [{**stage, "seconds": 14.6, "device_seconds": 9.0}])
    text = write_report(tmp_path, tmp_path / "report.html", Asked()).read_text()
    what = text[text.index('<section id="what"') : text.index('<section id="validity"')]
    facts = dict(re.findall(r"<div><dt>([^<]*)</dt><dd>([^<]*)</dd></div>", what))
    assert facts["Victims"] == "6 models, 2 of them invalid, 2 seeds"
    assert facts["Code"] == "0123456789ab (modified)"
    assert facts["Cost"] == "14.6 s of stages, 9.0 s of it training; 0 attempts failed"
    assert facts["Written"] == f"{EPOCH:%Y-%m-%d %H:%M} UTC"
    assert "`" not in re.sub(r"<script>.*?</script>|<style>.*?</style>", "", text, flags=re.DOTALL)
    assert "<code>grid gallery</code>" in text
    assert _duration(900) == "15.0 min"
    assert _duration(9000) == "2.5 hours"


def test_numbers_of_an_html_table_are_not_broken(board: Path) -> None:
    """3e-3 stood on two lines."""
    shown = leaderboard_text(load(board, Asked()), Asked(), "html")
    numbers = re.findall(r'<td style="([^"]*)">[\d.]+ \[', shown)
    assert numbers
    assert set(numbers) == {"text-align:right;white-space:nowrap"}


def test_a_board_too_long_for_a_page_is_cut_and_says_so(
    board: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20,000 lines were a page of 14 MB, and figures of thousands of panels took an hour."""
    monkeypatch.setattr("analysis.report.figures_in", lambda *_: {})
    whole = write_report(board, tmp_path / "whole.html", Asked()).read_text()
    assert "The first" not in whole
    monkeypatch.setattr("analysis.report.MOST_LINES", 10)
    monkeypatch.setattr("analysis.report.MOST_VICTIMS", 2)
    text = write_report(board, tmp_path / "cut.html", Asked()).read_text()
    lines = load_board(board).lines
    said = f"The first 10 of {len(lines)} lines, by attack: `grid leaderboard {board.name} --part"
    assert said in unescape(re.sub(r"</?code>", "`", text))
    own = text[text.index('id="table:board"') :]
    assert own[: own.index("</table>")].count('<th scope="row"') == 10
    victims = text[text.index('id="table:cells-roclip"') :]
    assert victims[: victims.index("</table>")].count('<th scope="row"') == 2
    assert "The first 2 of" in text


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0.981 / 50.0", 0.981),
        ("1e-5..1e-3 ?", 1e-5),
        ("-12.5 [-20.0, -5.0]", -12.5),
        ("+3.0", 3.0),
        ("1-3", 1),
        ("25.0 to 30.5 (80 % there)", 25.0),
    ],
)
def test_numbers_sort_as_numbers(text: str, number: float) -> None:
    assert sorted_cell(text, is_number=True) == Shown(text, number)


def test_small_p_sorts_first_and_nothing_last() -> None:
    texts = ("0.001", "<0.001", "0.002", "0.0009")
    cells = [sorted_cell(text, is_number=True) for text in texts]
    assert all(isinstance(cell, Shown) for cell in cells)
    order = sorted((cell.sort, cell.text) for cell in cells if isinstance(cell, Shown))
    assert [text for _, text in order] == ["0.0009", "<0.001", "0.001", "0.002"]
    unknown = sorted_cell("–", is_number=True)
    assert isinstance(unknown, Shown)
    assert unknown.sort != unknown.sort, "not a number"


# --- in a browser


def test_it_opens_in_peace_and_its_board_sorts_and_filters(view: Open, page: str) -> None:
    shown = view(page)
    assert shown.title().startswith("made: backdoor attacks and defenses")
    assert shown.evaluate("window.hit") is None
    board = shown.locator("section#board table")
    count = shown.locator("section#board").get_by_text("of 72 rows")
    assert count.inner_text() == "72 of 72 rows"
    board.locator("thead th", has_text="ASR %").get_by_role("button").click()
    names = board.locator("tbody tr:not([hidden]) th")
    sorted_names = names.all_inner_texts()
    assert sorted_names[:2] == ["defenses", "roclip"], "the smallest ASR of a defense comes first"
    assert sorted_names[-13:] == ["controls, not compared", *["oracle_filter"] * 12], (
        "and stay apart"
    )
    shown.locator("section#board select").first.select_option("sig")
    assert count.inner_text() == "12 of 72 rows"
    shown.locator("section#board").get_by_role("searchbox").fill("roclip")
    assert names.all_inner_texts() == ["defenses", "roclip", "roclip"], "no head heads nothing"


def test_tables_fit_a_laptop_and_show_numbers_on_a_telephone(view: Open, page: str) -> None:
    """What a table is read for was out of sight: the numbers, and what is only a control."""
    shown = view(page, viewport={"width": 1200, "height": 900})
    for name in ("tiers", "board"):
        box = shown.locator(f"section#{name} .box")
        right = box.evaluate("box => box.getBoundingClientRect().right")
        for heading in ("Mean ASR %", "CA lost", "Lift", "R-Acc", "Cost", "Status"):
            for cell in box.locator("thead th", has_text=heading).all():
                assert cell.evaluate("cell => cell.getBoundingClientRect().right") <= right
    narrow = view(page, viewport={"width": 400, "height": 800})
    for name, heading in (("tiers", "Mean ASR %"), ("board", "Clean acc. %")):
        cell = narrow.locator(f"section#{name} thead th", has_text=heading)
        assert cell.evaluate("cell => cell.getBoundingClientRect().right") <= 400


def test_every_figure_has_a_size_and_a_text(view: Open, page: str) -> None:
    shown = view(page)
    images = shown.locator("figure img")
    assert images.count() >= 5
    for place in range(images.count()):
        image = images.nth(place)
        assert image.get_attribute("alt")
        assert image.evaluate("image => image.naturalWidth") > 100
