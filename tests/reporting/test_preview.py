"""What a person sees of the rows that would be trained: on the terminal, as a page, as a picture."""

import itertools
import re
import struct
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from qlora.reporting.preview import Preview, PreviewRow, PreviewToken, plot_lengths, to_html, to_text
from qlora.reporting.preview.content import Gap, Piece, count_lengths, shorten_row

SGR = re.compile(r"\x1b\[[\d;]*m")
PLAIN = [("<s>", False), ("Say", False), (" hi.", False), ("\n\n", False), ("Hi", True), ("!\n", True), ("</s>", True)]
CHAT = [("a", False), ("b", True), ("c", False), ("d", True), ("e", True), ("f", False)]
NEVER = [("only", False), (" context\n", False)]
ALWAYS = [("\n", True), ("only", True), (" loss", True)]
SCRIPTS = [("مرحبا ", False), ("日本語", True), ("👩‍👩‍👧", False), ("\ufffd", True), ("\ufffd", True), ("", True)]
HOSTILE = [
    *(("\x1b[31mred\x07", False), ("\r\x00\x9b2J", True), ("<script>alert('1')</script>", True), ("⟦", False)),
    *(("\u202etxt.exe\u2066", True), ("&amp;<b title=\"", False), ("\ud800", False), ("\t\x7f", True)),
]  # fmt: skip
ROWS = {"plain": PLAIN, "chat": CHAT, "never": NEVER, "always": ALWAYS, "scripts": SCRIPTS, "hostile": HOSTILE}
LENGTHS = {"source": np.array([3, 1, 2, 2]), "target": np.array([10, 10, 10, 50]), "total": np.array([13, 11, 12, 52])}


def make_tokens(parts: list[tuple[str, bool]]) -> list[PreviewToken]:
    return [PreviewToken(text, 1000 + index, trained) for index, (text, trained) in enumerate(parts)]


def make_preview(*rows: list[tuple[str, bool]], **changes: object) -> Preview:
    attributes = [("format", "alpaca"), ("tokens an epoch", "1,234 of 5,678")]
    fields: dict[str, object] = {"title": "rows.jsonl as alpaca", "summary": attributes, "warnings": [], "limits": {}}
    fields["rows"] = [PreviewRow(index, make_tokens(parts), []) for index, parts in enumerate(rows)]
    return Preview(**{**fields, "lengths": LENGTHS, **changes})  # type: ignore[arg-type]


def shown_row(text: str) -> str:
    """Returns what stands between the only row's rule and the histogram."""
    return re.split(r"\n\n(?:\x1b\[1m)?Tokens a row", re.split(r"─(?:\x1b\[0m)?\n", text, maxsplit=1)[1])[0]


def control_characters(text: str) -> set[str]:
    return set(re.findall("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", text))


class Page(HTMLParser):
    """Reads a page: its tags, its words, the text and the marked tokens of all rows; refuses unbalanced tags."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, str | None]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[str] = []
        self.marks: list[str] = []
        self.texts: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in ("meta", "input"):
            self.open.append((tag, attributes.get("class")))
        if attributes.get("class") == "text":
            self.rows.append("")
        if tag == "mark" and ("div", "text") in self.open:
            self.marks.append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if ("div", "text") in self.open:
            self.rows[-1] += data
            if "mark" in dict(self.open):
                self.marks[-1] += data


@pytest.mark.parametrize("name", [name for name in ROWS if name != "hostile"])
def test_text_outside_and_inside_the_brackets_is_that_of_the_tokens(name: str) -> None:
    printed = shown_row(to_text(make_preview(ROWS[name]), ids=False, color=False))
    assert printed.replace("⟦", "").replace("⟧", "") == "".join(text for text, _ in ROWS[name])
    spans = re.findall("⟦(.*?)⟧", printed, re.DOTALL)
    assert "".join(spans) == "".join(text for text, trained in ROWS[name] if trained)
    assert "⟧⟦" not in printed


def test_neighbouring_trained_tokens_share_one_span() -> None:
    assert shown_row(to_text(make_preview(CHAT), ids=False, color=False)) == "a⟦b⟧c⟦de⟧f"


@pytest.mark.parametrize("name", [name for name in ROWS if name != "hostile"])
def test_colours_highlight_what_the_brackets_would_hold(name: str) -> None:
    printed = shown_row(to_text(make_preview(ROWS[name]), ids=False, color=True))
    assert SGR.sub("", printed).replace("⏎", "") == "".join(text for text, _ in ROWS[name])
    highlighted = re.findall(r"\x1b\[(?:2;)?30;42m(.*?)\x1b\[0m", printed, re.DOTALL)
    expected = "".join(text for text, trained in ROWS[name] if trained)
    assert "".join(highlighted) == expected.replace("\n", "⏎")
    assert "⟦" not in printed


@pytest.mark.parametrize("ids", [False, True])
def test_text_without_colours_has_no_escape_sequence(ids: bool) -> None:
    texts = to_text(make_preview(*ROWS.values()), ids=ids, color=False)
    assert not control_characters(texts)
    assert "⏎" not in texts


def test_control_characters_never_reach_the_terminal_raw() -> None:
    evil = "\x1b]0;x\x07\r\u202e\n"
    rows = [PreviewRow(1, make_tokens(HOSTILE), [evil])]
    preview = make_preview(
        title=evil, summary=[(evil, evil)], warnings=[evil], rows=rows, lengths={evil: np.ones(3, int)}
    )
    for color in (False, True):
        text = to_text(preview, ids=True, color=color)
        assert not control_characters(SGR.sub("", text))
        assert r"\x1b]0;x\x07\r\u202e\n" in SGR.sub("", text)
        assert r"\x1b[31mred\x07" in SGR.sub("", text)
        text.encode("utf-8")  # a lone surrogate could not be printed


def test_a_bracket_in_the_data_is_not_taken_for_a_mark() -> None:
    printed = shown_row(to_text(make_preview([("⟦x⟧", False), ("y", True)]), ids=False, color=False))
    assert printed == r"\u27e6x\u27e7⟦y⟧"


def test_the_legend_is_said_once_and_only_with_rows() -> None:
    legend = "⟦trained⟧ tokens carry loss; everything else is context"
    assert to_text(make_preview(PLAIN, CHAT), ids=False, color=False).count(legend) == 1
    assert legend not in to_text(make_preview(), ids=False, color=False)


def test_facts_are_aligned_and_warnings_wrap_within_the_width() -> None:
    warnings = ["a long word of warning " * 20]
    lines = to_text(make_preview(warnings=warnings), ids=False, color=False, width=60).splitlines()
    assert "  format           alpaca" in lines
    assert "  tokens an epoch  1,234 of 5,678" in lines
    assert max(map(len, lines)) <= 60
    assert " ".join(" ".join(lines).split()).count("word of warning") == 20


def test_notes_and_counts_stand_above_a_row() -> None:
    rows = [PreviewRow(4321, make_tokens(PLAIN), ["source cut at the beginning", "target cut: no end token"])]
    for text in (to_text(make_preview(rows=rows), ids=False, color=False), to_html(make_preview(rows=rows))):
        head = text[text.index("row 4321") : text.index("Say")]
        assert re.search("7 tokens, 3 trained.*cut at the beginning.*no end token", head, re.DOTALL)


@pytest.mark.parametrize(
    ("parts", "phrase"),
    [
        (NEVER, "2 tokens, none trained"),
        (ALWAYS, "3 tokens, all trained"),
        ([], "no tokens"),
        ([("a", True)], "1 token,"),
    ],
)
def test_a_row_says_how_much_of_it_is_trained(parts: list[tuple[str, bool]], phrase: str) -> None:
    assert phrase in to_text(make_preview(parts), ids=True, color=False)
    assert phrase in to_html(make_preview(parts))


def test_ids_are_listed_with_their_text_and_trained_ones_are_marked() -> None:
    text = to_text(make_preview(PLAIN), ids=True, color=False, width=40)
    listed = re.findall(r'(\*?)(\d{4}) "(.*?)"', text)
    assert [(int(number), mark == "*") for mark, number, _ in listed] == [
        (token.id, token.trained) for token in make_tokens(PLAIN)
    ]
    assert [printed.replace(r"\n", "\n") for *_, printed in listed] == [text for text, _ in PLAIN]
    assert all(len(line) <= 40 for line in text.splitlines() if '"' in line)
    assert "1004" not in to_text(make_preview(PLAIN), ids=False, color=False)


LONG = [
    *([("ctx ", False)] * 3_000), ("START", True), *([("so ", True)] * 2_000), ("STOP", True),
    *([("mid ", False)] * 900), *([("in", True), ("out", False)] * 500), *([("mid ", False)] * 900),
    ("AGAIN", True), *([("la ", True)] * 900), ("END", True), *([("tail ", False)] * 5_000), ("</s>", False),
]  # fmt: skip


def test_a_very_long_row_keeps_the_ends_of_its_first_and_last_trained_span() -> None:
    printed = shown_row(to_text(make_preview(LONG), ids=False, color=False))
    assert len(printed) < 2_800
    for mark in ("ctx ⟦START", "so STOP⟧mid", "mid ⟦AGAIN", "la END⟧tail", "tail </s>"):
        assert mark in printed
    assert printed.count("⟦") == printed.count("⟧")
    assert ", 1,000 of them trained …" in printed


def test_shown_and_hidden_characters_add_up_to_the_row() -> None:
    printed = shown_row(to_text(make_preview(LONG), ids=False, color=False))
    mark = re.compile(r"… ([\d,]+) characters(?:, [\d,]+ of them trained)? …")
    hidden = sum(int(number.replace(",", "")) for number in mark.findall(printed))
    kept = re.sub("[⟦⟧]", "", mark.sub("", printed))
    assert hidden + len(kept) == sum(len(text) for text, _ in LONG)


@pytest.mark.parametrize("room", [50, 300, 2_500, 40_000])
def test_a_shortened_row_is_in_order_and_counts_what_it_hides(room: int) -> None:
    tokens = make_tokens(LONG)
    whole, offset, trained = "".join(token.text for token in tokens), 0, 0
    for part in shorten_row(tokens, room):
        if isinstance(part, Gap):
            offset, trained = offset + part.characters, trained + part.trained_characters
        else:
            assert isinstance(part, Piece)
            assert part.token is tokens[part.position]
            assert whole.startswith(part.text, offset)
            offset, trained = offset + len(part.text), trained + part.token.trained * len(part.text)
    assert (offset, trained) == (len(whole), sum(len(token.text) for token in tokens if token.trained))


def test_one_token_that_is_too_long_is_cut_too() -> None:
    text = to_text(make_preview([("x" * 100_000, True)]), ids=True, color=False)
    assert len(text) < 4_000
    assert re.search(r"⟦x+… 97,\d{3} characters …x+⟧", text)


def test_the_histogram_reports_min_median_p95_max_and_limit() -> None:
    lengths = {"source": np.arange(1, 1001), "target": np.full(1000, 7)}
    preview = make_preview(lengths=lengths, limits={"source": 900, "other": 1})
    lines = to_text(preview, ids=False, color=False, width=120).splitlines()
    assert "Tokens a row, 1,000 rows" in lines
    source, target = lines[-2:]
    assert re.search(r"[█▇] +1 +500 +950 +1,000  limit 900, 100 over$", source)
    assert re.search(r"█ +7 +7 +7 +7$", target)


def test_bars_stand_for_counts_and_few_rows_are_not_none() -> None:
    lengths = {"total": np.array([0] * 8000 + [10] * 4000 + [20] * 1)}
    bars = to_text(make_preview(lengths=lengths), ids=False, color=False, width=120).splitlines()[-1]
    assert re.search("^  total  █ +▄ +▁ ", bars)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("bins", [10, 60])
def test_every_row_is_in_a_bar_or_beyond_the_bars(seed: int, bins: int) -> None:
    draw = np.random.default_rng(seed)
    values = draw.lognormal(draw.uniform(0, 8), draw.uniform(0, 2), 500).astype(np.uint32)
    limit = int(draw.integers(1, 3000))
    (lengths,) = count_lengths(make_preview(lengths={"total": values}, limits={"total": limit}), bins)
    assert sum(lengths.counts) + lengths.beyond == 500
    assert lengths.beyond == (values > lengths.high).sum() <= 5
    assert 1 <= len(lengths.counts) <= bins + 1
    for index, count in enumerate(lengths.counts):
        low, high = lengths.span(index)
        assert count == ((values >= low) & (values <= high)).sum()
        assert not low <= limit < high  # a bin may end at the limit but not hold it inside
    assert lengths.over == (values > limit).sum()
    assert (lengths.least, lengths.most) == (values.min(), values.max())
    assert (values <= lengths.median).mean() >= 0.5 > (values < lengths.median).mean()
    assert (values <= lengths.p95).mean() >= 0.95 > (values < lengths.p95).mean()


def test_a_few_rows_far_out_leave_the_bars_of_the_others_wide() -> None:
    values = np.concatenate([np.full(5_000, 40), np.full(5_000, 80), [100_000]])
    (lengths,) = count_lengths(make_preview(lengths={"total": values}), 40)
    assert (lengths.beyond, lengths.most) == (1, 100_000)
    assert lengths.step <= 4
    preview = make_preview(lengths={"total": values})
    assert "100,000  (1 not drawn)" in to_text(preview, ids=False, color=False)
    assert "(1 longer →)" in to_html(preview)


def test_two_million_lengths_are_counted_within_a_second() -> None:
    draw = np.random.default_rng(0)
    total = draw.integers(1, 2048, 2_000_000)
    preview = make_preview(lengths={"source": total // 2, "target": total - total // 2, "total": total})
    start = time.process_time()
    to_text(preview, ids=False, color=False)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("lengths", [{}, {"source": np.array([], int), "total": np.array([], int)}])
def test_nothing_to_show_is_said(lengths: dict[str, np.ndarray], tmp_path: Path) -> None:
    preview = make_preview(lengths=lengths, summary=[])
    assert to_text(preview, ids=True, color=False).endswith("Tokens a row: no rows were counted")
    assert "No rows were counted." in "".join(Page(to_html(preview)).texts)
    plot_lengths(preview, tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ROWS)
def test_a_page_shows_every_token_and_highlights_every_trained_one(name: str) -> None:
    page = Page(to_html(make_preview(ROWS[name])))
    tokens = make_tokens(ROWS[name])
    actual = [(tag, attributes["title"]) for tag, attributes in page.tags if attributes.get("data-id")]
    assert actual == [
        ("mark", f"token {index}, id {token.id}, trained") if token.trained
        else ("span", f"token {index}, id {token.id}")
        for index, token in enumerate(tokens)
    ]  # fmt: skip
    if name != "hostile":
        assert page.rows == ["".join(token.text for token in tokens)]
        assert page.marks == [token.text for token in tokens if token.trained]


def test_data_never_becomes_markup() -> None:
    evil = "</title></style></script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;"
    rows = [PreviewRow(0, make_tokens([(evil, True), *HOSTILE]), [evil])]
    lengths = {evil: np.arange(9)}
    source = to_html(make_preview(title=evil, summary=[(evil, evil)], warnings=[evil], rows=rows, lengths=lengths))
    page = Page(source)
    assert not {"script", "img", "b"} & {tag for tag, _ in page.tags}
    assert "".join(page.texts).count(evil) == 8  # title twice, label, value, warning, chart, note, token
    assert not control_characters(source)
    source.encode("utf-8")


def test_a_page_needs_nothing_from_elsewhere() -> None:
    source = to_html(make_preview(*ROWS.values(), limits={"total": 40}))
    assert not re.search(r"https?:|url\(|@import|\bsrc=|\bhref=|<script|<link", source.replace("&lt;script", ""))
    assert source.startswith("<!DOCTYPE html>")
    assert "prefers-color-scheme: dark" in source
    assert "width=device-width" in source


def test_a_page_can_show_ids_without_a_script() -> None:
    source = to_html(make_preview(PLAIN))
    page = Page(source)
    boxes = [attributes for tag, attributes in page.tags if tag == "input"]
    assert [(box["type"], box["id"]) for box in boxes] == [("checkbox", "ids")]
    assert [attributes["for"] for tag, attributes in page.tags if tag == "label"] == ["ids"]
    assert "attr(data-id)" in source


def test_the_ids_of_a_page_are_unique_and_its_headings_in_order() -> None:
    page = Page(to_html(make_preview(*ROWS.values())))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after - previous <= 1 for previous, after in itertools.pairwise(levels))


def test_a_page_draws_each_filled_bin_and_prints_the_numbers() -> None:
    preview = make_preview(limits={"target": 20})
    page = Page(to_html(preview))
    counted = count_lengths(preview, 60)
    assert sum(tag == "rect" for tag, _ in page.tags) == sum(count > 0 for item in counted for count in item.counts)
    text = " ".join(page.texts)
    for phrase in ("min 1 ", "median 2 ", "p95 3 ", "max 50 ", "limit 20 (1 over)", "50 tokens: 1 row"):
        assert phrase in re.sub(r"\s+", " ", text)
    lines = [attributes["class"] for tag, attributes in page.tags if tag == "line"]
    assert sorted(lines) == ["limit", *["max"] * 3, *["median"] * 3, *["p95"] * 3]


def test_a_page_shows_up_to_fifty_thousand_characters_of_a_row() -> None:
    parts = [("word ", index > 5_000) for index in range(10_000)]
    assert Page(to_html(make_preview(parts))).rows == ["word " * 10_000]
    longer = Page(to_html(make_preview([*parts, *parts]))).rows[0]
    assert 50_000 < len(longer) + 50 < 51_000
    assert "characters" in longer


@pytest.mark.parametrize(
    "lengths",
    [
        LENGTHS,
        {"source": np.zeros(5, int), "target": np.full(5, 12), "total": np.full(5, 12)},
        {"total": np.random.default_rng(0).lognormal(5, 2, 9_000).astype(int)},
        {"$x": np.arange(9)},
    ],
)
@pytest.mark.parametrize("limits", [{}, {"source": 2, "target": 11, "total": 100_000}])
def test_any_lengths_give_a_readable_png(
    lengths: dict[str, np.ndarray], limits: dict[str, int], tmp_path: Path
) -> None:
    path = tmp_path / "new" / "lengths.png"
    plot_lengths(make_preview(lengths=lengths, limits=limits), path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    assert 1000 <= width <= 2000
    assert 250 <= height <= 1500
    assert len(content) > 5_000
