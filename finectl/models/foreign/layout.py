"""One layout of weights from another: which tensors each is made of, and the tensor-by-tensor writer.

Nothing is imported from torch until tensors are read, so that a plan can compare names and shapes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from finectl.artifacts.files import staged
from finectl.errors import InputError
from finectl.registry import nearest

if TYPE_CHECKING:
    from torch import Tensor

    from finectl.models.foreign.readers import Reader

Shape = tuple[int, ...]
CONSTANT_TOLERANCE = 1e-5
ALIGNMENT = 8


@dataclass(frozen=True)
class Part:
    """How one tensor is made.

    Args:
        sources: Names of the tensors that it is made of; none for a constant.
        shape: What comes out.
        build: The function of those tensors; by default the only one of them, as it is.
    """

    sources: tuple[str, ...]
    shape: Shape
    build: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class Copies:
    """Tensors of the source that must be equal, because the other layout holds them once.

    Args:
        first: The one that is taken.
        others: What the others are called in an error message -> their names.
    """

    first: str
    others: Mapping[str, str]


@dataclass(frozen=True)
class Layout:
    """Everything that turns one layout into another.

    Args:
        parts: Name in the target -> how it is made.
        copies: Tensors of the source that must be equal.
        constants: Tensors of the source that need not be there and are not read, but must have this value.
        ignored: Prefixes of tensors of the source that carry nothing.
    """

    parts: Mapping[str, Part]
    copies: Sequence[Copies] = ()
    constants: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Numbers in the target."""
        return sum(math.prod(part.shape) for part in self.parts.values())


def check_names(layout: Layout, shapes: Mapping[str, Shape], where: Path) -> None:
    """Check that a source has exactly the tensors that a layout reads.

    Args:
        layout: What is to be made.
        shapes: Name -> shape of the source's tensors.
        where: How an error message names the source.

    Raises:
        InputError: a tensor is missing or unknown, or one that is taken as it is has another shape.
    """
    read = {name for part in layout.parts.values() for name in part.sources}
    read |= {name for copies in layout.copies for name in copies.others.values()}
    missing = sorted(read - set(shapes))
    known = read | set(layout.constants)
    unknown = sorted(n for n in shapes if n not in known and not n.startswith(layout.ignored or ("\0",)))
    if missing or unknown:
        problems = [f"{len(missing)} tensors are missing, such as {missing[0]!r}"] if missing else []
        problems += [f"{len(unknown)} are unknown, such as {unknown[0]!r}"] if unknown else []
        hint = nearest(missing[0], unknown) if missing and unknown else ""
        raise InputError(
            f"the tensors of {where} are not those of its architecture: {'; '.join(problems)}{hint}",
            expected=f"the {len(read)} tensors that its configuration promises",
        )
    for part in layout.parts.values():
        if part.build is None and shapes[part.sources[0]] != part.shape:
            raise _shape_error(where, part.sources[0], shapes[part.sources[0]], part.shape)


def check_values(layout: Layout, reader: Reader) -> None:
    """Check what a layout takes for granted of the source's values.

    Raises:
        InputError: copies of one tensor differ, or a constant has another value.
    """
    import torch

    for copies in layout.copies:
        first = reader.read(copies.first)
        for where, name in copies.others.items():
            if not torch.equal(reader.read(name), first):
                raise InputError(
                    f"{where} of {reader.where} has a {name!r} of its own, unlike {copies.first!r}",
                    expected="equal copies in every block: finectl's DiT has one embedder for all of them",
                )
    for name, constant in layout.constants.items():
        if name not in reader.shapes:
            continue
        wanted = constant()
        found = reader.read(name).float()
        if found.numel() != wanted.numel() or not torch.allclose(
            found.reshape(wanted.shape), wanted, atol=CONSTANT_TOLERANCE, rtol=0
        ):
            raise InputError(
                f"{name!r} of {reader.where} is not the fixed one of the architecture",
                expected="the 2-D sine-cosine embedding of a square grid; a learned one is not supported",
            )


def write_layout(path: Path, layout: Layout, reader: Reader, after_tensor: Callable[[], None] | None = None) -> None:
    """Write the target's tensors as float32 to a safetensors file, one at a time.

    The bytes depend on the tensors alone: names are sorted, and nothing else is in the header.

    Args:
        path: Where the file goes; it is there whole or not at all.
        layout: How each tensor is made.
        reader: The source.
        after_tensor: Called after each tensor.

    Raises:
        InputError: a tensor that was made has another shape than it should, or cannot be read.
        ResourceError: the disk is full.
    """
    header: dict[str, Any] = {}
    end = 0
    for name in sorted(layout.parts):
        size = 4 * math.prod(layout.parts[name].shape)
        header[name] = {"dtype": "F32", "shape": list(layout.parts[name].shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with staged(path) as temporary, temporary.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(layout.parts):
            _write_tensor(stream, build(layout.parts[name], name, reader))
            if after_tensor is not None:
                after_tensor()


def build(part: Part, name: str, reader: Reader) -> Tensor:
    """Return one tensor of the target, float32.

    Raises:
        InputError: it comes out in another shape, or its sources do not go together.
    """
    sources = [reader.read(source).float() for source in part.sources]
    try:
        made = part.build(*sources) if part.build is not None else sources[0]
    except (RuntimeError, IndexError) as error:
        raise InputError(f"{name!r} cannot be made of {', '.join(part.sources)}: {error}") from error
    if tuple(made.shape) != part.shape:
        raise _shape_error(reader.where, name, tuple(made.shape), part.shape)
    return made.float().contiguous()


def _write_tensor(stream: BinaryIO, tensor: Tensor) -> None:
    stream.write(tensor.reshape(-1).numpy().data)  # unlike tofile, this reports a full disk as one


def _shape_error(where: Path, name: str, found: Shape, wanted: Shape) -> InputError:
    return InputError(
        f"{name!r} of {where} has shape {'x'.join(map(str, found)) or 'scalar'}",
        expected=f"{'x'.join(map(str, wanted)) or 'scalar'}, as its configuration promises",
    )
