"""What all HTML pages about training share: the style sheet, the frame of a page, sections and tables.

A page is one file without scripts and without external files, so it can be emailed and archived. It follows the
reader's light or dark colour scheme.
"""

from collections.abc import Sequence
from html import escape

from training.pages.charts import CSS as CHART_CSS

CSS = (
    """
:root { --ink: #1c1f24; --muted: #5f6672; --line: #e3e6ea; --paper: #ffffff; --card: #f6f7f9; --accent: #2563eb;
  --warn: #b54708; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --muted: #9aa1ad; --line: #2c313a; --paper: #15171b; --card: #1d2026; --accent: #74a9ff;
    --warn: #ffb86b; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1100px; padding: 32px 20px 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; color-scheme: light dark; }
h1 { font-size: 26px; margin: 0 0 2px; } h2 { font-size: 17px; margin: 36px 0 10px; }
p { margin: 4px 0; } .muted { color: var(--muted); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(118px, 1fr)); gap: 10px; margin: 20px 0 0; }
.tile, figure { background: var(--card); border-radius: 10px; padding: 12px 14px; margin: 0; }
.tile b { display: block; font-size: 19px; font-weight: 600; white-space: nowrap; }
.tile span { color: var(--muted); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 12px; }
figcaption { font-weight: 600; font-size: 14px; margin: 0 0 4px 2px; }
table { border-collapse: collapse; font-size: 14px; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: 4px 18px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--muted); font-weight: 500; } .n { text-align: right; font-variant-numeric: tabular-nums; }
code, pre { font: 13px ui-monospace, monospace; overflow-wrap: anywhere; }
pre { background: var(--card); border-radius: 10px; padding: 12px 14px; overflow-x: auto; margin: 6px 0; }
ul { margin: 0; padding-left: 20px; } li { margin: 3px 0; } li b { color: var(--warn); font-weight: 600; }
img { width: 100%; height: auto; border-radius: 10px; display: block; }
"""
    + CHART_CSS
)


def html_page(title: str, sections: Sequence[str], css: str = "") -> str:
    """Return a page as HTML. `title` is plain text, and `sections` are HTML. `css` is added to the style sheet."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}{css}</style></head>'
        f"<body>{''.join(sections)}</body></html>\n"
    )


def html_section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>{body}" if body else ""


def html_table(rows: Sequence[Sequence[str]], header: Sequence[str] = (), numbers: Sequence[int] = ()) -> str:
    """Return a table as HTML. Cells are plain text and are escaped. `numbers` lists the right-aligned columns, counted
    from 0."""

    def line(cells: Sequence[str], tag: str) -> str:
        kind = [" class=n" if i in numbers else "" for i in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{k}>{escape(c)}</{tag}>" for k, c in zip(kind, cells, strict=True)) + "</tr>"

    lines = ([line(header, "th")] if header else []) + [line(row, "td") for row in rows]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'
