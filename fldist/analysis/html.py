"""One HTML file with everything in it: template, style, scripts and data, under a policy that forbids the rest.

What came from runs' files goes in as JSON in which nothing can end the script element.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html import escape
from importlib import resources
from typing import Any


def html(report: dict[str, Any]) -> str:
    """The page with everything in it."""
    import plotly.offline

    folder = resources.files("fldist.analysis") / "page"
    script = (folder / "page.js").read_text(encoding="utf-8")
    plotly_script = plotly.offline.get_plotlyjs().replace("\r\n", "\n")
    parts = {
        "title": escape(report["title"]),
        "policy": escape(policy(plotly_script, script)),
        "style": (folder / "page.css").read_text(encoding="utf-8"),
        "data": embedded(report),
        "plotly": plotly_script,
        "script": script,
    }
    template = (folder / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], template)


def policy(*scripts: str) -> str:
    """A Content-Security-Policy: these scripts and no others, pictures that are in the page, no request at all."""
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    own = " ".join(f"'sha256-{of}'" for of in hashes)
    return (
        f"default-src 'none'; script-src {own}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
        "form-action 'none'"
    )


def embedded(value: Any) -> str:
    """JSON that can stand in a script element: no <, > or &, and nothing beyond ASCII; NaN and infinities are null."""
    text = json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
