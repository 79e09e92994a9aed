"""What a merge computes: the method, the weights of the models, and what the methods that drop entries need.

Nothing here imports numpy, so that a command line can be parsed and checked against it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from finectl.errors import UsageError

# Name to whether the method needs the model that the others were fine-tuned from.
METHODS = {"task-arithmetic": True, "linear": False, "ties": True, "dare": True}
# What a user calls a type of floating-point numbers, and what a safetensors header calls it.
FLOATS = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class MergePlan:
    """How models theta_1 ... theta_n that were fine-tuned from theta_0 become one; tau_i = theta_i - theta_0.

    - `task-arithmetic`: theta_0 + sum_i w_i tau_i.
    - `linear`: sum_i w_i theta_i / sum_i w_i; theta_0 plays no part.
    - `ties`: of each tensor of each tau_i only the `density` largest in magnitude are kept (entries as large as the
      last of them too); each entry gets the sign of sum_i w_i tau_i; theta_0 + `scale` * the mean, weighted by |w_i|,
      of the kept w_i / |w_i| * tau_i that have that sign. Where the sum is 0, theta_0 stays.
    - `dare`: theta_0 + sum_i w_i m_i tau_i / `density`, where each entry of m_i is 1 with probability `density` and
      else 0, as a function of `seed`, the tensor's name, i and the entry's place alone.

    Args:
        weights: w_i, finite, one a model.
        method: A name of `METHODS`.
        density: Share of the entries that `ties` and `dare` keep, in (0, 1].
        scale: What `ties` multiplies the merged task vector by; its mean does not depend on the size of the weights.
        seed: Of the masks of `dare`.
        tensor_weights: Tensors with weights of their own, by name.

    Raises:
        UsageError: a value is out of its range, or there are not as many weights in one place as in another.

    Reference:
        Ilharco et al., "Editing Models with Task Arithmetic", arXiv 2212.04089; Yadav et al., "TIES-Merging", arXiv
        2306.01708, section 4; Yu et al., "Language Models are Super Mario", arXiv 2311.03099, section 3.2.
    """

    weights: tuple[float, ...]
    method: str = "task-arithmetic"
    density: float = 1.0
    scale: float = 1.0
    seed: int = 0
    tensor_weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"there is no merge method {self.method!r}", expected="one of " + ", ".join(METHODS))
        if not self.weights:
            raise UsageError("there is no model to merge", expected="one weight for each model")
        if not 0 < self.density <= 1:
            raise UsageError(f"the density is {self.density:g}", expected="a share in (0, 1]")
        if not math.isfinite(self.scale):
            raise UsageError(f"the scale is {self.scale}", expected="a finite number")
        self._check("the model", self.weights)
        for name, weights in self.tensor_weights.items():
            self._check(f"the tensor {name}", weights)

    def _check(self, what: str, weights: Sequence[float]) -> None:
        listed = ", ".join(f"{weight:g}" for weight in weights)
        if len(weights) != len(self.weights):
            raise UsageError(f"{what} has {len(weights)} weights ({listed})", expected=f"{len(self.weights)} of them")
        if not all(math.isfinite(weight) for weight in weights):
            raise UsageError(f"the weights of {what} are {listed}", expected="finite numbers")
        if self.method == "linear" and math.fsum(weights) == 0:
            raise UsageError(
                f"the weights of {what} are {listed}, which sum to 0",
                expected="another sum, because a linear merge divides by it",
                fix="merge around a base: --method task-arithmetic",
            )

    @property
    def needs_base(self) -> bool:
        """Whether the method starts from the model that the others were fine-tuned from."""
        return METHODS[self.method]

    def weights_of(self, name: str) -> tuple[float, ...]:
        """Return the weights of the models for one tensor."""
        return self.tensor_weights.get(name, self.weights)

    def check_names(self, names: Collection[str]) -> None:
        """Raise UsageError when a tensor that does not exist has weights of its own."""
        unknown = [name for name in self.tensor_weights if name not in names]
        if unknown:
            raise UsageError(f"weights are given for {unknown[0]}", expected="the name of a tensor of the models")


def float_code(dtype: str) -> str:
    """Return a safetensors header's name of a type of floating-point numbers.

    Raises:
        UsageError: `dtype` is no name of `FLOATS`.
    """
    if dtype not in FLOATS:
        raise UsageError(f"models cannot be written as {dtype!r}", expected="one of " + ", ".join(FLOATS))
    return FLOATS[dtype]
