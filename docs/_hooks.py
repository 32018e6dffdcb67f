"""Pages of the site that are made from files outside of docs/, and the links to them.

In the repository, `../examples/README.md` leads from docs/pods.md to the examples. On
the site it leads to the page that is made from that file. A link to a file that is no
page, such as a test, becomes plain text.
"""

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {  # files of the repository, and the pages that are made from them
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "measuring.md",
    "examples/README.md": "examples/index.md",
    "examples/quickstart.ipynb": "quickstart.md",
} | {
    str(path.relative_to(ROOT)): str(path.relative_to(ROOT).with_suffix(".md"))
    for path in (ROOT / "examples").rglob("*.py")
}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"\[([^\[\]]*)\]\(([^()\s#]+)(#[^()\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file in `PAGES`."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        content = MAKERS[Path(source).suffix](text, Path(source).name)
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links to files of the repository into links to the site's pages."""
    here = page.file.src_uri
    source = SOURCES.get(here, f"docs/{here}")

    def on_site(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / file).exists():
            return match[0]  # a URL, code, or a wrong link, which the build reports
        there = PAGES.get(file) or file.removeprefix("docs/")
        if there == file:
            return text
        start = posixpath.dirname(here) or "."
        return f"[{text}]({posixpath.relpath(there, start)}{anchor})"

    return LINK.sub(on_site, markdown)


def from_markdown(text: str, name: str) -> str:
    """Take a page as it is."""
    return text


def from_program(text: str, name: str) -> str:
    """Show a program, below its name."""
    return f"# {name}\n\n```python\n{text}```\n"


def from_notebook(text: str, name: str) -> str:
    """Show a notebook's cells, and what they have printed."""
    return "\n".join(_parts(json.loads(text)))


def _parts(notebook: dict[str, Any]) -> Iterator[str]:
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            yield f"{source}\n"
            continue
        yield f"```python\n{source}\n```\n"
        for output in cell["outputs"]:
            found = output.get("text") or output.get("data", {}).get("text/plain", [])
            if shown := "".join(found).rstrip("\n"):
                yield f"```text\n{shown}\n```\n"


MAKERS = {".md": from_markdown, ".py": from_program, ".ipynb": from_notebook}
