"""What can be measured of pairs, by name. No torch."""

from __future__ import annotations

from finectl.metrics.convergence import Better

FD_RAND, CLEAN_FID = "fd_rand", "clean_fid"
BETTER: dict[str, Better] = {"l1": "lower", "psnr": "higher", "ssim": "higher", FD_RAND: "lower", CLEAN_FID: "lower"}
LABELS = {
    "l1": "mean absolute difference of images in [-1, 1]",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    FD_RAND: "Fréchet distance in random features (no FID)",
    CLEAN_FID: "FID (clean)",
}
DECIMALS = {"l1": 4, "psnr": 2, "ssim": 4, FD_RAND: 4, CLEAN_FID: 2}
