"""The words of the text form, and a cursor over them for :mod:`qgraph.graph.text.parser`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

from qgraph.errors import ModelError

NUMBER = r"-?(?:\d+\.\d*(?:e[+-]?\d+)?|\d+e[+-]?\d+|\d+|inf|nan)(?![\w.])"
NAME = r"(?!(?:inf|nan)\b)[^\W\d][\w.-]*"
VALUE_NAME = r"[\w./$;@+~|-]+(?::+[\w./$;@+~|-]+)*"
_STRING = r'"[^"\\\n]*(?:\\.[^"\\\n]*)*"'
_TOKEN = re.compile(
    rf"""(?P<newline>\n)|(?P<blank>[^\S\n]+|//[^\n]*)
    |(?P<value>%(?:{_STRING}|{VALUE_NAME}))|(?P<at>@(?:{_STRING}|{VALUE_NAME}))
    |(?P<spec><(?:[^<>"\n]*|{_STRING})>)|(?P<hash>\#\w+)
    |(?P<bytes>b{_STRING})|(?P<string>{_STRING})|(?P<number>{NUMBER})|(?P<name>{NAME})
    |(?P<mark>::|[{{}}()\[\]=,:!$*?])|(?P<wrong>.)""",
    re.VERBOSE,
)
_T = TypeVar("_T")


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    line = 1
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup or "wrong"
        if kind == "newline":
            line += 1
        elif kind != "blank":
            yield kind, match.group(), line
    yield "end", "the end of the text", line


class Cursor:
    """One token of lookahead for a recursive descent: its `kind`, `text` and `line`."""

    def __init__(self, text: str) -> None:
        self._tokens = _tokens(text)
        self.kind, self.text, self.line = next(self._tokens)
        self._passed = self.line

    def fail(self, message: str) -> NoReturn:
        """Raise a ModelError about the next token."""
        raise ModelError(f"line {self.line}: {message}")

    def refuse(self, message: str) -> NoReturn:
        """Raise a ModelError about what was passed last."""
        raise ModelError(f"line {self._passed}: {message}")

    def next(self) -> str:
        """Move on; the text of the token that was passed."""
        text, self._passed = self.text, self.line
        if self.kind != "end":
            self.kind, self.text, self.line = next(self._tokens)
        return text

    def at(self, *texts: str) -> bool:
        """Whether the next token is one of these marks or unquoted names."""
        return self.kind in ("mark", "name") and self.text in texts

    def accept(self, text: str) -> bool:
        """Move past this mark or name if it comes next."""
        found = self.at(text)
        if found:
            self.next()
        return found

    def expect(self, text: str) -> None:
        """Move past this mark or name, which must come next."""
        if not self.accept(text):
            self.fail(f"expected '{text}', found '{self.text}'")

    def take(self, *kinds: str) -> str:
        """Move past a token of one of these kinds; its text without quotes and prefix."""
        if self.kind not in kinds:
            self.fail(f"expected a {' or '.join(kinds)}, found '{self.text}'")
        kind, text = self.kind, self.text
        if kind in ("value", "at", "bytes"):
            text = text[1:]
        if kind == "spec":
            text = text[1:-1]
        if text.startswith('"'):
            try:
                text = str(json.loads(text))
            except json.JSONDecodeError:
                self.fail(f"{text} is not a string: escape it as in JSON")
        self.next()
        return text

    def name(self) -> str:
        """Move past a name, plain or quoted."""
        return self.take("name", "string")

    def integer(self) -> int:
        """Move past an integer."""
        text = self.take("number")
        if not re.fullmatch(r"-?\d+", text):
            self.refuse(f"expected an integer, found '{text}'")
        return int(text)

    def series(self, closing: str, item: Callable[[], _T]) -> list[_T]:
        """Items separated by commas, up to and with the mark `closing`; a last comma is allowed."""
        items: list[_T] = []
        while not self.accept(closing):
            if items:
                self.expect(",")
                if self.accept(closing):
                    break
            items.append(item())
        return items
