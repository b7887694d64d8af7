"""An mkdocs hook: what docs/ refers to outside of docs/, as GitHub shows it, is found on the site too.

Pictures are taken into the site from where they lie; other files are linked in the repository, or in the clone where
nothing says which repository it is (GITHUB_REPOSITORY). A file that isn't there is a warning, an error with --strict.
"""

from __future__ import annotations

import logging
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]+)(#[^)\s]*)?(?=\))")
PICTURES = {".gif", ".png", ".svg"}
logger = logging.getLogger("mkdocs.hooks.docs_links")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Replace each link that leads out of docs/."""
    here = posixpath.dirname(page.file.src_uri)

    def replaced(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", here, link[1]))
        if path.startswith("docs/"):
            return link[0]
        if not (ROOT / path).exists():
            logger.warning("%s links to %s, which doesn't exist", page.file.src_uri, path)
        if Path(path).suffix not in PICTURES:
            return f"{_repository()}/{path}{link[2] or ''}"
        if files.get_file_from_path(path) is None:
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
        return posixpath.relpath(path, here or ".")

    return LINK.sub(replaced, markdown)


def _repository() -> str:
    repository = os.environ.get("GITHUB_REPOSITORY")
    return f"{os.environ['GITHUB_SERVER_URL']}/{repository}/blob/main" if repository else ROOT.as_uri()
