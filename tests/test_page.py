"""The page that stands alone: in a browser, from a disk, with hostile names and much to show."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import pytest

from analysis.page import (
    Block,
    Cell,
    Column,
    Facts,
    Notes,
    Picture,
    Prose,
    Section,
    Shown,
    Table,
    Told,
    page,
)

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from tests.browsers import Open

LEAST_CONTRAST = 4.5
MOST_SECONDS = 5.0
MOST_SECONDS_TO_MOVE = 1.5
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42"
    "mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
SVG = (
    b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9" onload="top.hit = 1">'
    b"<script>top.hit = 1</script></svg>"
)
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</script><script>window.hit = 1</script>",
    '" onmouseover="window.hit = 1" autofocus onfocus="window.hit = 1',
    "'><svg onload=window.hit=1>",
    "</style></title></textarea></select><!--",
    "&lt;b&gt; &amp; javascript:window.hit=1",
    "line\u2028break",
)
COLUMNS = (
    Column(name="defense", heading="Defense"),
    Column(name="attack", heading="Attack", help="What the victim was poisoned with."),
    Column(name="score", heading="Score", is_number=True),
    Column(name="status", heading="Status"),
)
ROWS = (
    ("anp", "badnet", 9.0, Shown("done", 0.0, "good")),
    ("finetune", "badnet", None, Shown("failed", 2.0, "bad")),
    ("cleanclip", "wanet", Shown("10.0 [8, 12]", 10.0), Shown("done", 0.0)),
    ("roclip", "wanet", Shown("n/a", float("nan"), "muted"), Shown("short", 1.0, "muted")),
    ("none", "badnet", -2.5, Shown("done", 0.0)),
    ("safeclip", "wanet", 9.0, Shown("done", 0.0)),
)
NAMES = [str(row[0]) for row in ROWS]
BOARD = Table(
    name="board",
    caption="All cells",
    columns=COLUMNS,
    rows=ROWS,
    filters=["attack", "status"],
)


def section(*blocks: Block, name: str = "only", parts: tuple[Section, ...] = ()) -> Section:
    return Section(name=name, title=name.title(), blocks=blocks, parts=parts)


def whole() -> str:
    """A page with one of everything."""
    inner = section(Prose("Deep."), name="inner")
    parts = (
        section(replace(BOARD, name="of anp"), name="anp", parts=(inner,)),
        section(Notes(["Two seeds."]), name="ft"),
    )
    picture = Picture(alt="A dot", caption="One dot", data=PNG, kind="png")
    return page(
        "A board",
        [
            section(
                Prose("First words.\n\nSecond\nparagraph."),
                Notes(["Few seeds."], is_warning=True),
                Notes(["An aside."]),
                Facts(pairs=[("grid", "board.yaml"), ("cells", "6")]),
                name="summary",
            ),
            section(BOARD, name="board"),
            section(picture, replace(picture, data=SVG, kind="svg"), name="figures"),
            section(Prose("Each in turn."), name="defenses", parts=parts),
        ],
        subtitle="Three seeds",
        made="Made today",
    )


def text_of(html: str, tag: str) -> list[str]:
    return re.findall(rf"<{tag}(?: [^>]*)?>(.*?)</{tag}>", html, re.DOTALL)


# ---- Without a browser ---------------------------------------------------------------------------


def test_the_policy_names_the_one_script() -> None:
    html = whole()
    (script,) = text_of(html, "script")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    assert len(policy) == 1
    assert policy[0].split("; ")[:4] == [
        *("default-src 'none'", "img-src data:", "style-src 'unsafe-inline'"),
        f"script-src 'sha256-{digest}'",
    ]
    assert "<!--" not in script


def test_a_page_points_nowhere() -> None:
    html = re.sub(r"base64,[A-Za-z0-9+/=]*", "", whole())
    assert not re.findall(r"https?:|[\"'(]//|@import|url\(|\bsrc=\"(?!data:)", html)
    assert all(link.startswith("#") for link in re.findall(r'<a [^>]*href="([^"]*)"', html))


def test_the_same_input_makes_the_same_page() -> None:
    assert whole() == whole()


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_never_markup(text: str) -> None:
    html = page(text, [hostile_section(text)], subtitle=text, made=text)
    plain = page("t", [hostile_section("t")], subtitle="t", made="t")
    assert re.findall(r"<[a-z!/]+", html) == re.findall(r"<[a-z!/]+", plain)


def hostile_section(text: str) -> Section:
    """A text in every place that a caller can fill."""
    table = Table(
        name=text,
        caption=text,
        columns=[
            Column(name=text, heading=text, help=text),
            Column(name="n", heading=text, is_number=True, help=text),
        ],
        rows=[[text, Shown(text, 1.0)], [Shown(text, text), text], [None, None]],
        filters=[text],
    )
    picture = Picture(alt=text, caption=text, data=SVG, kind="svg")
    blocks = (Prose(text), Notes([text]), Notes([text], True), Facts(pairs=[(text, text)]))
    part = Section(name=f"part {text}", title=text, blocks=[])
    return Section(name=text, title=text, blocks=[*blocks, table, picture], parts=[part])


def test_what_no_document_may_hold_is_replaced() -> None:
    """Halves of surrogate pairs come from file names, and could not even be written."""
    html = page("nul\0 half\ud800 turned\u202e bell\a\r\nline", [])
    html.encode()
    assert text_of(html, "h1") == ["nul\ufffd half\ufffd turned\ufffd bell\ufffd\nline"]


def test_bare_numbers_show_six_digits_and_sort_by_all() -> None:
    numbers = [0.1 + 0.2, 3, 1e6, 1.23456789, 1e-7, float("inf"), float("-inf"), float("nan"), None]
    table = Table(
        name="numbers",
        caption="",
        columns=[Column(name="x", heading="x", is_number=True)],
        rows=[[number] for number in numbers],
    )
    html = page("Numbers", [section(table)])
    shown = ["0.3", "3", "1000000", "1.23457", "1e-07", "∞", "-∞", "–", "–"]
    assert [re.sub("<.*?>", "", row) for row in text_of(html, "tr")[1:]] == shown
    keys = ["0.30000000000000004", "3.0", "1000000.0", "1.23456789", "1e-07"]
    assert re.findall(r'data-number="(.*?)"', html) == [*keys, "Infinity", "-Infinity"]


def test_different_names_have_different_anchors() -> None:
    names = ["a b", "a-b", "a~20~b", "a%20b", "A b", "ä"]
    html = page("Names", [section(name=name) for name in names])
    ids = re.findall(r'<section id="([^"]*)"', html)
    assert len(set(ids)) == len(names)
    assert re.findall(r'<li><a href="#([^"]*)"', html) == ids
    assert not any(re.search(r"[\s%:]", name) for name in ids)


def test_names_that_occur_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="2 x section 'a'"):
        page("t", [section(name="a"), section(name="b", parts=(section(name="a"),))])
    with pytest.raises(ValueError, match="2 x table 'board'"):
        page("t", [section(BOARD, name="a"), section(BOARD, name="b")])
    with pytest.raises(ValueError, match="1 x section ''"):
        page("t", [section(name="")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": ()}, "name one or more"),
        ({"columns": (COLUMNS[0], COLUMNS[0])}, "each once"),
        ({"filters": ["atack"]}, "no column .'atack'. to filter by"),
        ({"rows": [["a", "b", 1.0, "d"], ["a"]]}, "row 1 has 1 cells for 4 columns"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"table 'board': .*{message}"):
        replace(BOARD, **changes)


def test_what_is_empty_leaves_nothing_behind() -> None:
    html = page("Empty", [section(Prose(" \n\n "), Notes([], True))])
    assert "<p" not in html.split("</h2>")[1]
    assert 'class="warning"' not in html
    assert "<footer" not in html


# ---- In a browser --------------------------------------------------------------------------------


def names(shown: Page) -> list[str]:
    """The first column of the first table, as far as it is in view."""
    rows = shown.locator("table").first.locator("tbody tr:not([hidden]) th")
    return [str(text) for text in rows.all_inner_texts()]


def head(shown: Page, heading: str) -> Any:
    return shown.locator("table").first.locator("thead th", has_text=heading)


def test_a_whole_page_opens_in_peace(view: Open) -> None:
    shown = view(whole())
    assert shown.title() == "A board"
    assert shown.locator("html").get_attribute("lang") == "en"
    assert names(shown) == NAMES
    assert shown.locator("button.theme").is_visible()


def test_a_click_sorts_up_then_down_then_as_it_came(view: Open) -> None:
    """Equal scores keep their order, both ways; what has none is last, both ways."""
    shown = view(whole())
    score = head(shown, "Score")
    assert score.get_attribute("aria-sort") is None
    score.get_by_role("button").click()
    assert score.get_attribute("aria-sort") == "ascending"
    assert names(shown) == ["none", "anp", "safeclip", "cleanclip", "finetune", "roclip"]
    score.get_by_role("button").click()
    assert score.get_attribute("aria-sort") == "descending"
    assert names(shown) == ["cleanclip", "anp", "safeclip", "none", "finetune", "roclip"]
    score.get_by_role("button").click()
    assert score.get_attribute("aria-sort") is None
    assert names(shown) == NAMES


def test_one_column_sorts_at_a_time_and_ties_keep_the_sort_before(view: Open) -> None:
    shown = view(whole())
    head(shown, "Defense").get_by_role("button").click(click_count=2)
    head(shown, "Attack").get_by_role("button").click()
    assert names(shown) == ["none", "finetune", "anp", "safeclip", "roclip", "cleanclip"]
    assert shown.locator("[aria-sort]").count() == 1


def test_a_shown_text_sorts_by_its_key(view: Open) -> None:
    shown = view(whole())
    head(shown, "Status").get_by_role("button").click()
    assert names(shown)[-2:] == ["roclip", "finetune"]


def test_the_keyboard_reaches_and_sorts(view: Open) -> None:
    shown = view(whole())
    shown.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.className") == "skip"
    shown.keyboard.press("Enter")
    assert shown.evaluate("document.activeElement.localName") == "main"
    reached: list[str] = []
    while "Score" not in reached and len(reached) < 20:
        shown.keyboard.press("Tab")
        reached.append(shown.evaluate("document.activeElement.textContent"))
    assert reached[-3:] == ["Defense", "Attack", "Score"]
    shown.keyboard.press("Enter")
    assert names(shown)[0] == "none"
    shown.keyboard.press("Space")
    assert head(shown, "Score").get_attribute("aria-sort") == "descending"
    assert names(shown)[0] == "cleanclip"
    assert shown.evaluate("document.activeElement.textContent") == "Score"


def test_numbers_sort_as_numbers_and_infinities_last_but_for_the_missing(view: Open) -> None:
    values: list[Cell] = [
        10,
        None,
        float("inf"),
        9.5,
        Shown("text", "text"),
        float("-inf"),
        1e-3,
        "word",
    ]
    columns = [COLUMNS[0], COLUMNS[2]]
    rows: list[list[Cell]] = [[str(index), value] for index, value in enumerate(values)]
    shown = view(page("t", [section(replace(BOARD, columns=columns, rows=rows, filters=()))]))
    head(shown, "Score").get_by_role("button").click()
    assert names(shown) == ["5", "6", "3", "0", "2", "1", "4", "7"]
    head(shown, "Score").get_by_role("button").click()
    assert names(shown) == ["2", "0", "3", "6", "5", "1", "4", "7"]


def test_filters_by_text_and_by_choice_and_counts(view: Open) -> None:
    shown = view(whole())
    figure = shown.locator("figure.table").first
    count, search = figure.get_by_role("status"), figure.get_by_role("searchbox")
    assert count.get_attribute("aria-live") == "polite"
    assert count.inner_text() == "6 of 6 rows"
    search.fill("CLIP wan")
    assert names(shown) == ["cleanclip", "roclip", "safeclip"]
    assert count.inner_text() == "3 of 6 rows"
    figure.get_by_label("Status").select_option("done")
    assert names(shown) == ["cleanclip", "safeclip"]
    assert count.inner_text() == "2 of 6 rows"
    # Sorting brings nothing back, and no word is found across two cells.
    head(shown, "Defense").get_by_role("button").click(click_count=2)
    assert names(shown) == ["safeclip", "cleanclip"]
    search.fill("safeclipwanet")
    assert count.inner_text() == "0 of 6 rows"
    search.fill("")
    figure.get_by_label("Attack").select_option("badnet")
    assert sorted(names(shown)) == ["anp", "none"]
    assert shown.locator("figure.table").nth(1).locator("tr[hidden]").count() == 0


GROUPED = replace(BOARD, heads=["defenses"] * 4 + ["controls"] * 2)


def test_rows_stay_under_their_heads_when_sorted_and_filtered(view: Open) -> None:
    shown = view(page("t", [section(GROUPED)]), init=CLIPBOARD % "window.copied = text")
    assert names(shown) == ["defenses", *NAMES[:4], "controls", *NAMES[4:]]
    head(shown, "Score").get_by_role("button").click(click_count=2)
    controls = ["controls", "safeclip", "none"]
    assert names(shown) == ["defenses", "cleanclip", "anp", "finetune", "roclip", *controls]
    shown.get_by_role("searchbox").fill("safeclip")
    assert names(shown) == ["controls", "safeclip"]
    assert shown.get_by_role("status").inner_text() == "1 of 6 rows"
    shown.get_by_role("button", name="Copy as CSV").click()
    shown.get_by_role("button", name="Copied 1 rows").wait_for()
    lines = shown.evaluate("window.copied").split("\r\n")
    assert lines == ["Defense,Attack,Score,Status,Group", "safeclip,wanet,9,done,controls", ""]


def test_one_head_for_all_is_none_and_a_missing_one_is_refused() -> None:
    assert 'class="group"' not in page("t", [section(replace(BOARD, heads=["defenses"] * 6))])
    with pytest.raises(ValueError, match="2 heads for 6 rows"):
        replace(BOARD, heads=["a", "b"])


def test_intervals_may_go_below_and_code_is_code() -> None:
    html = page("t", [section(BOARD, Told(pairs=[("Where", ["L -> ``f`` of `g_<b>`"])]))])
    assert "10.0 <small>[8, 12]</small></td>" in html
    assert "<dd>L -&gt; <code>f</code> of <code>g_&lt;b&gt;</code></dd>" in html


CLIPBOARD = (
    "Object.defineProperty(navigator, 'clipboard', {value: {writeText: async (text) => {%s}}})"
)


def test_copies_what_is_in_view_as_csv(view: Open) -> None:
    """A spreadsheet runs what begins like a formula, so that it is copied as a text."""
    rows: list[Sequence[Cell]] = [
        ["=HYPERLINK(1)", 'say "a, b"', -1.5, "+x"],
        ["two\nlines", "-", None, "@y"],
        ROWS[0],
    ]
    table = replace(BOARD, rows=rows, filters=())
    shown = view(page("t", [section(table)]), init=CLIPBOARD % "window.copied = text")
    shown.get_by_role("searchbox").fill("y")
    shown.get_by_role("button", name="Copy as CSV").click()
    shown.get_by_role("button", name="Copied 2 rows").wait_for()
    assert list(csv.reader(io.StringIO(shown.evaluate("window.copied"), newline=""))) == [
        ["Defense", "Attack", "Score", "Status"],
        ["'=HYPERLINK(1)", 'say "a, b"', "-1.5", "'+x"],
        ["two\nlines", "'-", "", "'@y"],
    ]


@pytest.mark.parametrize(
    "closed", [CLIPBOARD % "throw new Error('no')", "delete navigator.__proto__.clipboard"]
)
def test_offers_the_csv_where_the_clipboard_is_closed(view: Open, closed: str) -> None:
    shown = view(page("t", [section(BOARD)]), init=closed)
    shown.get_by_role("button", name="Copy as CSV").click()
    area = shown.get_by_label("The clipboard is closed")
    area.wait_for()
    assert shown.evaluate("getSelection().toString()") == area.input_value()
    assert area.input_value().splitlines()[1] == "anp,badnet,9,done"
    shown.get_by_role("button", name="Close").click()
    assert area.count() == 0
    assert shown.evaluate("document.activeElement.className") == "copy"


def ground(shown: Page) -> str:
    return str(shown.evaluate("getComputedStyle(document.body).backgroundColor"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_is_the_systems_until_chosen_and_is_forgotten(view: Open, scheme: str) -> None:
    shown = view(whole(), color_scheme=scheme)
    toggle, before = shown.locator("button.theme"), ground(shown)
    other: Literal["dark", "light"] = "dark" if scheme == "light" else "light"
    assert toggle.inner_text() == f"{other.title()} theme"
    toggle.click()
    after = ground(shown)
    assert after != before
    assert toggle.inner_text() == f"{scheme.title()} theme"
    toggle.click()
    assert ground(shown) == before
    toggle.click()
    shown.reload()
    assert ground(shown) == before
    shown.emulate_media(color_scheme=other)
    shown.get_by_role("button", name=f"{scheme.title()} theme").wait_for()
    assert ground(shown) == after


CONTRASTS = """() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const [r, g, b] = numbers(color).map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let node = element; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      const alpha = numbers(color)[3] ?? 1;
      if (alpha === 1) return color;
      if (alpha !== 0) throw new Error(`half a ground: ${color}`);
    }
  };
  const found = [];
  const note = (element, pseudo) => {
    const [a, b] = [getComputedStyle(element, pseudo).color, ground(element)].map(light);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([`${element.localName}.${element.className}${pseudo ?? ""}`, ratio]);
  };
  for (const element of document.body.querySelectorAll("*")) {
    const says = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!says || ["SCRIPT", "OPTION"].includes(element.tagName)) continue;
    note(element);
    if (element.matches("th button")) note(element, "::after");
  }
  for (const element of document.querySelectorAll("input, select")) note(element);
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(view: Open, scheme: str) -> None:
    shown = view(whole(), color_scheme=scheme)
    head(shown, "Score").get_by_role("button").click()
    shown.get_by_role("button", name="Open all").first.click()
    ratios = shown.evaluate(CONTRASTS)
    kinds = {kind for kind, _ in ratios}
    assert {"p.", "a.", "p.subtitle", "button.copy", "td.bad", "td.good", "td.muted"} <= kinds
    assert [(kind, ratio) for kind, ratio in ratios if ratio < LEAST_CONTRAST] == []


def test_headings_descend_by_one_and_images_say_what_they_show(view: Open) -> None:
    shown = view(whole())
    script = "[...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].map((h) => +h.localName[1])"
    levels = shown.evaluate(script)
    assert levels == [1, 2, 2, 2, 2, 3, 4, 3]
    assert all(after - before <= 1 for before, after in pairwise(levels))
    images = shown.locator("img")
    assert [image.get_attribute("alt") for image in images.all()] == ["A dot", "A dot"]
    assert shown.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 0)")
    assert shown.locator("figure:has(img) figcaption").all_inner_texts() == ["One dot", "One dot"]


def test_hostile_texts_are_only_texts(view: Open) -> None:
    sections = [hostile_section(text) for text in HOSTILE]
    shown = view(page(HOSTILE[0], sections, subtitle=HOSTILE[1], made=HOSTILE[2]))
    titles = shown.locator("h2").all_text_contents()
    assert titles == list(HOSTILE)
    tables = shown.locator("table")
    for index, text in enumerate(HOSTILE):
        table = tables.nth(index)
        assert table.locator("tbody tr").nth(1).locator("td").text_content() == text
        table.locator("thead button").first.click()
        figure = shown.locator("figure.table").nth(index)
        figure.locator("select").select_option(index=1)
        assert figure.locator(".count").inner_text() == "2 of 3 rows"
        figure.locator(".copy").click()
    assert shown.locator("script").count() == 1
    assert shown.locator("img").count() == len(HOSTILE)
    assert shown.locator("main svg, [onload], [onerror], [onmouseover], [onfocus]").count() == 0
    links = shown.locator("nav a")
    for index in range(links.count()):
        links.nth(index).click()
        assert shown.evaluate("document.querySelector(':target') !== null")
    assert shown.evaluate("window.hit") is None


def test_the_policy_stops_what_is_not_ours(view: Open) -> None:
    """Were a text to become markup after all, it could neither run nor ask anybody."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        image = f"<img src='http://127.0.0.1:{server.getsockname()[1]}/x' onerror='hit = 1'>"
        intruders = f"<script>window.hit = 1</script>{image}"
        html = whole().replace("</main>", f"{intruders}</main>")
        shown = view(html, may_complain=True)
        assert shown.evaluate("window.hit") is None
        assert names(shown) == NAMES
        with pytest.raises(BlockingIOError):
            server.accept()
    # They are able to where there is no policy.
    shown = view(re.sub("<meta http-equiv[^>]*>", "", html), may_complain=True)
    assert shown.evaluate("window.hit") == 1


CLICK = """(() => {
  const start = performance.now();
  document.querySelectorAll("thead button")[2].click();
  return (performance.now() - start) / 1000;
})()"""


@pytest.mark.exhaustive
def test_ten_thousand_rows_sort_and_filter_in_time(view: Open) -> None:
    num = 10_000
    rows: list[list[Cell]] = [
        [f"d{i % 17}", f"a{i % 7}", (i * 7919) % num, "done"] for i in range(num)
    ]
    shown = view(page("t", [section(replace(BOARD, rows=rows))]))

    def timed(act: Callable[[], object], script: str) -> Any:
        start = time.monotonic()
        act()
        found = shown.evaluate(script)
        assert time.monotonic() - start < MOST_SECONDS
        return found

    layout = "document.querySelector('table').offsetHeight"
    assert timed(shown.reload, layout) > num
    moved: list[float] = []
    first = "document.querySelector('tbody tr').cells[2].textContent"
    for found in ("0", "9999", "0"):
        assert timed(lambda: moved.append(shown.evaluate(CLICK)), f"{layout} && {first}") == found
    # Rows taken out of a table one by one cost thirty times as much, in all sorts but the first.
    assert max(moved) < MOST_SECONDS_TO_MOVE
    count = f"{layout} && document.querySelector('.count').textContent"
    search = shown.get_by_role("searchbox")
    assert timed(lambda: search.fill("d16 a6"), count) == "84 of 10000 rows"
    assert timed(lambda: search.fill(""), count) == "10000 of 10000 rows"


def test_a_narrow_page_scrolls_its_tables_not_itself(view: Open) -> None:
    wide = [Column(name=f"c{i}", heading=f"Column {i}") for i in range(30)]
    rows = [["a defense of a long name " * 3, *["x"] * 29]] * 200
    table = Table(name="wide", caption="Wide", columns=wide, rows=rows)
    html = page("W" * 90, [section(table, Prose("w" * 300), Facts(pairs=[("k" * 90, "v" * 90)]))])
    shown = view(html, viewport={"width": 390, "height": 844})
    assert shown.evaluate("document.documentElement.scrollWidth") == 390
    box = "document.querySelector('.box')"
    assert shown.evaluate(f"{box}.scrollWidth > {box}.clientWidth")
    # Scrolled both ways, the headings and the names of the rows are still there.
    shown.evaluate(f"{box}.scrollTo(500, 900)")
    corner = f"{box}.getBoundingClientRect()"
    top = f"document.querySelector('thead th').getBoundingClientRect().top - {corner}.top"
    left = f"document.querySelector('tbody th').getBoundingClientRect().left - {corner}.left"
    assert abs(shown.evaluate(top)) <= 1
    assert abs(shown.evaluate(left)) <= 1


def test_links_open_the_way_to_a_folded_part(view: Open) -> None:
    shown = view(whole())
    inner = shown.get_by_text("Deep.")
    assert not inner.is_visible()
    shown.get_by_role("link", name="Inner").click()
    assert inner.is_visible()
    assert shown.locator("details.part[open]").count() == 2


def test_an_address_with_an_anchor_opens_its_part(view: Open) -> None:
    shown = view(whole())
    shown.goto(f"{shown.url}#inner")
    shown.reload()
    assert shown.get_by_text("Deep.").is_visible()


def test_one_button_unfolds_and_folds_all(view: Open) -> None:
    shown = view(whole())
    parts = shown.locator("#defenses > details")
    shown.get_by_role("button", name="Open all").first.click()
    assert all(part.get_attribute("open") is not None for part in parts.all())
    shown.get_by_role("button", name="Close all").first.click()
    assert all(part.get_attribute("open") is None for part in parts.all())


def test_paper_shows_all_of_it_and_no_controls(view: Open) -> None:
    shown = view(whole(), color_scheme="dark")
    on_screen = ground(shown)
    shown.emulate_media(media="print", color_scheme="dark")
    shown.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert shown.get_by_text("Deep.").is_visible()
    assert ground(shown) == "rgb(255, 255, 255)"
    for hidden in ("nav", ".theme", ".copy", "input", "select", ".unfold"):
        assert not any(found.is_visible() for found in shown.locator(hidden).all()), hidden
    shown.evaluate("dispatchEvent(new Event('afterprint'))")
    shown.emulate_media(media="screen", color_scheme="dark")
    assert not shown.get_by_text("Deep.").is_visible()
    assert ground(shown) == on_screen


def test_without_scripts_everything_can_be_read(view: Open) -> None:
    shown = view(whole(), java_script_enabled=False)
    assert names(shown) == NAMES
    assert not any(found.is_visible() for found in shown.locator(".controls, .theme").all())
    shown.locator("#anp > summary").click()
    assert shown.locator("#anp table").is_visible()
