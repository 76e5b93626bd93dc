"""Reads docs/paper.md: its items, links, commands and cost tables."""

import pathlib
import re
import shlex

from tests.conftest import ROOT

DOCS = ROOT / "docs"
TEXT = (DOCS / "paper.md").read_text()
OVERVIEW, *_SECTIONS = re.split(r"(?m)^(?=## )", TEXT)
KEYS = ["Claim", "Command", "Data", "Cost", "Result", "Unchecked"]


def _parts(section: str) -> dict[str, str]:
    """The parts of an item by their bold key."""
    _, *parts = re.split(r"(?m)^- \*\*(\w+)\*\*: *", section)
    return {key: text.strip() for key, text in zip(parts[::2], parts[1::2], strict=True)}


ITEMS = {section.partition("\n")[0].removeprefix("## "): _parts(section) for section in _SECTIONS}


def anchor_of(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors of a page."""
    without_code = re.sub(r"(?ms)^ *```.*?^ *```", "", page.read_text())
    return {anchor_of(heading) for heading in re.findall(r"(?m)^#+ (.*)$", without_code)}


def commands(text: str) -> list[list[str]]:
    """The commands in blocks of code, and those between backticks that begin with python."""
    blocks = re.findall(r"(?ms)^ *```bash\n(.*?)^ *```", text)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    lines += re.findall(r"`(python [^`]+)`", re.sub(r"(?ms)^ *```.*?^ *```", "", text))
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


COMMANDS = [command for section in TEXT.split("\n## ") for command in commands(section)]
