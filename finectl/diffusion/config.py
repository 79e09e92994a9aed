"""What a model's noise schedule is: a few numbers that travel in config.json (no torch import)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from finectl.errors import InputError, UsageError

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
TRAIN_TIMESTEPS = 1000
BETA_START = 1e-4
BETA_END = 0.02
# Fields of a scheduler's configuration that change the forward process in a way that is not supported here.
REFUSED = {"trained_betas": None, "rescale_betas_zero_snr": False}


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward process of a model and what it predicts, in diffusers' words.

    Args:
        beta_schedule: `linear`, `scaled_linear` (linear in the square root) or `squaredcos_cap_v2` (cosine; the two
            ends are not read).
        beta_start: First beta, in (0, 1).
        beta_end: Last beta, in (0, 1).
        timesteps: T, at least 1.
        prediction: `epsilon` (the noise), `v_prediction` or `sample` (the clean image).

    Raises:
        UsageError: a value is out of range.
    """

    beta_schedule: str = "linear"
    beta_start: float = BETA_START
    beta_end: float = BETA_END
    timesteps: int = TRAIN_TIMESTEPS
    prediction: str = "epsilon"

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

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> DiffusionConfig:
        """Build it from what `to_dict` returned.

        Raises:
            InputError: a field is unknown, of another type or out of range.
        """
        kinds = {"beta_schedule": str, "beta_start": float, "beta_end": float, "timesteps": int, "prediction": str}
        if not isinstance(values, Mapping) or not set(values) <= set(kinds):
            raise InputError(f"the noise schedule {values!r} is not one", expected=f"the fields {', '.join(kinds)}")
        for name, value in values.items():
            allowed = (int, float) if kinds[name] is float else (kinds[name],)
            if not isinstance(value, allowed) or isinstance(value, bool):
                raise InputError(
                    f"the noise schedule's {name} is {value!r}", expected=f"a value of type {kinds[name].__name__}"
                )
        try:
            return cls(**values)
        except UsageError as error:
            raise InputError(f"the noise schedule is wrong: {error.what}", expected=error.expected) from error

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
        """Return the options of a diffusers scheduler for this process."""
        return {
            "num_train_timesteps": self.timesteps,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "beta_schedule": self.beta_schedule,
            "prediction_type": self.prediction,
        }


DDPM = DiffusionConfig()
"""The process of DDPM and DiT, with which finectl trains: 1,000 linear betas from 1e-4 to 0.02, noise prediction."""
