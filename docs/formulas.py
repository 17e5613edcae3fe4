"""Formulas of the site: LaTeX between dollar signs becomes MathML when it is built; browsers need no script."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Called by mkdocs with the HTML of every page."""

    def rendered(match: re.Match[str]) -> str:
        display = "inline" if match[1] == "span" else "block"
        return convert(html.unescape(match[2]), display=display)

    return _FORMULA.sub(rendered, content)
