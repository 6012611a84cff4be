"""Every link of every page leads to a file and a heading that are there, and so does every pointer of a message."""

import re

import pytest
from published import PAGES, ROOT, anchors, links, name

from recipes.problems import TROUBLESHOOTING, see

POINTER = re.compile(r"""see\(['"]([^'"]+)['"]\)""")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target, anchor in links(page):
        place = (page.parent / target).resolve() if target else page
        assert place.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(place), f"{target}#{anchor}: no such heading"


def test_messages_point_to_sections_that_are_there():
    pointed = {section for file in [*ROOT.glob("recipes/**/*.py"), ROOT / "train_grpo.py"]
               for section in POINTER.findall(file.read_text(encoding="utf-8"))}  # fmt: skip
    assert len(pointed) >= 4
    assert pointed <= anchors(ROOT / TROUBLESHOOTING)
    assert see("x") == "docs/troubleshooting.md#x"
