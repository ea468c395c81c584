"""What the build adds to the metadata: the project's addresses, and a README whose links work without the repository.

The address under which the repository is published is known to whoever publishes it, not to the repository. So
``PROJECT_URL=https://host/owner/name`` is set where a release is built (`.github/workflows/release.yml`). Without it
there are no addresses, and README is as it lies there.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

try:
    from hatchling.metadata.plugin.interface import MetadataHookInterface
except ImportError:  # the tests call the functions below where nothing is built
    MetadataHookInterface = object

_CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(!?)\[([^\[\]]*)\]\((?!https?://|#|mailto:)([^()\s]+)\)")


def absolute_links(readme: str, url: str, version: str) -> str:
    """Let the links and pictures of a README lead to the files of a version, at the repository's address.

    Args:
        readme: Markdown, whose relative links are those of files in the repository.
        url: of the repository, as ``https://host/owner/name``.
        version: whose tag is ``v`` and this.

    Returns:
        The text, with pictures at ``url/raw/...`` and links at ``url/blob/...``. Code is as it was.
    """

    def absolute(link: re.Match[str]) -> str:
        picture, words, target = link.groups()
        return f"{picture}[{words}]({url}/{'raw' if picture else 'blob'}/v{version}/{target})"

    # A link's words may be code, so code is put aside rather than split off.
    code: list[str] = []

    def aside(found: re.Match[str]) -> str:
        code.append(found[0])
        return f"\0{len(code) - 1}\0"

    text = _LINK.sub(absolute, _CODE.sub(aside, readme))
    return re.sub("\0(\\d+)\0", lambda place: code[int(place[1])], text)


def project_urls(url: str, version: str) -> dict[str, str]:
    """What an index shows beside the README; only what every repository at such an address has."""
    return {
        "Homepage": url,
        "Source": f"{url}/tree/v{version}",
        "Documentation": f"{url}/blob/v{version}/docs/index.md",
        "Issues": f"{url}/issues",
        "Changelog": f"{url}/blob/v{version}/CHANGELOG.md",
    }


class Addresses(MetadataHookInterface):
    """Sets ``readme`` and ``urls``, which `pyproject.toml` names as dynamic."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict[str, Any]) -> None:
        """Fill both in; those of an sdist, which hatchling has read from its PKG-INFO by now, stay as they are."""
        if "readme" in metadata:
            metadata.setdefault("urls", {})
            return
        url = os.environ.get("PROJECT_URL", "").rstrip("/")
        if not url:
            metadata["readme"], metadata["urls"] = "README.md", {}
            return
        if not re.fullmatch(r"https://[^/\s]+/[^/\s]+/[^/\s]+", url):
            raise ValueError(f"PROJECT_URL must be https://host/owner/name, but it is {url!r}")
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = absolute_links(readme, url, metadata["version"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = project_urls(url, metadata["version"])
