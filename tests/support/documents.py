"""The commands of the README and of the guides, for the tests that execute them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
REMOTE = ("salt", "salt-ssh")
_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def documents() -> list[Path]:
    """Return the README and every guide."""
    return [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]


def commands(document: Path) -> list[str]:
    """Return what a document types at a root prompt, in its order."""
    blocks = _BLOCK.findall(document.read_text())
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("# ")]


def local(document: Path) -> list[str]:
    """Return the commands that are typed on the database's host."""
    return [line for line in commands(document) if shlex.split(line)[0] not in REMOTE]


def remote(program: str) -> list[list[str]]:
    """Return the words of every command of this program (salt, salt-ssh), without its name."""
    split = [shlex.split(line) for document in documents() for line in commands(document)]
    return [words[1:] for words in split if words[0] == program]
