"""A model under parameter-efficient tuning: what is put into it, what is trained, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from finectl.adapters.peft.files import save_adapter
from finectl.adapters.peft.table import BASE, NONE, PEFTS, PeftOptions, is_trained, require_peft, result_config
from finectl.diffusion.random import generator_for
from finectl.errors import UsageError
from finectl.models.io import ModelConfig


@dataclass
class Tuning:
    """A model that is being tuned.

    Args:
        model: With the method's parts in it, and only what the method trains not frozen; it answers as before, with
            the same `config` but for bottlenecks and prompts that stay.
        peft: The method.
        config: Of the model that went in.
    """

    model: Any
    peft: PeftOptions
    config: ModelConfig

    @property
    def lr_scale(self) -> float:
        """What the learning rate of full fine-tuning is multiplied by."""
        return self.peft.lr_scale

    @property
    def trainable(self) -> int:
        """Parameters that are trained."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def result_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a state of the model that comes out, which computes what the tuned model does.

        Args:
            state: Of the tuned model, raw or averaged, whole.

        Returns:
            Name -> tensor, in the architecture of `result_config`. Low-rank products are merged and scales folded in
            float32; what the method does not change is not copied.
        """
        found = {name: value.detach() for name, value in state.items()}
        if self.peft.method == NONE:
            return found
        merged: dict[str, Tensor] = PEFTS.load(self.peft.method).plain(found, self.config, self.peft)
        return {name.replace(f".{BASE}.", "."): value for name, value in merged.items()}

    def save_adapter(self, directory: Path, state: Mapping[str, Tensor], base: str | None = None) -> list[Path]:
        """Write what was trained, apart from the pre-trained weights.

        Args:
            directory: Where the files go; it is made if need be.
            state: Of the tuned model, raw or averaged, whole.
            base: How the files name the model that went in.

        Returns:
            The files.

        Raises:
            UsageError: all parameters were trained.
        """
        if not self.peft:
            raise UsageError("--peft none trains all parameters: there is no adapter apart from the model")
        return save_adapter(directory, self.config, self.peft, state, base)


def tune(model: Any, peft: PeftOptions, seed: int) -> Tuning:
    """Prepare a model for parameter-efficient tuning, in place.

    It computes what it did before, bit for bit, but with new prompts.

    Args:
        model: A DiT or a UNet of finectl, with its weights, on the CPU.
        peft: The method.
        seed: Of all that is random in the new parts. Random numbers of other generators are left as they were.

    Raises:
        UsageError: the method is not there for the architecture, or needs a package that is not installed.
    """
    config: ModelConfig = model.config
    require_peft(config, peft)
    if peft:
        PEFTS.load(peft.method).attach(model, peft, generator_for(f"peft-{peft.method}", seed))
        model.config = result_config(config, peft)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, peft))
    return Tuning(model, peft, config)
