"""The pages of docs/, read and run.

A page's Python blocks run from top to bottom, section by section: each section (`## `) begins in a folder with nothing
in it but `run`, with the page's imports, which stand before all sections, in front. A block that begins with a comment
`# some/file.py` is written to that file, to be imported by those that follow. What another library's users have written
stands in blocks of `py`.

A page names queues as maildirs, "run/jobs"; the same blocks run with the same queues in any other store.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import os
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lamsonq.marks import MODULES

DOCS = Path(__file__).parents[2] / "docs"
STORES = {"memory": r"memory:{0}/\1", "maildir": r"run/\1", "sqlite": r"sqlite:run/queues.db?queue=\1"}
"""What "run/NAME" is in each kind of store."""

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# (\S+\.py)\n")
_QUEUE = re.compile(r'(?<=")run/([a-z]+)(?=")')
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Block:
    """One block of code: `line` is where it begins in its page."""

    section: str
    language: str
    source: str
    line: int

    @property
    def path(self) -> str | None:
        """The file that it is, if it says so."""
        match = _FILE.match(self.source)
        return match[1] if match else None


class Page:
    """One page. Raises FileNotFoundError where there is none."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.text = (DOCS / name).read_text()
        self.blocks = list(self._read())

    def _read(self) -> Iterator[Block]:
        for match in _FENCE.finditer(self.text):
            before = self.text[: match.start()]
            titles = re.findall(r"^## (.*)$", before, re.MULTILINE)
            yield Block(titles[-1] if titles else "", match[1], match[2], before.count("\n") + 1)

    def sections(self, language: str = "python") -> list[str]:
        """The titles of the sections that have such blocks."""
        return list(
            dict.fromkeys(block.section for block in self.blocks if block.section and block.language == language)
        )

    def of(self, section: str, language: str = "python") -> list[Block]:
        """The blocks of a section."""
        return [block for block in self.blocks if (block.section, block.language) == (section, language)]

    def text_of(self, section: str) -> str:
        """A section as it stands."""
        return self.text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]

    def rows(self, section: str) -> list[list[str]]:
        """The cells of the tables of a section, without the heads."""
        lines = [line for line in self.text_of(section).splitlines() if line.startswith("|")]
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
        rules = [number for number, row in enumerate(rows) if set("".join(row)) <= set("-")]
        return [row for number, row in enumerate(rows) if number not in rules and number + 1 not in rules]


class Run:
    """A reader who types a page's blocks into a session in the current folder, with his queues in one kind of store."""

    def __init__(self, page: Page, store: str = "memory") -> None:
        number = next(_numbers)
        self.page = page
        self.queue = STORES[store].format(number)
        self.module = types.ModuleType(f"page_{number}")
        sys.modules[self.module.__name__] = self.module
        self._mine = {self.module.__name__}
        self._others = dict(MODULES)  # whose functions may have the same names
        MODULES.clear()
        os.makedirs("run", exist_ok=True)

    def url(self, name: str) -> str:
        """Where the page's queue run/NAME is."""
        return _QUEUE.sub(self.queue, f'"run/{name}"').strip('"')

    def block(self, block: Block) -> None:
        source = _QUEUE.sub(self.queue, block.source)
        if block.path is not None:
            self._write(block.path, source)
            return
        code = compile("\n" * block.line + source, str(DOCS / self.page.name), "exec")
        exec(code, vars(self.module))

    def _write(self, path: str, source: str) -> None:
        folder = os.path.dirname(path)
        if folder:
            os.makedirs(folder, exist_ok=True)
            Path(folder, "__init__.py").touch()
        Path(path).write_text(source)
        importlib.invalidate_caches()
        dotted = path.removesuffix(".py").replace("/", ".")
        for name in (dotted, dotted.partition(".")[0]):
            sys.modules.pop(name, None)
            self._mine.add(name)

    def section(self, title: str) -> types.ModuleType:
        """Run a section; the session's names."""
        for block in (*self.page.of(""), *self.page.of(title)):
            self.block(block)
        return self.module

    def close(self) -> None:
        """Forget the session and what it has imported."""
        for name in self._mine:
            sys.modules.pop(name, None)
        MODULES.clear()
        MODULES.update(self._others)


def is_python(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True
