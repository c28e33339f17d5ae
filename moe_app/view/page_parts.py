"""Provides what self-contained HTML pages share: their scripts, their policy, tables, escaping."""

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from moe_app.view.figure_style import TEMPLATES

STYLE = Path(__file__).parent / "assets" / "page.css"
SCRIPT = """
const { figures, templates } = JSON.parse(document.getElementById("data").textContent);
const darkness = matchMedia("(prefers-color-scheme: dark)");
const tools = [["toImage"], ["zoom2d", "pan2d"], ["autoScale2d", "resetScale2d"]];
const settings = { responsive: true, displaylogo: false, modeBarButtons: tools };
const template = (isDark) => (isDark ? templates.dark : templates.light);
figures.forEach(({ data, layout }, number) => {
  const themed = { ...layout, template: template(darkness.matches) };
  Plotly.newPlot(`figure-${number}`, data, themed, settings);
});
const restyle = (isDark) => figures.forEach((_, number) =>
  Plotly.relayout(`figure-${number}`, { template: template(isDark) }));
darkness.addEventListener("change", () => restyle(darkness.matches));
addEventListener("beforeprint", () => restyle(false));
addEventListener("afterprint", () => restyle(darkness.matches));
"""
_MAX_VALUE_LETTERS = 2000


def page_head(title: str) -> list[str]:
    """Write the lines before a page's body; scripts are known to its policy by their digests."""
    # plotly styles what it draws inline, and draws heat maps into images.
    policy = (
        f"default-src 'none'; script-src {digest(get_plotlyjs())} {digest(SCRIPT)};"
        " style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    return [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escaped(policy)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escaped(title)}</title>",
        f"<style>{STYLE.read_text(encoding='utf-8')}</style>",
        "</head>",
    ]


def page_scripts(figures: Sequence[go.Figure]) -> list[str]:
    """Write plotly, the figures and the script that draws them in `#figure-0` and on."""
    return [
        f"<script>{get_plotlyjs()}</script>",
        f'<script type="application/json" id="data">{embedded(figures)}</script>',
        f"<script>{SCRIPT}</script>",
    ]


def embedded(figures: Sequence[go.Figure]) -> str:
    """Serialise the figures to JSON in which no HTML parser finds an end tag or a comment."""
    values = {"figures": [figure.to_plotly_json() for figure in figures], "templates": TEMPLATES}
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def html_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, fixed: Sequence[int] | None = None
) -> str:
    """Write a table; the first column is of row headers unless `fixed` gives unbreakable ones."""
    lines = ['<div class="scroll"><table><thead><tr>']
    lines += [f'<th scope="col">{escaped(name)}</th>' for name in head]
    lines.append("</tr></thead><tbody>")
    for row in rows:
        cells = []
        for column, value in enumerate(row):
            if fixed is None and column == 0:
                cells.append(f'<th scope="row">{escaped(value)}</th>')
            elif fixed is not None and column in fixed:
                cells.append(f'<td class="fixed">{escaped(value)}</td>')
            else:
                cells.append(f"<td>{escaped(value)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    lines.append("</tbody></table></div>")
    return "\n".join(lines)


def escaped(value: str) -> str:
    """Escape for text and attributes, truncated to `_MAX_VALUE_LETTERS`."""
    if len(value) > _MAX_VALUE_LETTERS:
        value = f"{value[:_MAX_VALUE_LETTERS]} … ({len(value):,} characters)"
    return html.escape(value, quote=True)


def digest(script: str) -> str:
    """Return a script's SHA-256 as a content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
