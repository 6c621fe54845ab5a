"""Pages hold text that anybody may have written: what keeps it text, without a browser."""

import base64
import hashlib
import re

import pytest

from torchlamp.report.page import TEMPLATES, render


@pytest.mark.parametrize("script", sorted(TEMPLATES.glob("*.js")), ids=lambda path: path.name)
def test_scripts_make_no_html_of_strings(script):
    code = script.read_text(encoding="utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", code)


def test_the_content_policy_names_exactly_the_pages_scripts():
    page = render(
        "inspect", {"a": "</script>"}, model="m", policy="p", length=1, rate="0", shares={}, version="0"
    )
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert len(digests) == 2
    assert re.findall(r"'sha256-([^']*)'", policy) == digests
    directives = dict(part.split(" ", 1) for part in policy.split("; "))
    assert directives["default-src"] == "'none'"
    assert "unsafe" not in directives["script-src"]
