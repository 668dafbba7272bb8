"""Writes a preview as one page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Iterable

from qlora.reporting.preview.content import (
    CONTROL,
    Gap,
    Lengths,
    Piece,
    Preview,
    PreviewRow,
    count_lengths,
    describe_tokens,
    escape,
    one_line,
    shorten_row,
)

ROOM = 50_000  # characters of a row
BINS = 60
STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f8fa; --card: #ffffff; --ink: #1f2933; --soft: #52606d; --line: #dde4eb;
  --on: #c5ecd0; --on-ink: #0a3a1c; --on-edge: #8fcfa3; --alarm: #fff3d1; --alarm-ink: #5c4300; --alarm-edge: #e0a100;
  --bar: #9dbfe0; --typical: #2f6fb0; --limit: #d1495b; --farthest: #9fb3c8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f141a; --card: #171e26; --ink: #dbe3ec; --soft: #93a4b5; --line: #2a3541;
    --on: #1c5433; --on-ink: #e2f8e9; --on-edge: #37804f; --alarm: #332a0e; --alarm-ink: #f5dea0; --alarm-edge: #d39e1b;
    --bar: #3d5f83; --typical: #7db4ea; --limit: #f0808e; --farthest: #5f7286;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 64rem; padding: 2.5rem clamp(1rem, 4vw, 2.5rem) 4rem;
  background: var(--page); color: var(--ink); overflow-wrap: anywhere;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
h1 { margin: 0 0 1.5rem; font-size: clamp(1.35rem, 4vw, 1.8rem); line-height: 1.25; letter-spacing: -.01em; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.1rem; }
.over { margin: 0 0 .25rem; color: var(--soft); font-size: .875rem; }
.warnings { margin: 0 0 1.5rem; padding: .75rem 1rem .75rem 2.1rem; list-style: "!  "; border-radius: .4rem;
  background: var(--alarm); color: var(--alarm-ink); border-left: .3rem solid var(--alarm-edge); }
.warnings li::marker { font-weight: 700; }
.warnings li + li { margin-top: .35rem; }
.facts { margin: 0; display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr));
  gap: .9rem 1.5rem; padding: 1rem 1.2rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; }
.lengths { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .9rem 1.1rem 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; font-size: .8rem; font-variant-numeric: tabular-nums; }
figcaption { font-size: .95rem; font-weight: 600; }
svg { display: block; overflow: visible; width: 100%; height: 6.5rem; margin-top: .5rem;
  border-bottom: 1px solid var(--line); }
rect { fill: var(--bar); }
line { stroke-width: 2; vector-effect: non-scaling-stroke; }
.median { stroke: var(--typical); background: var(--typical); }
.p95 { stroke: var(--typical); stroke-dasharray: 4 3;
  background: repeating-linear-gradient(90deg, var(--typical) 0 4px, transparent 4px 6px); }
.max { stroke: var(--farthest); background: var(--farthest); }
.limit { stroke: var(--limit); background: var(--limit); }
.ends { display: flex; justify-content: space-between; color: var(--soft); margin: .15rem 0 .5rem; }
.numbers { margin: 0; padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: .1rem .9rem; }
.numbers i { display: inline-block; width: 1rem; height: 2px; margin-right: .35rem; vertical-align: middle; }
.tools { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; padding: .6rem 0;
  justify-content: space-between; background: var(--page); border-bottom: 1px solid var(--line); font-size: .9rem; }
.tools p { margin: 0; }
.hidden { position: absolute; opacity: 0; }
label { cursor: pointer; user-select: none; color: var(--soft); }
label::before { content: ""; display: inline-block; width: .85rem; height: .85rem; margin-right: .45rem;
  vertical-align: -.1rem; border: 1.5px solid var(--soft); border-radius: .2rem; }
#ids:checked ~ .tools label::before { background: var(--typical); border-color: var(--typical); }
#ids:focus-visible ~ .tools label { outline: 2px solid var(--typical); outline-offset: 3px; border-radius: .2rem; }
article { margin-top: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
article header { display: flex; flex-wrap: wrap; gap: 0 1rem; align-items: baseline; padding: .6rem 1.1rem;
  border-bottom: 1px solid var(--line); color: var(--soft); font-size: .875rem; }
h3 { margin: 0; font-size: 1rem; color: var(--ink); }
.note { color: var(--alarm-ink); background: var(--alarm); padding: 0 .5rem; border-radius: .25rem; }
.text { padding: 1rem 1.1rem; white-space: break-spaces; unicode-bidi: plaintext; tab-size: 4;
  font: .875rem/1.75 ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.text { --chip: var(--line); --chip-ink: var(--soft); }
.text mark { --chip: var(--on-edge); --chip-ink: var(--on-ink); }
.text:empty { display: none; }
mark { padding: .1em 0; background: var(--on); color: var(--on-ink); box-shadow: inset -1px 0 var(--on-edge); }
.text :is(mark, span[title]):hover { outline: 1.5px solid var(--typical); border-radius: .15em; }
.break::before { content: "⏎"; opacity: .45; }
.control { font-style: normal; opacity: .65; }
.gap { color: var(--soft); font-style: italic; }
.gap.on { background: var(--on); color: var(--on-ink); }
#ids:checked ~ article [data-id] { outline: 1px solid var(--line); }
#ids:checked ~ article [data-id]:not(.ends-line)::after, #ids:checked ~ article .ends-line::before {
  content: attr(data-id); margin: 0 .35em; padding: .1em .35em; border-radius: .3em; unicode-bidi: isolate;
  background: var(--chip); color: var(--chip-ink); font-size: .7em; }
"""


def to_html(preview: Preview) -> str:
    """Returns the preview as an HTML page: trained tokens are `<mark>`, and each token's title shows its id.

    A box without any script shows the ids of all tokens. The page follows the reader's light or dark mode.
    """
    title = _escape(preview.title)
    lines = ["<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8">']
    lines += ['<meta name="viewport" content="width=device-width, initial-scale=1">']
    lines += [f"<title>{title} – what would be trained</title>", f"<style>{STYLE}</style>", "</head>", "<body>"]
    lines += ["<header>", '<p class="over">What would be trained</p>', f"<h1>{title}</h1>", "</header>", "<main>"]
    if preview.warnings:
        lines += ['<ul class="warnings">', *(f"<li>{_escape(text)}</li>" for text in preview.warnings), "</ul>"]
    if preview.summary:
        entries = (f"<div><dt>{_escape(label)}</dt><dd>{_escape(value)}</dd></div>" for label, value in preview.summary)
        lines += ['<dl class="facts">', *entries, "</dl>"]
    lines += [*_lengths(preview), *_rows(preview.rows), "</main>", "</body>", "</html>", ""]
    return "\n".join(lines)


def _escape(text: str) -> str:
    return html.escape(one_line(text))


def _lengths(preview: Preview) -> Iterable[str]:
    counted = count_lengths(preview, BINS)
    yield "<section>"
    yield "<h2>Tokens a row</h2>"
    if counted:
        yield f'<p class="over">{counted[0].rows:,} rows</p>'
        yield '<div class="lengths">'
        for lengths in counted:
            yield from _figure(lengths)
        yield "</div>"
    else:
        yield "<p>No rows were counted.</p>"
    yield "</section>"


def _figure(lengths: Lengths) -> Iterable[str]:
    name, tallest = _escape(lengths.name), max(lengths.counts) or 1
    numbers = [("median", lengths.median), ("p95", lengths.p95), ("max", lengths.most)]
    if lengths.limit is not None:
        numbers.append(("limit", lengths.limit))
    yield "<figure>"
    yield f"<figcaption>{name}</figcaption>"
    yield (
        f'<svg viewBox="0 0 {len(lengths.counts)} 100" preserveAspectRatio="none" role="img" '
        f'aria-label="histogram of {name}: median {lengths.median}, longest {lengths.most} tokens">'
    )
    for index, count in enumerate(lengths.counts):
        if count:
            first, last = lengths.span(index)
            span = f"{first:,}" if first == last else f"{first:,}–{last:,}"
            height = max(95 * count / tallest, 1)
            yield (
                f'<rect x="{index + 0.05:.2f}" y="{100 - height:.2f}" width="0.9" height="{height:.2f}">'
                f"<title>{span} tokens: {count:,} row{'' if count == 1 else 's'}</title></rect>"
            )
    for kind, value in reversed(numbers):
        if value <= lengths.high:
            # A value lies in the middle of its part of the bar, a limit after it.
            x = (value - lengths.low + (1 if kind == "limit" else 0.5)) / lengths.step
            yield f'<line class="{kind}" x1="{x:.3f}" x2="{x:.3f}" y1="0" y2="100"/>'
    yield "</svg>"
    beyond = f" ({lengths.beyond:,} longer →)" if lengths.beyond else ""
    yield f'<div class="ends"><span>{lengths.span(0)[0]:,}</span><span>{lengths.high:,}{beyond}</span></div>'
    yield '<ul class="numbers">'
    yield f"<li>min {lengths.least:,}</li>"
    for kind, value in numbers:
        over = f" ({lengths.over:,} over)" if kind == "limit" and lengths.over else ""
        far = " →" if value > lengths.high else ""
        yield f'<li><i class="{kind}"></i>{kind} {value:,}{over}{far}</li>'
    yield "</ul>"
    yield "</figure>"


def _rows(rows: list[PreviewRow]) -> Iterable[str]:
    if not rows:
        return
    yield "<section>"
    yield "<h2>Rows</h2>"
    yield '<input class="hidden" type="checkbox" id="ids">'
    yield '<div class="tools"><p><mark>trained</mark> tokens carry loss; everything else is context</p>'
    yield '<label for="ids">show token ids</label></div>'
    for row in rows:
        notes = "".join(f'<span class="note">{_escape(note)}</span>' for note in row.notes)
        yield "<article>"
        yield f"<header><h3>row {row.number}</h3><span>{describe_tokens(row.tokens)}</span>{notes}</header>"
        # One line: a line feed between tokens would show.
        yield f'<div class="text" dir="auto">{"".join(map(_part, shorten_row(row.tokens, ROOM)))}</div>'
        yield "</article>"
    yield "</section>"


def _part(part: Piece | Gap) -> str:
    if isinstance(part, Gap):
        return f'<span class="gap{" on" if part.trained else ""}">{part}</span>'
    tag, note = ("mark", ", trained") if part.trained else ("span", "")
    token_id = part.token.id
    line = ' class="ends-line"' if "\n" in part.text else ""  # its id stands before it, on the same line
    title = f"token {part.position}, id {token_id}{note}"
    return f'<{tag}{line} title="{title}" data-id="{token_id}">{_text(part.text)}</{tag}>'


def _text(text: str) -> str:
    text = CONTROL.sub(lambda match: f'<i class="control">{escape(match[0])}</i>', html.escape(text))
    return text.replace("\n", '<i class="break"></i>\n')
