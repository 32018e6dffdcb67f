"""The pages of docs/ as programs: the Python blocks of a page, in their order.

    python tests/doc_pages.py PAGE [OLD=NEW ...]

runs one page, with each text OLD in it replaced by NEW.
"""

import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parents[1] / "docs"
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block of a page.

    Attributes:
        language: What follows the opening fence: `python`, `bash`, `text`, or nothing.
        line: The number of the opening fence's line.
        code: What is between the fences.
    """

    language: str
    line: int
    code: str


def blocks_of(page):
    """Return the blocks of a page, which is named by its path below docs/."""
    text = (DOCS / page).read_text()
    return [
        Block(match[2], text.count("\n", 0, match.start()) + 1, dedented(match))
        for match in FENCE.finditer(text)
    ]


def dedented(match):
    return textwrap.dedent(match[3])


def run_page(page, replaced=()):
    """Run a page's Python in this process, and return the names that it has defined.

    Args:
        page: The page's path below docs/.
        replaced: Pairs of a text in the code, and what it stands for here.
    """
    names = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.language == "python":
            code = block.code
            for old, new in replaced:
                code = code.replace(old, new)
            # Errors name the page and its line.
            exec(compile("\n" * block.line + code, str(DOCS / page), "exec"), names)
    return names


if __name__ == "__main__":
    run_page(sys.argv[1], [pair.split("=", 1) for pair in sys.argv[2:]])
