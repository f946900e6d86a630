"""A report as one Markdown text, with its tables as CSV and its pictures as PNG, and the page rendered from it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markdown_it import MarkdownIt

from ...stats.plots import save_figure
from ...stats.tables import Sheet
from ...utils.files import slug
from ...utils.words import markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = Path(__file__).with_name("page.css")
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{head}<nav aria-label="Contents">
<ol>
{contents}
</ol>
</nav>
<main>
{body}</main>
</body>
</html>
"""


class Document:
    """Collects the sections of a report in Markdown; all text is escaped, so that text of users stays text.

    Args:
        title: Title of the report.
        folder: Where it goes; tables and pictures are written as they are added.
    """

    def __init__(self, title: str, folder: Path) -> None:
        self.title = title
        self.folder = folder
        self._sections: dict[str, list[str]] = {}
        self._tables = self._figures = 0
        self.section("")

    def section(self, title: str) -> None:
        """Start a section; one to which nothing is added is left out."""
        self._blocks = self._sections.setdefault(title, [])

    def heading(self, text: str) -> None:
        """Add a heading below the section's."""
        self._blocks.append(f"### {markdown(text)}")

    def text(self, text: str, *, warning: bool = False) -> None:
        """Add a paragraph; a warning is a block quote."""
        self._blocks.append(f"> **Warning:** {markdown(text)}" if warning else markdown(text, start=True))

    def bullets(self, items: Iterable[tuple[str, str]]) -> None:
        """Add a list of a term in bold and what is said of it."""
        self._blocks.append("\n".join(f"- **{markdown(term)}**: {markdown(text)}" for term, text in items))

    def code(self, text: str) -> None:
        """Add a command."""
        self._blocks.append(f"```\n{text}\n```")

    def links(self, targets: Mapping[str, str]) -> None:
        """Add a line of links: text to path, relative to the report's folder."""
        self._blocks.append(" · ".join(f"[{markdown(text)}](<{path}>)" for text, path in targets.items()))

    def table(self, sheet: Sheet, *, shown: bool = True) -> None:
        """Write a table with rows to ``tables/<title>.csv``, and add it, numbered, if it is `shown`."""
        if not sheet.rows:
            return
        file = self.folder / "tables" / f"{slug(sheet.title)}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        cells = sheet.cells.rename(columns=lambda name: name.replace("\n", " "))
        cells.replace("\n", " ", regex=True).to_csv(file, index=False)
        if shown:
            self._tables += 1
            self._blocks.append(sheet.to_markdown(f"**Table {self._tables}. {{}}**").rstrip())

    def draw(self, figure: Figure, name: str, *, alt: str, caption: str) -> None:
        """Save a figure to ``figures/<name>.png`` and add it; arguments as for :meth:`picture`."""
        file = self.folder / "figures" / f"{slug(name)}.png"
        save_figure(figure, file)
        self.picture(file, alt=alt, caption=caption)

    def picture(self, file: Path, *, alt: str, caption: str) -> None:
        """Add a picture that lies in the folder.

        Args:
            file: The PNG.
            alt: Its content in words.
            caption: How to read it.
        """
        path = file.relative_to(self.folder).as_posix()
        self._figures += 1
        self._blocks.append(f"![{markdown(alt)}](<{path}>)\n*Figure {self._figures}. {markdown(caption)}*")

    def markdown(self, *titles: str, pictures: bool = True) -> str:
        """Return the text of some sections, or of the report if none is named."""
        parts = [f"# {markdown(self.title)}", *self._sections[""]] if not titles else []
        for title in titles or self._sections:
            blocks = [block for block in self._sections.get(title, ()) if pictures or not block.startswith("![")]
            if title and blocks:
                parts += [f"## {title}", *blocks]
        return "\n\n".join(parts) + "\n"

    def write(self) -> None:
        """Write ``report.md`` and the page, ``index.html``, which needs no other file."""
        text = self.markdown()
        (self.folder / "report.md").write_text(text, encoding="utf-8")
        (self.folder / "index.html").write_text(render(text, self.title, self.folder), encoding="utf-8")


def render(text: str, title: str, folder: Path) -> str:
    """Return a Markdown text as an HTML page with its pictures inside and a list of contents.

    Args:
        text: The text; HTML in it is shown as text.
        title: Title of the page.
        folder: What the paths of pictures are relative to.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("table_open", _open_table)
    parser.add_render_rule("table_close", lambda *_: "</table>\n</div>\n")
    tokens = parser.parse(text)
    contents = []
    for position, token in enumerate(tokens):
        if token.type == "heading_open" and token.tag == "h2":
            name = tokens[position + 1].content
            token.attrSet("id", slug(name).lower())
            contents.append(f'<li><a href="#{slug(name).lower()}">{escape(name)}</a></li>')
        elif token.type == "table_open":
            token.meta["title"] = tokens[position - 2].content.strip("*")
        for child in token.children or ():
            if child.type == "image":
                content = (folder / str(child.attrs["src"])).read_bytes()
                child.attrs["src"] = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    head, start, body = parser.renderer.render(tokens, parser.options, {}).partition("<h2")
    return _PAGE.format(
        title=escape(title),
        style=_STYLE.read_text(encoding="utf-8"),
        head=head,
        contents="\n".join(contents),
        body=start + body,
    )


def _open_table(renderer: Any, tokens: Any, position: int, options: Any, env: Any) -> str:
    """Return the start of a table that scrolls where it is wider than the screen."""
    label = escape(tokens[position].meta["title"])
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">\n<table>\n'
