"""What a model's noise schedule is: a few numbers that travel in config.json (no torch import)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from finectl.errors import InputError, UsageError

EDM = "edm"
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", EDM)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
TRAIN_TIMESTEPS = 1000
BETA_START = 1e-4
BETA_END = 0.02
P_MEAN, P_STD, SIGMA_DATA = -1.2, 1.2, 0.5
"""EDM's distribution of ln(sigma) in training, and the standard deviation of its data, images in [-1, 1]."""
OF_BETAS = ("beta_start", "beta_end")
OF_EDM = ("p_mean", "p_std", "sigma_data")
# Fields of a scheduler's configuration that change the forward process in a way that is not supported here.
REFUSED = {"trained_betas": None, "rescale_betas_zero_snr": False}


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward process of a model and what it predicts, in diffusers' words.

    Args:
        beta_schedule: `linear`, `scaled_linear` (linear in the square root), `squaredcos_cap_v2` (cosine; the two
            ends are not read), or `edm` (`finectl.diffusion.edm`).
        beta_start: First beta, in (0, 1).
        beta_end: Last beta, in (0, 1).
        timesteps: T, at least 1.
        prediction: `epsilon` (the noise), `v_prediction` or `sample` (the clean image).
        p_mean: Mean of ln(sigma) in training, of `edm`.
        p_std: Its standard deviation, above 0.
        sigma_data: Standard deviation of the data, by which `edm` divides them, above 0.

    Raises:
        UsageError: a value is out of range.
    """

    beta_schedule: str = "linear"
    beta_start: float = BETA_START
    beta_end: float = BETA_END
    timesteps: int = TRAIN_TIMESTEPS
    prediction: str = "epsilon"
    p_mean: float = P_MEAN
    p_std: float = P_STD
    sigma_data: float = SIGMA_DATA

    def __post_init__(self) -> None:
        if self.beta_schedule not in BETA_SCHEDULES:
            raise UsageError(
                f"the beta schedule {self.beta_schedule!r} is not supported",
                expected=f"one of: {', '.join(BETA_SCHEDULES)}",
            )
        if self.prediction not in PREDICTIONS:
            raise UsageError(
                f"the prediction {self.prediction!r} is not supported", expected=f"one of: {', '.join(PREDICTIONS)}"
            )
        if not (0 < self.beta_start < 1 and 0 < self.beta_end < 1) or self.timesteps < 1:
            raise UsageError(
                f"betas from {self.beta_start} to {self.beta_end} over {self.timesteps} timesteps",
                expected="betas between 0 and 1, and at least 1 timestep",
            )

        if self.is_edm and self.prediction != "v_prediction":
            raise UsageError(
                f"the prediction {self.prediction!r} does not go with EDM's process",
                expected="'v_prediction', which is what EDM's preconditioning predicts",
            )
        if not (self.p_std > 0 and self.sigma_data > 0 and math.isfinite(self.p_mean + self.p_std + self.sigma_data)):
            raise UsageError(
                f"ln(sigma) of mean {self.p_mean} and standard deviation {self.p_std}, data of {self.sigma_data}",
                expected="finite numbers, and standard deviations above 0",
            )

    @property
    def is_edm(self) -> bool:
        """Whether it is EDM's process."""
        return self.beta_schedule == EDM

    @property
    def data_scale(self) -> float:
        """What the data are multiplied by before they are made noisy."""
        return 1 / self.sigma_data if self.is_edm else 1.0

    def require_variance(self, learned: bool) -> None:
        """Check that a model with or without a learned variance can be of this process.

        Raises:
            UsageError: it cannot.
        """
        if learned and self.is_edm:
            raise UsageError("EDM's process does not go with a learned variance", expected="a model that learns none")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that this process reads as plain JSON values."""
        unread = OF_BETAS if self.is_edm else OF_EDM
        return {name: value for name, value in asdict(self).items() if name not in unread}

    @classmethod
    def from_dict(cls, values: Any) -> DiffusionConfig:
        """Build it from what `to_dict` returned.

        Raises:
            InputError: a field is unknown, of another type or out of range.
        """
        kinds = {field.name: KINDS[str(field.type)] for field in fields(cls)}
        if not isinstance(values, Mapping) or not set(values) <= set(kinds):
            raise InputError(f"the noise schedule {values!r} is not one", expected=f"the fields {', '.join(kinds)}")
        for name, value in values.items():
            allowed = (int, float) if kinds[name] is float else (kinds[name],)
            if not isinstance(value, allowed) or isinstance(value, bool):
                raise InputError(
                    f"the noise schedule's {name} is {value!r}", expected=f"a value of type {kinds[name].__name__}"
                )
        try:
            made = cls(**values)
        except UsageError as error:
            raise InputError(f"the noise schedule is wrong: {error.what}", expected=error.expected) from error
        for name in values:
            if name not in made.to_dict():
                raise InputError(f"the noise schedule {made.beta_schedule!r} has no {name}")
        return made

    @classmethod
    def from_scheduler(cls, scheduler: Mapping[str, Any], where: str) -> DiffusionConfig:
        """Read it from the scheduler_config.json of a diffusers pipeline.

        Args:
            scheduler: The file's content.
            where: How an error message names it.

        Raises:
            InputError: the forward process is none of those that finectl knows.
        """
        for name, neutral in REFUSED.items():
            if scheduler.get(name, neutral) not in (neutral, None):
                raise InputError(
                    f"{where} sets {name}, which finectl does not know", expected=f"{name}: {str(neutral).lower()}"
                )
        if "num_train_timesteps" not in scheduler or "beta_schedule" not in scheduler:
            raise InputError(
                f"{where} ({scheduler.get('_class_name', 'of no class')}) has no beta schedule",
                expected="a variance-preserving scheduler such as DDPMScheduler, DDIMScheduler or PNDMScheduler",
            )
        values = {name: scheduler[name] for name in ("beta_schedule", "beta_start", "beta_end") if name in scheduler}
        prediction = scheduler.get("prediction_type", "epsilon")
        try:
            return cls.from_dict({**values, "timesteps": scheduler["num_train_timesteps"], "prediction": prediction})
        except InputError as error:
            raise InputError(f"{where}: {error.what}", expected=error.expected) from error

    def to_scheduler(self) -> dict[str, Any]:
        """Return the options of a diffusers scheduler for this process.

        Raises:
            UsageError: it is EDM's, which scales the data; no pipeline of diffusers would.
        """
        if self.is_edm:
            raise UsageError("no scheduler of diffusers scales the data as EDM's process does", expected="another one")
        return {
            "num_train_timesteps": self.timesteps,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "beta_schedule": self.beta_schedule,
            "prediction_type": self.prediction,
        }


KINDS: Mapping[str, type] = {"str": str, "float": float, "int": int}
DDPM = DiffusionConfig()
"""The process of DDPM and DiT, with which finectl trains: 1,000 linear betas from 1e-4 to 0.02, noise prediction."""
PROCESSES: Mapping[str, DiffusionConfig] = {
    "ddpm": DDPM,
    EDM: DiffusionConfig(beta_schedule=EDM, prediction="v_prediction"),
}
"""What `--process` names, for pixels."""


def named_process(name: str, *, latents: bool) -> DiffusionConfig:
    """Return what `--process` names.

    EDM's numbers are for images in [-1, 1], of about half the deviation of latents, which are scaled to one of about 1:
    of these the noise is as much larger.

    Args:
        name: A key of `PROCESSES`.
        latents: Whether the data are latents.
    """
    process = PROCESSES[name]
    if not latents or not process.is_edm:
        return process
    return replace(process, sigma_data=1.0, p_mean=P_MEAN - math.log(SIGMA_DATA))
