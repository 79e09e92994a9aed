"""Reading foreign weights tensor by tensor: safetensors, and PyTorch's files without running what is in them."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from finectl.artifacts.tensors import check_header, tensor_shapes
from finectl.errors import FinectlError, InputError

if TYPE_CHECKING:
    from torch import Tensor

    from finectl.models.foreign.layout import Shape

SHOWN_CHARACTERS = 200
WRAPPERS = ("module.", "_orig_mod.", "module.")
FORBIDDEN_GLOBAL = re.compile(r"Unsupported (?:global|class|operand)[^\n]*?([\w]+(?:\.[\w]+)+)")
SAFETENSORS_FIX = "take a safetensors file of these weights, or copy it again"


class Reader(Protocol):
    """Tensors by name, one at a time.

    Attributes:
        where: How error messages name the source.
        shapes: Name -> shape of every tensor.
    """

    where: Path

    @property
    def shapes(self) -> Mapping[str, Shape]: ...

    def read(self, name: str) -> Tensor: ...


class SafetensorsReader:
    """Tensors of one safetensors file or several, mapped and not copied; opening it needs no torch.

    Args:
        where: How error messages name the source.
        files: The files.

    Raises:
        InputError: a file is missing, truncated or not safetensors.
    """

    def __init__(self, where: Path, files: Sequence[Path]) -> None:
        self.where = where
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, Shape] = {}
        self._open: dict[Path, Any] = {}
        for file in files:
            try:
                check_header(file)
                found = tensor_shapes(file)
            except FinectlError as error:
                raise InputError(error.what, expected=error.expected, fix=SAFETENSORS_FIX) from error
            self._shapes.update(found)
            self._file_of.update(dict.fromkeys(found, file))

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Name -> shape of every tensor."""
        return self._shapes

    def read(self, name: str) -> Tensor:
        """Return a tensor, in its stored dtype, on the CPU."""
        from safetensors import safe_open

        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        tensor: Tensor = self._open[file].get_tensor(name)
        return tensor


class StateReader:
    """Tensors of a state dict that is there already.

    Args:
        where: How error messages name the source.
        state: Name -> tensor.
    """

    def __init__(self, where: Path, state: Mapping[str, Tensor]) -> None:
        self.where = where
        self._state = state

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Name -> shape of every tensor."""
        return {name: tuple(tensor.shape) for name, tensor in self._state.items()}

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        return self._state[name].detach()


class RenamedReader:
    """Another reader's tensors under other names.

    Args:
        inner: The reader.
        names: New name -> name there.
    """

    def __init__(self, inner: Reader, names: Mapping[str, str]) -> None:
        self.where = inner.where
        self._inner = inner
        self._names = dict(names)

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Name -> shape of every tensor."""
        return {new: self._inner.shapes[old] for new, old in self._names.items()}

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        return self._inner.read(self._names[name])


def sharded_files(index: Path) -> list[Path]:
    """Return the files that the `*.index.json` of a sharded checkpoint names, in order.

    Raises:
        InputError: it is no index, or names a file outside of its folder.
    """
    try:
        names = sorted(set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is not the index of a sharded checkpoint: {error}") from error
    return [member(index.parent, name) for name in names]


def member(folder: Path, name: str) -> Path:
    """Return `folder / name` for a name that a foreign file gives; it may be a link, as all files in a hub's cache are.

    Raises:
        InputError: it is more than the name of an entry of the folder.
    """
    if not name or name in (".", "..") or set(name) & {"/", "\\", "\0"}:
        raise InputError(
            f"{folder} names the file {name[:SHOWN_CHARACTERS]!r}, which leads out of it",
            expected="a name in the folder",
        )
    return folder / name


def load_pickled(path: Path) -> Any:
    """Read a file that `torch.save` wrote, without running anything that it holds.

    Nothing but tensors, plain containers and the options of a command line (`argparse.Namespace`, which published
    training checkpoints keep) is accepted; tensors are mapped from the file where its format allows.

    Raises:
        InputError: it holds anything else, is truncated, or is no such file.
    """
    import torch

    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)  # the format before PyTorch 1.6
    except pickle.UnpicklingError as error:
        match = FORBIDDEN_GLOBAL.search(str(error)) or re.search(r"GLOBAL (\S+)", str(error))
        named = f" ({match.group(1)})" if match else ""
        raise InputError(
            f"{path} holds more than tensors{named}: loading it could run code, so it was refused",
            expected="tensors, numbers, text, lists and tables, which weights_only=True reads",
            fix="save the state dict alone with the program that wrote it, best as safetensors",
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:SHOWN_CHARACTERS]
        raise InputError(
            f"{path} is damaged or no PyTorch checkpoint: {reason or type(error).__name__}",
            expected="a whole file that torch.save wrote",
            fix="copy or download it again",
        ) from error


def as_state(value: Any, where: Path) -> dict[str, Tensor]:
    """Return a state dict, checked to be name -> tensor, without what DDP and torch.compile put before every name.

    Raises:
        InputError: it is something else.
    """
    import torch

    if not isinstance(value, Mapping) or not value or not all(isinstance(t, torch.Tensor) for t in value.values()):
        raise InputError(
            f"{where} holds no state dict: a {type(value).__name__}", expected="a table of parameter names and tensors"
        )
    state = {str(name): tensor for name, tensor in value.items()}
    for prefix in WRAPPERS:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state
