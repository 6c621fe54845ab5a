"""Pages that work offline: one HTML file with its style, script, data and plotly inside."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

TEMPLATES = Path(__file__).parent / "templates"


def pack(array: np.ndarray) -> str:
    """The array's bytes, row by row, in base64; little endian is what every browser has."""
    return base64.b64encode(
        np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).tobytes()
    ).decode()


def render(name: str, data: Any, **values: Any) -> str:
    """The page `name`.html with `data` for its script `name`.js; `values` are put into the HTML, escaped.

    Raises
    ------
    ValueError
        `data` holds a number that JSON doesn't have, such as NaN.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    templates = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    # "<" must not end the script element that holds the data.
    text = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=False).replace(
        "<", "\\u003c"
    )
    plotly = get_plotlyjs()
    script = "\n".join((TEMPLATES / file).read_text(encoding="utf-8") for file in ("page.js", f"{name}.js"))
    return templates.get_template(f"{name}.html").render(
        style=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
        data=Markup(text),
        plotly=Markup(plotly),
        script=Markup(script),
        content_policy=Markup(content_policy(plotly, script)),
        **values,
    )


def content_policy(*scripts: str) -> str:
    """A content-security policy: exactly these scripts run, nothing is loaded from outside, nothing is sent.

    The page's text comes from files that anybody may have written. Escaping keeps it text; where that failed, the
    browser would refuse to run it.
    """
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    # Plotly adds styles of its own, and draws the picture that a reader saves from a data or blob URL.
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
