"""The captions of images in a folder, a zip file or tar shards: a metadata.jsonl, or a text file beside each. No torch.

A file_name that leads out of the folder names no image and counts as not there; nothing is ever opened by it.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from finectl.errors import InputError

METADATA = "metadata.jsonl"
PROMPT_KEYS = ("text", "prompt", "caption")
PROMPT_FILES = (
    f'a {METADATA} with lines like {{"file_name": "0.png", "{PROMPT_KEYS[0]}": "a cat"}}, '
    "or a text file beside each image (0.txt beside 0.png)"
)
SHOWN_CHARACTERS = 200


class Files(Protocol):
    """Images with other files beside them."""

    @property
    def title(self) -> str:
        """What messages call them."""

    @property
    def top(self) -> str:
        """The folder, with a slash, that the images' names leave out; empty where there is none."""

    def beside(self, name: str) -> bytes | None:
        """Return the content of another file, None when it is not there; `name` has `top` in front.

        Raises:
            OSError: it cannot be read.
            ValueError: it is too large.
        """


def read_prompts(collection: Files, names: Sequence[str]) -> tuple[str, ...] | None:
    """Return every image's prompt, None when none has one.

    Args:
        collection: The images and what lies beside them.
        names: Their names, in the order that is wanted.

    Raises:
        InputError: only some have one, or a file of prompts cannot be read.
    """
    found = _listed_prompts(collection, names)
    if found is None:
        found = _prompts_beside(collection, names)
    if found is None:
        return None
    missing = [name for name in names if name not in found]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(names)} images in {collection.title} have no prompt, such as {missing[0]}",
            expected=f"a prompt for every image or for none: {PROMPT_FILES}",
        )
    return tuple(found[name] for name in names)


def _listed_prompts(collection: Files, names: Sequence[str]) -> dict[str, str] | None:
    """Return the prompts by the images' names, None when no metadata.jsonl holds a prompt."""
    top = collection.top
    folders = {""}
    for name in names:
        folder = posixpath.dirname(top + name)
        while folder not in folders:
            folders.add(folder)
            folder = posixpath.dirname(folder)
    found: dict[str, str] = {}
    any_prompt = False
    for folder in sorted(folders):
        place = posixpath.join(folder, METADATA)
        for where, file, prompt in _rows(collection, place):
            any_prompt = True
            name = posixpath.normpath(posixpath.join(folder, file)).removeprefix(top)
            if found.setdefault(name, prompt) != prompt:
                raise InputError(f"{where} gives {file} another prompt than a line before it", expected="one an image")
    return found if any_prompt else None


def _rows(collection: Files, place: str) -> Iterator[tuple[str, str, str]]:
    """Yield where it stands, file name and prompt for every line of a metadata.jsonl that has a prompt."""
    for number, line in enumerate((_text_at(collection, place) or "").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {place} in {collection.title}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is no JSON: {error}", expected=PROMPT_FILES) from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise InputError(f"{where} has no file_name: {line[:SHOWN_CHARACTERS]}", expected=PROMPT_FILES)
        prompt = next((row[key] for key in PROMPT_KEYS if row.get(key) is not None), "")
        if not isinstance(prompt, str):
            raise InputError(f"{where} has a prompt that is no text: {line[:SHOWN_CHARACTERS]}", expected=PROMPT_FILES)
        if prompt.strip():
            yield where, row["file_name"], prompt.strip()


def _prompts_beside(collection: Files, names: Sequence[str]) -> dict[str, str] | None:
    """Return the prompts by the images' names, None when no image has a text file."""
    found: dict[str, str] = {}
    for name in names:
        text = _text_at(collection, f"{posixpath.splitext(collection.top + name)[0]}.txt")
        if text is not None and text.strip():
            found[name] = text.strip()
    return found or None


def _text_at(collection: Files, place: str) -> str | None:
    """Return the content of a text file, None when it is not there."""
    try:
        content = collection.beside(place)
        return None if content is None else content.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{place} in {collection.title} cannot be read: {reason}", expected="text in UTF-8") from error


def read_lines(path: str) -> list[str]:
    """Return the prompts of a file that `--prompts` names, one a line.

    Raises:
        InputError: it cannot be read, is no text, or holds none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"--prompts {path} cannot be read: {reason}", expected="text in UTF-8") from error
    return lines_of(text, path)


def lines_of(text: str, where: str) -> list[str]:
    """Return the lines of a text that are not blank.

    Raises:
        InputError: there are none.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(f"there are no prompts in {where}", expected="one a line")
    return lines
