"""What is published, and how to read it: pages, their headings, links and commands."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("benchmarks/**/*.md"))]
PAGES += [page for name in ("CHANGELOG", "CONTRIBUTING") if (page := ROOT / f"{name}.md").is_file()]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text(page):
    return page.read_text(encoding="utf-8")


def blocks(page, language):
    """The fenced blocks of a language; "" is a block without one."""
    return [body for name, body in _FENCE.findall(text(page)) if name == language]


def anchors(page):
    """A page's headings as GitHub makes anchors of them."""
    prose = _FENCE.sub("", text(page))
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def links(page):
    """(target, anchor) of every link within the repository."""
    prose = _FENCE.sub("", text(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"\w+:", target):
            path, _, anchor = target.partition("#")
            yield path, anchor


def name(page):
    return str(page.relative_to(ROOT))
