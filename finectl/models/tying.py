"""How the layers of a condensed model share their parameters: the forms, their sizes and counts (no torch import).

Each form is named as the `condense --method` that trains it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from finectl.errors import InputError, UsageError
from finectl.registry import nearest

LAYER_TYPES: dict[str, str] = {
    "qkv": "attn.qkv",
    "o": "attn.proj",
    "in": "mlp.fc1",
    "out": "mlp.fc2",
    "adaln": "adaLN_modulation.1",
}
"""Type of a block's linear layer -> its module path inside the block."""


@dataclass(frozen=True)
class FactorConfig:
    """FINE: W = U diag(sigma) V^T, with U and V shared by all layers of a type.

    Args:
        types: Names from `LAYER_TYPES`.
        rank: Columns of U and V, at least 1; above min(m1, m2) the factors are over-complete.
        sigma_sharing: Consecutive entries of the diagonal that share one trained value, at least 1.

    Reference: arXiv 2409.19289, eq. 3.
    """

    types: tuple[str, ...]
    rank: int
    sigma_sharing: int = 1
    method: ClassVar[str] = "fine"

    def __post_init__(self) -> None:
        _require_types(self.types)
        require_positive("rank", self.rank)
        require_positive("sigma_sharing", self.sigma_sharing)

    @property
    def sigma_count(self) -> int:
        """Trained entries of one layer's diagonal: ceil(rank / sigma_sharing)."""
        return -(-self.rank // self.sigma_sharing)

    def shared_count(self, kind: str, rows: int, columns: int) -> int:
        """Count what all layers of a type share, U and V, for a weight (m1, m2)."""
        return self.rank * (rows + columns)

    def own_count(self, kind: str, rows: int, columns: int) -> int:
        """Count what one layer has of its own, sigma and bias."""
        return rows + self.sigma_count


@dataclass(frozen=True)
class LineConfig:
    """TLEG: theta_l = theta_B + (l / L) theta_A for weights and biases of all types; Share Init without theta_A.

    Args:
        slope: Whether there is a theta_A; without it all layers are one.

    Reference: arXiv 2312.05614, the linear expansion.
    """

    slope: bool
    types: ClassVar[tuple[str, ...]] = tuple(LAYER_TYPES)

    @property
    def method(self) -> str:
        """The `condense --method` of this form."""
        return "tleg" if self.slope else "share"

    def shared_count(self, kind: str, rows: int, columns: int) -> int:
        """Count what all layers of a type share, for a weight (m1, m2)."""
        return (2 if self.slope else 1) * (rows * columns + rows)

    def own_count(self, kind: str, rows: int, columns: int) -> int:
        """Count what one layer has of its own: nothing."""
        return 0


@dataclass(frozen=True)
class TemplateConfig:
    """WAVE: W = sum_t S_t (x) T_t, Kronecker products of a layer's own scalers with templates that all layers share.

    Args:
        types: Names from `LAYER_TYPES`.
        size: Side w of the square templates; it divides the width.
        counts: The number of templates of each of those types, N.

    Reference: Feng et al., WAVE: Weight Templates for Adaptive Initialization of Variable-sized Models, arXiv
    2406.17503.
    """

    types: tuple[str, ...]
    size: int
    counts: tuple[int, ...]
    method: ClassVar[str] = "wave"

    def __post_init__(self) -> None:
        _require_types(self.types)
        require_positive("size", self.size)
        if len(self.counts) != len(self.types):
            raise UsageError(f"there are {len(self.counts)} numbers of templates for {len(self.types)} types")
        for count in self.counts:
            require_positive("number of templates", count)

    @classmethod
    def of_rank(
        cls, types: tuple[str, ...], size: int, rank: int, shapes: Mapping[str, tuple[int, int]]
    ) -> TemplateConfig:
        """Return templates that hold about as much as FINE's factors of a rank: rank (m1 + m2) / w^2 of a type.

        Args:
            types: The types.
            size: Side of the templates.
            rank: Of FINE.
            shapes: (m1, m2) of each type's weights.
        """
        require_positive("rank", rank)
        require_positive("size", size)
        _require_types(types)
        return cls(types, size, tuple(max(1, round(rank * sum(shapes[kind]) / size**2)) for kind in types))

    def scalers(self, kind: str, rows: int, columns: int) -> tuple[int, int, int]:
        """Return the shape of one layer's scalers: (N, m1 / w, m2 / w).

        Raises:
            UsageError: the templates do not tile a weight (m1, m2).
        """
        if rows % self.size or columns % self.size:
            raise UsageError(
                f"templates of {self.size}x{self.size} do not tile a weight of {rows}x{columns}",
                expected="a side that divides the width",
            )
        return self.counts[self.types.index(kind)], rows // self.size, columns // self.size

    def shared_count(self, kind: str, rows: int, columns: int) -> int:
        """Count what all layers of a type share, the templates, for a weight (m1, m2)."""
        count, _, _ = self.scalers(kind, rows, columns)
        return count * self.size**2

    def own_count(self, kind: str, rows: int, columns: int) -> int:
        """Count what one layer has of its own, scalers and bias."""
        count, high, wide = self.scalers(kind, rows, columns)
        return rows + count * high * wide


Tying = FactorConfig | LineConfig | TemplateConfig
OWN = ("sigma", "scalers")
"""Names of what a layer has of its own, beside its bias."""
METHODS = ("fine", "share", "tleg", "wave")
"""What `condense --method` knows, the usual one first."""


def tying_to_dict(tying: Tying) -> dict[str, Any]:
    """Return plain JSON values; FINE's form, the first there was, bears no name."""
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(tying).items()}
    return values if isinstance(tying, FactorConfig) else {"method": tying.method, **values}


def tying_from_dict(
    values: Any, checked: Callable[[type[Any], dict[str, Any], tuple[str, ...]], dict[str, Any]]
) -> Tying:
    """Read what `tying_to_dict` returned.

    Args:
        values: The `factorized` field of a configuration.
        checked: Checks names and types of a dataclass's fields, but for those that are skipped.

    Raises:
        InputError: it is no such value, or of an unknown form.
        UsageError: a value is out of range.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"field 'factorized' is {values!r}", expected="an object, or null")
    rest = dict(values)
    method = rest.pop("method", FactorConfig.method)
    if method not in METHODS:
        raise InputError(f"field 'factorized.method' is {method!r}", expected=f"one of: {', '.join(METHODS)}")
    if method in ("share", "tleg"):
        return LineConfig(**checked(LineConfig, rest, ()))
    types = rest.pop("types", None)
    if not isinstance(types, list | tuple) or not all(isinstance(kind, str) for kind in types):
        raise InputError(f"field 'factorized.types' is {types!r}", expected="a list of layer types")
    if method == "fine":
        return FactorConfig(types=tuple(types), **checked(FactorConfig, rest, ("types",)))
    counts = rest.pop("counts", None)
    if not isinstance(counts, list | tuple) or not all(type(count) is int for count in counts):
        raise InputError(f"field 'factorized.counts' is {counts!r}", expected="a list of numbers of templates")
    fields = checked(TemplateConfig, rest, ("types", "counts"))
    return TemplateConfig(types=tuple(types), counts=tuple(counts), **fields)


def require_positive(name: str, value: int) -> None:
    """Check a number of something.

    Raises:
        UsageError: it is below 1.
    """
    if value < 1:
        raise UsageError(f"{name} {value} is too small", expected="at least 1")


def _require_types(types: tuple[str, ...]) -> None:
    for name in types:
        if name not in LAYER_TYPES:
            raise UsageError(
                f"unknown layer type {name!r}{nearest(name, LAYER_TYPES)}",
                expected=f"one of: {', '.join(LAYER_TYPES)}",
            )
    if not types or len(set(types)) != len(types):
        raise UsageError(f"the factorised types {list(types)} are empty or name one twice")
