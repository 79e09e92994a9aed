"""Makes torchvision importable where its compiled extension cannot be loaded.

The wheel of torchvision that pip picks beside a CPU-only torch holds an extension linked against CUDA libraries.
Without the extension the operators `torchvision::nms` and `torchvision::qnms` do not exist, torchvision's own import
raises, and with it the import of everything that uses torchvision when it is installed: diffusers, transformers, peft,
timm, open_clip.

The finder below waits for `torchvision.extension`, the first module that torchvision imports and the one in which it
tries to load the extension, and declares the two operators after that attempt if they are still missing. What really
needs the extension then says so when it is called. Until torchvision is imported by somebody, nothing is imported here.
"""

from __future__ import annotations

import sys

# `typing` and `importlib` would cost more than everything else in this module; type checkers know the name below.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

EXTENSION_MODULE = "torchvision.extension"
OPERATORS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _ExtensionLoader:
    """The module's own loader, followed by the declaration of the operators which that module should have loaded."""

    def __init__(self, loader: Loader, finder: TorchvisionFinder) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Tools that read a module's loader (inspect, importlib.resources) find the real one.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._finder.declare_missing_operators()


class TorchvisionFinder:
    """Meta-path finder that declares torchvision's operators once its extension has failed to load."""

    def __init__(self) -> None:
        self._searching = False
        self._library: Any = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec that the other finders give for `torchvision.extension`, with the loader wrapped.

        Args:
            fullname: Name of the module that is looked for; any other than `torchvision.extension` is left alone.
            path: Search path of the parent package.
            target: Module that is being reloaded, where there is one.

        Returns:
            The spec, or None to let the next finder answer.
        """
        if fullname != EXTENSION_MODULE or self._searching:
            return None
        self._searching = True  # another finder may itself ask for this module's spec
        try:
            spec = _spec_from_others(self, fullname, path, target)
        finally:
            self._searching = False
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _ExtensionLoader(spec.loader, self)  # type: ignore[assignment, arg-type]
        return spec

    def declare_missing_operators(self) -> None:
        """Declare the schemas of `nms` and `qnms` unless the extension, or an earlier call, has registered `nms`."""
        from importlib import import_module

        torch: Any = import_module("torch")
        if hasattr(torch.ops.torchvision, OPERATORS[0]):
            return
        library = torch.library.Library("torchvision", "DEF")
        for name in OPERATORS:
            library.define(name + SCHEMA)
        self._library = library  # the operators vanish when the library object is collected


def _spec_from_others(
    own: TorchvisionFinder, fullname: str, path: Sequence[str] | None, target: ModuleType | None
) -> ModuleSpec | None:
    for finder in list(sys.meta_path):
        find_spec = None if finder is own else getattr(finder, "find_spec", None)
        spec: ModuleSpec | None = None if find_spec is None else find_spec(fullname, path, target)
        if spec is not None:
            return spec
    return None


def install_torchvision_finder() -> None:
    """Put a `TorchvisionFinder` first on `sys.meta_path`, once a process."""
    if not any(isinstance(finder, TorchvisionFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionFinder())
