"""The resume state of a GAN's training: one safetensors file, replaced atomically."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from finectl.artifacts.tensors import load_tensors, read_metadata, save_tensors
from finectl.errors import InputError
from finectl.training.step import Ema

NAME = "gan.safetensors"
GENERATOR, DISCRIMINATOR, AVERAGE, OPTIMISER, KEPT = "generator", "discriminator", "ema", "optimizer", "kept"


@dataclass
class Position:
    """Where a run is.

    Args:
        step: Updates of the generator done.
        wall_s: Seconds of work so far, over all runs.
        sums: Sums of the losses since the last log entry, by name.
        counts: Batches in them.
    """

    step: int = 0
    wall_s: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


@dataclass
class Players:
    """What is trained.

    Args:
        generator: Parameters that need no gradient stay as they are and are not saved.
        discriminator: All of it is trained.
        generator_optimizer: Of the generator's trained parameters.
        discriminator_optimizer: Of the discriminator's.
        ema: Moving average of the generator's trained parameters, if any.
        kept: Update -> the generator's trained parameters after it.
    """

    generator: nn.Module
    discriminator: nn.Module
    generator_optimizer: torch.optim.Optimizer
    discriminator_optimizer: torch.optim.Optimizer
    ema: Ema | None = None
    kept: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def trained(self) -> dict[str, Tensor]:
        """Return what a run changes: trained parameters and buffers of both, by name."""
        found: dict[str, Tensor] = {}
        for prefix, model in ((GENERATOR, self.generator), (DISCRIMINATOR, self.discriminator)):
            fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
            state = model.state_dict()  # buffers, too
            found.update({f"{prefix}/{name}": value for name, value in state.items() if name not in fixed})
        return found

    def _optimisers(self) -> list[tuple[str, nn.Module, torch.optim.Optimizer]]:
        return [
            (GENERATOR, self.generator, self.generator_optimizer),
            (DISCRIMINATOR, self.discriminator, self.discriminator_optimizer),
        ]

    def save(self, directory: Path, position: Position) -> None:
        """Write everything that the next step depends on.

        Raises:
            ResourceError: the disk is full; the state saved before is intact.
        """
        tensors = self.trained()
        if self.ema is not None:
            tensors.update({f"{AVERAGE}/{name}": value for name, value in self.ema.state_dict().items()})
        for update, state in self.kept.items():
            tensors.update({f"{KEPT}/{update}/{name}": value for name, value in state.items()})
        for whose, model, optimizer in self._optimisers():
            for name, parameter in model.named_parameters():
                for slot, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"{OPTIMISER}/{whose}/{slot}/{name}"] = value
        save_tensors(directory / NAME, tensors, metadata=asdict(position))

    def load(self, directory: Path) -> Position:
        """Put a saved state back; without one, leave everything as it is and return the start.

        Raises:
            InputError: the state is damaged or belongs to other networks.
        """
        path = directory / NAME
        if not path.exists():
            return Position()
        tensors, position = load_tensors(path), read_metadata(path)
        mine = self.trained()
        found = {n: v.shape for n, v in tensors.items() if n.split("/")[0] in (GENERATOR, DISCRIMINATOR)}
        if found != {name: value.shape for name, value in mine.items()} or not isinstance(position, dict):
            raise InputError(
                f"{path} is not the state of these networks",
                expected=f"{len(mine)} tensors of their shapes",
                fix="drop it: run the same command with --no-resume",
            )
        with torch.no_grad():
            for name, value in mine.items():
                value.copy_(tensors[name])
        parts: dict[str, dict[str, Tensor]] = {AVERAGE: {}, KEPT: {}, OPTIMISER: {}}
        for name, value in tensors.items():
            first, _, rest = name.partition("/")
            if first in parts:
                parts[first][rest] = value
        if self.ema is not None:
            self.ema.load_state_dict(parts[AVERAGE])
        for name, value in parts[KEPT].items():
            update, _, rest = name.partition("/")
            self.kept.setdefault(int(update), {})[rest] = value
        self._load_optimisers(parts[OPTIMISER])
        return Position(**position)

    def _load_optimisers(self, slots: dict[str, Tensor]) -> None:
        for whose, model, optimizer in self._optimisers():
            parameters = dict(model.named_parameters())
            for name, value in slots.items():
                owner, slot, parameter_name = name.split("/", 2)
                if owner == whose:
                    parameter = parameters[parameter_name]
                    # Adam counts its steps on the CPU, unless it is fused.
                    place = (
                        value if slot == "step" and not optimizer.defaults.get("fused") else value.to(parameter.device)
                    )
                    optimizer.state[parameter][slot] = place
