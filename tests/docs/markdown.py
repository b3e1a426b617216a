"""The parts of the documents that tests look at: code blocks, tables, links and headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.peers import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A code block. `language` is "" where none is named, as in an indented one; `line` is that of its first line."""

    file: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.file.name}:{self.line}"


def code_blocks(file: Path) -> list[Block]:
    """Fenced blocks, and those that are indented by four spaces after an empty line."""
    found: list[Block] = []
    lines = file.read_text().splitlines()
    at = 0
    while at < len(lines):
        if (fence := re.fullmatch(r"```(\w*)", lines[at])) is not None:
            end = lines.index("```", at + 1)
            found.append(Block(file, at + 2, fence[1], "\n".join(lines[at + 1 : end]) + "\n"))
            at = end + 1
        elif lines[at].startswith("    ") and (at == 0 or not lines[at - 1]):
            end = at
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end]):
                end += 1
            found.append(Block(file, at + 1, "", "\n".join(line[4:] for line in lines[at:end]).rstrip() + "\n"))
            at = end
        else:
            at += 1
    return found


def table(file: Path, *head: str) -> list[list[str]]:
    """The rows of the one table with these column heads, cells without their blanks."""
    lines = [_cells(line) for line in file.read_text().splitlines()]
    start = lines.index(list(head)) + 2
    assert list(head) not in lines[start:], f"{file.name} has two tables with the columns {head}"
    rows: list[list[str]] = []
    while start < len(lines) and lines[start]:
        rows.append(lines[start])
        start += 1
    return rows


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line[1:-1].split("|")] if line.startswith("|") and line.endswith("|") else []


def names(text: str) -> list[str]:
    """What stands in backquotes."""
    return re.findall(r"`([^`]+)`", text)


def links(file: Path) -> Iterator[tuple[str, str]]:
    """(path, anchor) of each link that stays in the repository; either may be ""."""
    text = re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield path, anchor


def anchors(file: Path) -> set[str]:
    """What GitHub calls the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
