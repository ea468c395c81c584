"""The site, built as `make docs` builds it, where mkdocs is installed."""

from __future__ import annotations

import html
import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter

import pytest

from harness import REPOSITORY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
        reason="the extra docs is not installed",
    ),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def words(page) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", page.read_text())).split())


def test_no_id_is_there_twice(site):
    for page in site.rglob("*.html"):
        twice = [name for name, count in Counter(re.findall(r'\bid="([^"]+)"', page.read_text())).items() if count > 1]
        assert not twice, f"{page.relative_to(site)}: {twice}"


def test_no_page_is_as_large_as_the_one_reference_was(site):
    sizes = {page.relative_to(site).as_posix(): page.stat().st_size for page in site.rglob("*.html")}
    assert max(sizes.values()) < 600_000, max(sizes, key=sizes.get)


def test_search_finds_gradient_clip(site):
    entries = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    found = {entry["location"] for entry in entries if "gradient clip" in (entry["title"] + entry["text"]).lower()}
    assert {"methods/zclip/", "faq/"} <= found


def test_type_aliases_are_shown_as_what_they_stand_for(site):
    page = words(site / "reference" / "recipes" / "index.html")
    assert 'Literal["pretrain", "finetune", "vision"]' in page or "Literal['pretrain', 'finetune', 'vision']" in page
    assert "purpose: Purpose" not in page


def test_cards_and_files_are_shown(site):
    assert 'class="grid cards"' in (site / "index.html").read_text()
    page = words(site / "tutorials" / "several_machines" / "index.html")
    assert "#SBATCH --requeue" in page
    assert "kind: Job" in page
    assert "--8<--" not in page
