"""Self-contained HTML pages from templates: one file that opens anywhere and asks the network for nothing.

In: the name of a template and plain values. Out: the page's text. Every value is escaped; text that a model wrote is first
made visible (control and direction characters). A content security policy names the page's own script by its hash, so that
no other script runs even where escaping were to fail. It computes no result and chooses nothing to show.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup

from bvpo.strict import visible


def render_page(template: str, **values: Any) -> str:
    """The page of a template in the folder templates. ``script`` is the text of ``TEMPLATE.js`` if there is one."""
    environment = _environment()
    script = _source(template.removesuffix(".html") + ".js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        **values,
        style=Markup(_source("page.css")),
        script=Markup(script),
        script_source=Markup(f"'sha256-{digest}'" if script else "'none'"),
    )


def clip(text: str, most: int) -> tuple[str, int, str]:
    """(head, characters left out, tail): all of a short text is its head."""
    if len(text) <= most:
        return text, 0, ""
    head = most * 3 // 4
    tail = most - head
    return text[:head], len(text) - most, text[-tail:]


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bvpo.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["visible"] = visible
    environment.filters["clip"] = clip
    environment.filters["count"] = lambda number: f"{number:,}"
    return environment


def _source(name: str) -> str:
    """The text of a file beside the templates; empty where there is none."""
    environment = _environment()
    assert environment.loader is not None
    try:
        return environment.loader.get_source(environment, name)[0]
    except jinja2.TemplateNotFound:
        return ""
