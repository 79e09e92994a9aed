"""Values of pairs against torchmetrics' public functions and against what can be worked out by hand."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finectl.errors import InputError
from finectl.metrics import METRICS, paired
from finectl.metrics.measured import Measured
from finectl.metrics.paired import PAIRED, Lpips, describe_lpips, l1, measure_pairs, psnr, ssim, summarize_pairs

pytest.importorskip("torchmetrics")
pytest.importorskip("torchvision")

CPU = torch.device("cpu")


def make_pairs(count: int, channels: int = 3, side: int = 32, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Return noisy images, and the same with other noise of a strength of its own for each."""
    generator = torch.Generator().manual_seed(count)
    shape = (count, channels, side, width or side)
    targets = torch.randint(0, 256, shape, generator=generator)
    noise = torch.randn(shape, generator=generator) * torch.linspace(2, 60, count).reshape(-1, 1, 1, 1)
    return (targets + noise).round().clamp(0, 255).byte(), targets.byte()


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like torchvision's, of random weights; its classifier, 233 MB that are not read, is left out."""
    import torchvision

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        features = torchvision.models.alexnet(weights=None).features
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    state = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    torch.save({**state, "classifier.1.weight": torch.zeros(2, 2)}, path)
    return path


@pytest.fixture(scope="module")
def network(alexnet: Path) -> Lpips:
    return Lpips(alexnet, CPU)


def test_l1_and_psnr_of_pairs_worked_out_by_hand() -> None:
    black, white = torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
    one_off = black.clone()
    one_off[0, 0, 0, 0] = 51  # a fifth of the range in a quarter of the pixels
    images, targets = torch.cat([white, one_off, black]), torch.cat([black, black, black])
    assert l1(images, targets).tolist() == pytest.approx([1, 0.05, 0], abs=1e-15)
    assert psnr(images, targets).tolist() == pytest.approx([0, 20, math.inf], abs=1e-12)
    assert torch.equal(l1(images, targets), l1(targets, images))
    assert {l1(images, targets).dtype, psnr(images, targets).dtype} == {torch.float64}


def test_psnr_is_that_of_torchmetrics() -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    images, targets = make_pairs(5)
    expected = peak_signal_noise_ratio(
        images.double() / 255, targets.double() / 255, data_range=1.0, reduction="none", dim=(1, 2, 3)
    )
    torch.testing.assert_close(psnr(images, targets), expected, rtol=1e-6, atol=0)
    assert psnr(images, targets).diff().lt(0).all()  # ever more noise


@pytest.mark.parametrize(("channels", "side", "width"), [(3, 32, 32), (1, 11, 24)])
def test_ssim_is_that_of_torchmetrics_pair_by_pair(channels: int, side: int, width: int) -> None:
    from torchmetrics.image import StructuralSimilarityIndexMeasure

    images, targets = make_pairs(10, channels, side, width)  # more than are computed at once
    metric = StructuralSimilarityIndexMeasure(data_range=1.0, reduction="none")
    expected = metric(images.float() / 255, targets.float() / 255)
    values = ssim(images, targets)
    torch.testing.assert_close(values, expected.double(), rtol=0, atol=2e-5)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ssim(images[order], targets[order]), values[order], rtol=0, atol=1e-12)
    torch.testing.assert_close(ssim(targets, targets), torch.ones(10).double(), rtol=0, atol=1e-12)


def test_ssim_is_that_of_its_definition_window_by_window() -> None:
    """Every pixel's window is cut out of the mirrored image; its moments are plain weighted sums."""
    images, targets = make_pairs(1, 1, 14)
    padded = [F.pad(levels.double() / 255, (5, 5, 5, 5), mode="reflect")[0, 0] for levels in (images, targets)]
    x, y = (image.unfold(0, 11, 1).unfold(1, 11, 1) for image in padded)  # (14, 14, 11, 11)
    places = torch.arange(-5, 6).double()
    line = torch.exp(-(places**2) / (2 * 1.5**2))
    weights = line[:, None] * line / line.sum() ** 2

    def mean(values: Tensor) -> Tensor:
        return (weights * values).sum((2, 3), keepdim=True)

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y, covariance = mean((x - mean_x) ** 2), mean((y - mean_y) ** 2), mean((x - mean_x) * (y - mean_y))
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    bottom = (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    assert float(ssim(images, targets)) == pytest.approx(float((top / bottom).mean()), abs=1e-12)


def test_lpips_is_that_of_torchmetrics_with_the_same_backbone(
    alexnet: Path, network: Lpips, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchmetrics.functional.image.lpips as reference
    import torchvision
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    def local(net: str, pretrained: bool = False) -> torch.nn.Module:
        features = torchvision.models.alexnet(weights=None).features
        state = torch.load(alexnet, weights_only=True)
        features.load_state_dict({name[9:]: tensor for name, tensor in state.items() if name.startswith("features.")})
        return features

    monkeypatch.setattr(reference, "_get_tv_model_features", local)
    metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True, reduction="mean")
    images, targets = make_pairs(10, side=31, width=40)
    values = network(images, targets)
    expected = [float(metric(images[i : i + 1] / 255, targets[i : i + 1] / 255)) for i in range(10)]
    assert values.tolist() == pytest.approx(expected, rel=1e-4)
    assert values.min() > 0
    assert values.unique().numel() == 10
    assert network(targets, targets).eq(0).all()


def test_lpips_depends_neither_on_the_batch_nor_on_the_order(network: Lpips) -> None:
    images, targets = make_pairs(11)
    values = network(images, targets)
    assert values.shape == (11,)
    assert torch.equal(torch.cat([network(images[:3], targets[:3]), network(images[3:4], targets[3:4])]), values[:4])
    torch.testing.assert_close(network(images.flip(0), targets.flip(0)).flip(0), values, rtol=0, atol=1e-9)


def test_lpips_repeats_grey(network: Lpips) -> None:
    images, targets = make_pairs(2, channels=1)
    assert torch.equal(network(images, targets), network(images.expand(-1, 3, -1, -1), targets.expand(-1, 3, -1, -1)))


def test_loading_lpips_leaves_the_random_numbers_alone(alexnet: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Lpips(alexnet, CPU)
    assert torch.equal(torch.rand(3), expected)


def test_lpips_refuses_other_networks_and_files_with_code(alexnet: Path, tmp_path: Path) -> None:
    state = torch.load(alexnet, weights_only=True)
    other = tmp_path / "other.pth"
    torch.save({**state, "features.6.weight": torch.zeros(3)}, other)
    with pytest.raises(
        InputError, match=r"other\.pth is not torchvision's AlexNet: its tensor features\.6\.weight has"
    ):
        Lpips(other, CPU)
    torch.save({name: tensor for name, tensor in state.items() if name != "features.10.bias"}, other)
    with pytest.raises(InputError, match=r"features\.10\.bias is missing"):
        Lpips(other, CPU)
    torch.save({"weights": Path("x")}, other)
    with pytest.raises(InputError, match="could run code"):
        Lpips(other, CPU)
    other.write_bytes(alexnet.read_bytes()[:1000])
    with pytest.raises(InputError, match="damaged"):
        Lpips(other, CPU)


@pytest.mark.parametrize("name", ["l1", "psnr", "ssim", "lpips"])
def test_pairs_that_do_not_fit(name: str, network: Lpips) -> None:
    images, targets = make_pairs(2)
    with pytest.raises(InputError, match="differ in shape: 2 of 3x32x32 and 2 of 3x32x31"):
        measure_pairs(name, images, targets[..., :31], network)
    with pytest.raises(InputError, match="differ in shape: 2 of 3x32x32 and 1 of 3x32x32"):
        measure_pairs(name, images, targets[:1], network)
    with pytest.raises(InputError, match=r"float32.*uint8"):
        measure_pairs(name, images.float(), targets, network)
    assert measure_pairs(name, images, targets, network).shape == (2,)
    assert measure_pairs(name, images[:0], targets[:0], network).shape == (0,)


def test_images_too_small_for_a_metric(network: Lpips) -> None:
    images, targets = make_pairs(1, side=30, width=10)
    for measure, smallest in ((ssim, 11), (network, 31)):
        with pytest.raises(InputError, match="10x30 pixels are too small") as caught:
            measure(images, targets)
        assert f"{smallest}x{smallest}" in caught.value.expected
        enough = make_pairs(1, side=smallest)
        assert measure(*enough).isfinite().all()
    with pytest.raises(InputError, match="2 channels"):
        network(*make_pairs(1, channels=2))


def test_summaries_count_identical_pairs_apart() -> None:
    values = torch.tensor([10.0, math.inf, 30.0, math.inf], dtype=torch.float64)
    summary = summarize_pairs("psnr", values)
    assert summary == Measured.mean_of(torch.tensor([10.0, 30.0]), {"identical": 2})
    assert (summary.value, summary.details) == (20, {"n": 2, "identical": 2})
    everything = summarize_pairs("psnr", values[1:2])
    assert (everything.value, everything.details) == (math.inf, {"n": 0, "identical": 1})
    assert summarize_pairs("ssim", torch.ones(3)) == Measured(1, 1, 1, {"n": 3})


def test_every_paired_metric_of_the_table_is_here() -> None:
    assert {name for name, metric in METRICS.items() if metric.paired} == {*PAIRED, "lpips"}
    assert all(METRICS[name].better == ("higher" if name in ("psnr", "ssim") else "lower") for name in PAIRED)


def test_lpips_is_described_by_its_weights(alexnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    monkeypatch.setenv("FINECTL_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"alexnet-owt-7be5be79\.pth") as caught:
        describe_lpips(None)
    assert "--lpips" in caught.value.fix
    info = describe_lpips(str(alexnet))
    assert (info.name, info.path) == ("lpips", str(alexnet))
    assert info.digest == hashlib.sha256(alexnet.read_bytes()).hexdigest()
    assert info.details["network"] == "alexnet" and len(info.details["linear_digest"]) == 64
    usual = tmp_path / "weights" / "alexnet-owt-7be5be79.pth"
    usual.parent.mkdir()
    usual.write_bytes(alexnet.read_bytes())
    assert describe_lpips(None).digest == info.digest
    assert describe_lpips(None).path == str(usual)


@pytest.mark.parametrize("package", ["torchmetrics", "torchvision"])
def test_a_missing_package_is_named(package: str, alexnet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(InputError, match=f"{package}, which the metric lpips needs") as caught:
        describe_lpips(str(alexnet))
    assert caught.value.fix == "pip install 'finectl[vision]'"
    if package == "torchmetrics":
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            monkeypatch.setitem(sys.modules, name, None)
        for use in (lambda: ssim(*make_pairs(1)), lambda: Lpips(alexnet, CPU)):
            with pytest.raises(InputError, match=r"torchmetrics.* not installed") as caught:
                use()
            assert caught.value.fix == "pip install 'finectl[vision]'"


def test_describing_needs_neither_torch_nor_torchmetrics(alexnet: Path) -> None:
    program = (
        "import sys; from finectl.metrics.paired import describe_lpips; describe_lpips(sys.argv[1]);"
        "print([name for name in ('torch', 'torchmetrics', 'torchvision', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(alexnet)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert paired.LPIPS_VERSION == "0.1"
