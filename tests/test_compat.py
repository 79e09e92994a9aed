"""The torchvision finder, each case in a fresh interpreter because imports and operators outlive a test."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FAKE_EXTENSION = """
import torch
{load}
"""
FAKE_META = """
import torch
assert hasattr(torch.ops.torchvision, "nms"), "operator torchvision::nms does not exist"
"""
LOADS = """
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def run(code: str, *path: Path) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT])), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def fake_torchvision(folder: Path, load: str) -> Path:
    """Write a package which imports in torchvision's order: the extension first, then what needs its operators."""
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("from . import extension\nfrom . import meta\n")
    (package / "extension.py").write_text(FAKE_EXTENSION.format(load=load))
    (package / "meta.py").write_text(FAKE_META)
    return folder


def test_importing_finectl_imports_nothing_heavy() -> None:
    code = """
import sys
before = set(sys.modules)
import finectl.compat
print(sorted(set(sys.modules) - before))
"""
    assert run(code) == "['finectl', 'finectl.compat']"


def test_installing_twice_adds_one_finder() -> None:
    code = """
import sys, finectl
from finectl import compat
compat.install_torchvision_finder()
print(sum(isinstance(f, compat.TorchvisionFinder) for f in sys.meta_path))
"""
    assert run(code) == "1"


def test_find_spec_answers_without_importing_torch() -> None:
    needs("torchvision")
    code = """
import sys, finectl, importlib.util
spec = importlib.util.find_spec("torchvision")
print(spec is not None, "torch" in sys.modules, importlib.util.find_spec("torchvision_is_not_this") is None)
"""
    assert run(code) == "True False True"


@pytest.mark.parametrize(
    ("package", "statement"),
    [
        ("torchvision", "import torchvision; torchvision.transforms.Compose([])"),
        ("torchvision", "from torchvision.transforms import v2"),
        ("timm", "import timm"),
        ("open_clip", "import open_clip"),
        ("diffusers", "from diffusers import DiTPipeline"),
    ],
)
def test_packages_that_use_torchvision_import(package: str, statement: str) -> None:
    needs("torchvision")
    needs(package)
    code = f"""
import finectl
{statement}
import sys
assert "torchvision" in sys.modules or {package!r} == "diffusers"
import torchvision, torchvision.extension
print(type(torchvision.extension.__loader__).__name__, type(torchvision.extension.__spec__.loader).__name__)
"""
    assert run(code) == "SourceFileLoader SourceFileLoader"


def test_what_needs_the_extension_says_so() -> None:
    needs("torchvision")
    code = """
import finectl, torch, torchvision
if torchvision.extension._has_ops():
    print("works")
else:
    try:
        torchvision.ops.nms(torch.rand(2, 4), torch.rand(2), 0.5)
    except RuntimeError as error:
        print("works" if "C++ ops" in str(error) else error)
"""
    assert run(code) == "works"


def test_failed_extension_gets_both_operators(tmp_path: Path) -> None:
    code = """
import finectl, gc, torchvision, torch
gc.collect()
print(str(torch.ops.torchvision.nms.default._schema), hasattr(torch.ops.torchvision, "qnms"))
"""
    out = run(code, fake_torchvision(tmp_path, "# the library cannot be loaded"))
    assert out == "torchvision::nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor True"


def test_failed_extension_without_the_finder_breaks_the_import(tmp_path: Path) -> None:
    code = """
try:
    import torchvision
except AssertionError as error:
    print(error)
"""
    assert "nms does not exist" in run(code, fake_torchvision(tmp_path, "# the library cannot be loaded"))


def test_working_extension_is_left_alone(tmp_path: Path) -> None:
    """`qnms` would be there too if the finder had declared anything beside the extension's own `nms`."""
    code = """
import finectl, torchvision, torch
print(hasattr(torch.ops.torchvision, "nms"), hasattr(torch.ops.torchvision, "qnms"))
"""
    assert run(code, fake_torchvision(tmp_path, LOADS)) == "True False"


def test_second_import_after_removal_declares_nothing_twice(tmp_path: Path) -> None:
    code = """
import finectl, sys, torchvision
for name in [n for n in sys.modules if n.startswith("torchvision")]:
    del sys.modules[name]
import torchvision, importlib
importlib.reload(torchvision.extension)
print("imported")
"""
    assert run(code, fake_torchvision(tmp_path, "# the library cannot be loaded")) == "imported"


def test_a_finder_that_asks_again_does_not_loop(tmp_path: Path) -> None:
    code = """
import finectl, sys, importlib.machinery

class Asks:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision.extension":
            for finder in sys.meta_path:
                if finder is not self and (spec := finder.find_spec(name, path, target)):
                    return spec
        return None

sys.meta_path.insert(1, Asks())
import torchvision, torch
print(hasattr(torch.ops.torchvision, "nms"))
"""
    assert run(code, fake_torchvision(tmp_path, "# the library cannot be loaded")) == "True"
