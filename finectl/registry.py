"""Tables of strings that name code without importing it.

A registry maps a short name to `"module:attribute"` and one line of help, so that `--help`, completions and error
messages list the names while nothing heavy is imported until one of them is used.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from finectl.errors import UsageError


@dataclass(frozen=True)
class Entry:
    """One line of a table: where the code is (`module:attribute`) and what it is, in one line."""

    target: str
    help: str


E = TypeVar("E", bound=Entry)


class Registry(Mapping[str, E]):
    """A named table of `Entry`, loaded on use.

    Args:
        what: What the names stand for, as an error message says it ("initialisation method").
        entries: Name to entry, in the order in which help lists them.
    """

    def __init__(self, what: str, entries: Mapping[str, E]) -> None:
        self.what = what
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> E:
        if name not in self._entries:
            raise UsageError(
                f"unknown {self.what} {name!r}{nearest(name, self._entries)}",
                expected=f"one of: {', '.join(self._entries)}",
            )
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def load(self, name: str) -> Any:
        """Import the module of `name` and return its attribute.

        Raises:
            UsageError: the table has no such name; the message gives the nearest one.
        """
        module, _, attribute = self[name].target.partition(":")
        loaded = importlib.import_module(module)
        return getattr(loaded, attribute) if attribute else loaded


def nearest(name: str, known: Mapping[str, Any] | list[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the known name closest to `name`, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""
