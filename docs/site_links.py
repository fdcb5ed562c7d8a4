"""A hook of mkdocs: README.md and CHANGELOG.md become pages, and links that leave docs/ lead to the repository."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add the pages that stand outside docs/, with links as if they stood inside."""
    for source, page in PAGES.items():
        text = Path(config["config_file_path"]).with_name(source).read_text(encoding="utf-8")
        text = re.sub(r"\]\((?!https?:|#|docs/)", "](../", text).replace("](docs/", "](")
        for other, its_page in PAGES.items():
            text = text.replace(f"](../{other})", f"]({its_page})")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Return a page's Markdown with links that the site can follow."""
    return re.sub(r"\]\(\.\./", f"]({config['repo_url']}/blob/main/", markdown)
