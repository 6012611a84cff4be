"""Text from outside, made safe to show: one function for each place where it can appear.

Outside is everything that this source did not write: prompts and completions, names of runs, reward functions and
memory figures, configuration keys and values, messages of exceptions. Control characters are made visible everywhere
(`recipes.problems.visible`); beyond that, every place has its own special characters.
"""

from __future__ import annotations

import re
from typing import Any

from markupsafe import Markup
from markupsafe import escape as escape_html
from rich.text import Text

from recipes.problems import visible


def terminal(text: Any) -> Text:
    """For rich: a Text that shows `[bold]` literally, and in which no escape sequence can move the cursor."""
    return Text(visible(str(text)))


def html(text: Any) -> Markup:
    """For HTML, in text or in a quoted attribute; Markup stays as it is."""
    return text if isinstance(text, Markup) else escape_html(visible(str(text)))


def markdown(text: Any) -> str:
    """For a Markdown text or a table's cell: marks are shown as they are written, a line break is `<br>`."""
    escaped = re.sub(r"([\\`*|~]|\](?=[(\[:])|(?<!\w)_|_(?!\w))", r"\\\1", visible(str(text)))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", "<br>")
