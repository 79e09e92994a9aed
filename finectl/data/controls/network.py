"""Networks that measure controls: transformers models, from a folder or the hub, as safetensors.

What is said of one (`describe_network`) is found out without torch; it is read by `load_network`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finectl.artifacts.cache import remembered_sha256
from finectl.artifacts.files import read_json_object, sha256_json
from finectl.artifacts.tensors import check_header
from finectl.errors import FinectlError, InputError
from finectl.hub import WEB, is_hub_id, local_folder

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS, PREPROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
PICKLED = "pytorch_model.bin"
PATTERNS = (CONFIG, WEIGHTS, PREPROCESSOR)
EXPECTED = f"a folder with {CONFIG}, {PREPROCESSOR} and {WEIGHTS}, as transformers writes them"
INSTALL = "pip install 'finectl[text]'"


def mending(example: str) -> str:
    """Return how to get such a network."""
    return (
        f"--control-model {example} --download, or copy {CONFIG}, {PREPROCESSOR} and {WEIGHTS} of {WEB}/{example} "
        "into a folder and give its path: --control-model PATH"
    )


def describe_network(name_or_path: str, example: str) -> dict[str, Any]:
    """Say what a network is.

    Args:
        name_or_path: A folder or a hub id.
        example: One that would do, for messages.

    Returns:
        "name" (hub id or absolute path) and "digest" (sha256 over its three files, hexadecimal).

    Raises:
        InputError: it is not there, not whole, or its weights are not safetensors.
    """
    fix = mending(example)
    if not is_hub_id(name_or_path) and not Path(name_or_path).expanduser().exists():
        raise InputError(f"there is no network at {name_or_path!r}", expected=EXPECTED, fix=fix)
    folder = local_folder(name_or_path, "the network of --control-model", PATTERNS)
    if not folder.is_dir():
        raise InputError(f"{folder} is a file", expected=EXPECTED, fix=fix)
    for name in (CONFIG, PREPROCESSOR, WEIGHTS):
        if not (folder / name).is_file():
            pickled = name == WEIGHTS and (folder / PICKLED).is_file()
            reason = f"; it has {PICKLED}, a pickle, which can hold code and is not opened" if pickled else ""
            raise InputError(f"{folder} holds no {name}{reason}", expected=EXPECTED, fix=fix)
    try:
        check_header(folder / WEIGHTS)
    except FinectlError as error:
        raise InputError(error.what, expected=error.expected, fix="download or copy the file again") from error
    essentials = {key: value for key, value in _plain(folder / CONFIG).items() if not key.startswith("_")}
    essentials.pop("transformers_version", None)
    named = is_hub_id(name_or_path)
    return {
        "name": name_or_path if named else os.path.abspath(Path(name_or_path).expanduser()),
        "digest": sha256_json([essentials, _plain(folder / PREPROCESSOR), remembered_sha256(folder / WEIGHTS)]),
    }


def _plain(path: Path) -> dict[str, Any]:
    return read_json_object(path, expected="what transformers writes")


def load_network(record: Mapping[str, Any], kinds: tuple[str, ...], example: str, device: str | torch.device) -> Any:
    """Read the network that `describe_network` described, and its preprocessor.

    Args:
        record: "name" and "digest".
        kinds: transformers' classes to try, `AutoModelFor...`.
        example: A network that would do, for messages.
        device: Where it is to be.

    Returns:
        The preprocessor and the network, this in evaluation mode.

    Raises:
        InputError: transformers is not installed, or the files are gone, others, or of another kind.
    """
    if importlib.util.find_spec("transformers") is None:
        raise InputError("transformers, which runs the network of --control-model, is not installed", fix=INSTALL)
    import torch
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # stderr has one kind of progress
    name, fix = str(record["name"]), mending(example)
    if describe_network(name, example)["digest"] != record["digest"]:
        raise InputError(
            f"the network at {name} is not the one that measured this control",
            expected=f"digest {str(record['digest'])[:12]}",
            fix="put the same files there again",
        )
    folder = str(local_folder(name, "the network of --control-model", PATTERNS))
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        known = [kind for kind in kinds if type(config) in getattr(transformers, kind)._model_mapping]
        if not known:
            raise InputError(
                f"{folder} is of type {config.model_type!r}, which measures something else",
                expected=f"a network for {' or '.join(kinds)}, such as {example}",
                fix=fix,
            )
        loaded: Any = getattr(transformers, known[0]).from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    # transformers and torch raise each of these for files that do not fit.
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder} cannot be read by transformers: {reason}", fix=fix) from error
    network, loading = loaded
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers would leave these at random values
        raise InputError(
            f"{folder}/{WEIGHTS} lacks {len(missing)} tensors of its configuration, such as {missing[0]}", fix=fix
        )
    return processor, network.to(device, torch.float32).eval().requires_grad_(False)
