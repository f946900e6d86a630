from __future__ import annotations

import pytest
from markdown_it import MarkdownIt

from st_llmpool.utils.words import counted, listed, markdown

TEXTS = [
    "*a* **b**",
    "[x](http://y)",
    "`code`",
    "<b>bold</b>",
    "a | b",
    "# head",
    "- item",
    "+ item",
    "1. item",
    "2) x",
]
TEXTS += [
    "> quote",
    "__init__ and a_b_c",
    "&amp; &#33;",
    "back\\slash \\* x",
    "=====",
    "![i](j.png)",
    "~~~",
    "-5 to -3",
]


def test_numbers_have_plurals_and_lists_an_end():
    assert [counted(number, "run") for number in (0, 1, 2)] == ["0 runs", "1 run", "2 runs"]
    assert listed([3, 1, 3], most=1) == "3 and 1 more"


@pytest.mark.parametrize("text", TEXTS)
def test_escaped_text_reads_as_it_was_written(text):
    (paragraph, inline, _) = MarkdownIt("commonmark", {"html": False}).enable("table").parse(markdown(text, start=True))
    assert paragraph.type == "paragraph_open"
    assert "".join(child.content for child in inline.children) == text
    assert {child.type for child in inline.children} <= {"text", "text_special"}
