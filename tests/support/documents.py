"""The commands of the README and of the guides, for the tests that execute them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
REMOTE = ("salt", "salt-ssh")
_BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def documents() -> list[Path]:
    """Return the README and every guide."""
    return [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]


def blocks(document: Path) -> list[tuple[str, str]]:
    """Return what is written behind the fence of each block of a document, and the block."""
    return _BLOCK.findall(document.read_text())


def commands(document: Path, scene: str = "") -> list[str]:
    """
    Return what a document types at a root prompt, in its order.

    A scene is named behind the word `console`: something that does not happen on every host.
    """
    fence = f"console {scene}".strip()
    lines = [line for one, text in blocks(document) if one == fence for line in text.splitlines()]
    return [line[2:] for line in lines if line.startswith("# ")]


def local(document: Path) -> list[str]:
    """Return the commands that are typed on the database's host."""
    return [line for line in commands(document) if shlex.split(line)[0] not in REMOTE]


def remote(program: str) -> list[list[str]]:
    """Return the words of every command of this program (salt, salt-ssh), without its name."""
    split = [shlex.split(line) for document in documents() for line in commands(document)]
    return [words[1:] for words in split if words[0] == program]
