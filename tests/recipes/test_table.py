"""One table in three renderings, and what text from outside must not do in any of them."""

import io
from html.parser import HTMLParser

import pytest
from rich.console import Console

from recipes import escape
from recipes.problems import Problem, visible
from recipes.table import Table

NASTY = "<reasoning>[bold red]x[/]\x1b[2J\x9b1m|`*_a_* & \u202egnp\\"


def shown(table):
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    console.print(table.terminal())
    return console.file.getvalue()


class Reader(HTMLParser):
    """The tags of a page, and its text as a browser would show it."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def test_the_terminal_shows_marks_as_text():
    text = shown(Table((NASTY, "n"), [(NASTY, "1")], title=NASTY))
    for part in ("<reasoning>[bold red]x[/]", r"\x1b[2J", r"\x9b1m", r"\u202egnp", "\\"):
        assert text.count(part) >= 3
    assert not any(character in text for character in "\x9b\u202e")
    assert "\x1b[2J" not in text


def test_html_has_no_tag_from_outside():
    page = Reader(str(Table((NASTY, "n"), [(NASTY, "1")], title=NASTY).html()))
    allowed = {"div", "table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert set(page.tags) == allowed
    assert page.text.count(visible(NASTY)) == 3
    assert escape.html('" onload="') == "&#34; onload=&#34;"


def test_markdown_keeps_its_columns_and_has_no_tag_from_outside():
    *_, rule, row = Table(("name", "n"), [("a|b\n<c> &amp; _d_ e_f [g](h)", "1")]).markdown().splitlines()
    assert rule == "| --- | ---: |"
    assert row == r"| a\|b<br>&lt;c&gt; &amp;amp; \_d\_ e_f [g\](h) | 1 |"


def test_a_table_has_as_many_cells_as_headings():
    with pytest.raises(ValueError, match="3 cells under 2 headings"):
        Table(("a", "b"), [("1", "2", "3")])


def test_a_problem_cannot_steer_the_terminal():
    assert Problem("run.name", "is \x1b[31mred").line("a.yaml") == r"a.yaml: run.name: is \x1b[31mred"


def test_visible_text_keeps_letters_lines_and_emoji():
    assert visible("naïve\n\t漢字 👩‍🔬") == "naïve\n\t漢字 👩‍🔬"
    assert visible("\ud800").encode() == rb"\ud800"
