"""What the extractors share whose networks others have trained: packages, weights, images, arithmetic.

What is asked while a run is planned (`require_packages`, `check_weights`) needs no torch.
"""

from __future__ import annotations

import importlib.util
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finectl.errors import InputError
from finectl.models.foreign.readers import SafetensorsReader, as_state, load_pickled

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor, nn

INSTALL = "pip install 'finectl[vision]'"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ZIP, PICKLE = b"PK\x03\x04", b"\x80"
SAFETENSORS = ".safetensors"
WRAPPER = "state_dict"  # under which training checkpoints keep the parameters
SHOWN_TENSORS = 3
SHOWN_CHARACTERS = 300
WHITE = 255.0
RGB = 3


def require_packages(names: Collection[str], what: str) -> None:
    """Check that packages are installed, without importing them.

    Args:
        names: Top-level packages.
        what: What needs them, for the message.

    Raises:
        InputError: one is missing.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{what} needs {', '.join(missing)}, not installed here", fix=INSTALL)


def check_weights(path: Path, fix: str) -> None:
    """Check, without torch, that a file is one of weights and was not cut off.

    Args:
        path: A .safetensors file, or one that `torch.save` wrote.
        fix: How to get the file, for messages.

    Raises:
        InputError: it is missing, cut off or something else.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(len(ZIP))
    except OSError as error:
        raise InputError(f"the weights {path} cannot be read: {error.strerror}", fix=fix) from error
    if path.suffix == SAFETENSORS:
        try:
            SafetensorsReader(path, [path])
        except InputError as error:
            raise InputError(error.what, expected=error.expected, fix=fix) from error
        return
    if start == ZIP and not zipfile.is_zipfile(path):
        raise InputError(f"the weights {path} are cut off", expected="a whole file that torch.save wrote", fix=fix)
    if start != ZIP and start[:1] != PICKLE:
        raise InputError(
            f"{path} holds no weights: it starts with {start!r}",
            expected="a state dict: a .safetensors file, or a file that torch.save wrote",
            fix=fix,
        )


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict, running nothing that the file holds; tensors are mapped where the format allows.

    Args:
        path: A .safetensors file, or one of `torch.save`: of a state dict, or of a table with one under "state_dict".

    Raises:
        InputError: it holds something else or is damaged.
    """
    if path.suffix == SAFETENSORS:
        reader = SafetensorsReader(path, [path])
        return {name: reader.read(name) for name in reader.shapes}
    content = load_pickled(path)
    if isinstance(content, Mapping) and isinstance(content.get(WRAPPER), Mapping):
        content = content[WRAPPER]
    return as_state(content, path)


@contextmanager
def uninitialised() -> Iterator[None]:
    """Build networks without drawing most of their random weights, for those whose every tensor `fit` then replaces.

    A billion random numbers take longer than reading the file, and memory that is never touched is never taken. Only
    whole functions of torch.nn.init are left out: those that call a tensor's `normal_` themselves may draw again until
    they like what they see. The global random numbers are as before afterwards.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    left_out = (torch.nn.init.normal_, torch.nn.init.uniform_, torch.nn.init.kaiming_uniform_)

    class NoDraws(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in left_out:
                return args[0] if args else kwargs["tensor"]
            return function(*args, **(kwargs or {}))

    with torch.random.fork_rng(devices=[]), NoDraws():
        yield


def fit(network: nn.Module, state: Mapping[str, Tensor], where: Path, what: str) -> None:
    """Make the tensors of a state those of a network; every tensor of either must be in the other.

    Args:
        network: The network.
        state: Name -> tensor.
        where: Where the state is from, for the message.
        what: What the network is, for the message.

    Raises:
        InputError: names or shapes differ; the message has the first that do.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    faults = [
        f"{name} is {tuple(state[name].shape)} and should be {shape}"
        for name, shape in wanted.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if not faults:
        try:
            # Networks rename what older files of theirs call otherwise.
            keys = network.load_state_dict(dict(state), strict=False, assign=True)
        except RuntimeError as error:
            faults = [" ".join(str(error).split())[:SHOWN_CHARACTERS]]
        else:
            faults = [f"{name} is missing" for name in keys.missing_keys]
            faults += [f"{name} has no place in it" for name in keys.unexpected_keys]
    if faults:
        more = f" and {len(faults) - SHOWN_TENSORS} more" if len(faults) > SHOWN_TENSORS else ""
        raise InputError(
            f"{where} does not fit {what}: {'; '.join(faults[:SHOWN_TENSORS])}{more}",
            expected=f"the weights of {what}, {len(wanted)} tensors",
            fix="name the network that the weights are of, or the weights of this network",
        )


def as_rgb(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return an image (H, W, 1 or 3) as (H, W, 3); grey is repeated."""
    import numpy as np

    return image if image.shape[-1] == RGB else np.repeat(image, RGB, axis=-1)


def clean_resizer(height: int, width: int) -> Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]:
    """Return clean-fid's resizing: PIL's bicubic filter on floats, a channel at a time, without rounding to 8 bits.

    Returns:
        A function (H, W, 3) uint8 -> (height, width, 3) float32 in [0, 255]; several threads may call it.

    Reference: Parmar et al., arXiv 2104.11222.
    """
    require_packages(["cleanfid"], "resizing images")
    from cleanfid.resize import make_resizer

    resize: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]
    resize = make_resizer("PIL", False, "bicubic", (width, height))
    return resize


class CleanPreparation:
    """Clean bicubic resizing to one size, the range [0, 1], then a mean and a deviation a channel.

    Args:
        height: Of the result, pixels.
        width: Of the result, pixels.
        mean: A channel, of values in [0, 1].
        std: A channel.
    """

    def __init__(self, height: int, width: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self._resize = clean_resizer(height, width)
        self._mean, self._std = mean, std

    def __call__(self, image: npt.NDArray[np.uint8]) -> Tensor:
        """Return an image (H, W, 1 or 3) as float32 (3, height, width)."""
        import torch

        resized = torch.from_numpy(self._resize(as_rgb(image))).permute(2, 0, 1)  # (3, height, width)
        return normalised(resized, self._mean, self._std)


def normalised(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return an image (3, H, W) in [0, 255] in units of deviations from a mean, both given for the range [0, 1]."""
    shape = (-1, 1, 1)
    return ((image / WHITE - image.new_tensor(mean).view(shape)) / image.new_tensor(std).view(shape)).contiguous()


@contextmanager
def computing(device: torch.device, dtype: str) -> Iterator[None]:
    """Compute without gradients, in true float32 (TF32 off, whatever others have set) or in bfloat16 autocast."""
    import torch

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    cast: Any = torch.autocast(device.type, dtype=torch.bfloat16) if dtype == "bfloat16" else nullcontext()
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        with torch.inference_mode(), cast:
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
