"""How one layer is quantized: a frozen record that layers, conversion and files share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from foldbit.core import low_rank, schemes

WeightGranularity = Literal["tensor", "channel", "group", "input", "rank"]
ActivationScales = Literal["dynamic", "static"]
ActivationGranularity = Literal["sample", "tensor"]

_LARGEST_CLAMP = 65504  # whatever the dtype of the activations, they can be clipped to it


@dataclass(frozen=True)
class QuantConfig:
    """How a layer quantizes its weight and its input.

    Attributes:
        weight: scheme of the weight; ``fp`` leaves it float.
        activation: scheme of the layer's input, a foldable one; ``fp`` leaves it float.
        granularity: which weights share scales: the whole ``tensor``, an output ``channel``, a ``group`` of
            ``group_size`` consecutive input channels of an output channel, or an ``input`` channel; or
            none, and the scales form a matrix of that ``rank`` (:mod:`foldbit.core.low_rank`). ``input``
            and ``rank`` cannot be packed.
        group_size: input channels a group, only with ``granularity="group"``; it must divide the input
            channels that an output channel sees.
        rank: of the scales of the weight as a matrix ``[out, in·taps]``, only with ``granularity="rank"``.
        activation_scales: ``dynamic`` scales are solved for each input as it comes, as in the paper's
            code; ``static`` ones are running statistics of training, fixed in evaluation, which is
            faster and what deployment wants.
        activation_granularity: whether dynamic scales are solved for each ``sample`` or for the whole
            ``tensor``. Static scales always belong to the tensor.
        clamp: clip the input to [−clamp, clamp] before it is quantized; None does not.
        activation_estimator: the gradient that activations get (:mod:`foldbit.nn.estimators`).
        weight_estimator: the gradient that weights get.

    Example:
        >>> QuantConfig(weight="ls-1", activation="ls-2").name
        'W1A2'
    """

    weight: str = "ls-1"
    activation: str = "ls-2"
    granularity: WeightGranularity = "channel"
    group_size: int | None = None
    rank: int | None = None
    activation_scales: ActivationScales = "dynamic"
    activation_granularity: ActivationGranularity = "sample"
    clamp: float | None = None
    activation_estimator: str = "polynomial"
    weight_estimator: str = "identity"

    def __post_init__(self) -> None:
        for field in ("weight", "activation", "weight_estimator", "activation_estimator"):
            if not isinstance(getattr(self, field), str):
                raise TypeError(f"{field} is a name; got {getattr(self, field)!r}")
        schemes.parse(self.weight)
        if not schemes.parse(self.activation).foldable:
            raise ValueError(
                f"activation scheme {self.activation!r} is not foldable: its planes are those of the nearest "
                "level, and kernels peel planes off activations as they come; use it for weights, and for "
                "activations a foldable scheme, such as ls-2, lsf-3 or gf-3"
            )
        _check_choice("granularity", self.granularity, get_args(WeightGranularity))
        _check_choice("activation_scales", self.activation_scales, get_args(ActivationScales))
        _check_choice("activation_granularity", self.activation_granularity, get_args(ActivationGranularity))
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError(
                f"group_size goes with granularity='group' and only with it; "
                f"got granularity={self.granularity!r}, group_size={self.group_size!r}"
            )
        if self.group_size is not None and (type(self.group_size) is not int or self.group_size < 1):
            raise ValueError(f"group_size is a number of input channels, at least 1; got {self.group_size!r}")
        if (self.granularity == "rank") != (self.rank is not None):
            raise ValueError(
                f"rank goes with granularity='rank' and only with it; "
                f"got granularity={self.granularity!r}, rank={self.rank!r}"
            )
        if self.rank is not None:
            if type(self.rank) is not int or self.rank < 1:
                raise ValueError(f"rank is a whole number, at least 1; got {self.rank!r}")
            if not schemes.parse(self.weight).is_float:
                low_rank.check_scheme(schemes.parse(self.weight))
        if self.clamp is not None and not (
            isinstance(self.clamp, int | float)
            and not isinstance(self.clamp, bool)
            and 0 < self.clamp <= _LARGEST_CLAMP
        ):
            raise ValueError(
                f"clamp is a positive, finite number or None; got {self.clamp!r} "
                f"(at most {_LARGEST_CLAMP}, the largest float16)"
            )

    @property
    def name(self) -> str:
        """Bits of weight and activation, as in W1A2; ternary is WT or AT, float is 32."""
        return f"W{_bits(self.weight)}A{_bits(self.activation)}"

    @property
    def why_not_packed(self) -> str | None:
        """Why a layer so quantized cannot be packed, and what to do instead; None where it can."""
        if self.granularity not in ("input", "rank"):
            return None
        return (
            f"with granularity {self.granularity!r} a weight's scale varies along the sum of a dot product, "
            "which bitwise kernels count and cannot weigh; train with 'channel', 'tensor', or 'group', whose "
            "scales vary by runs of input channels"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; the inverse of :meth:`from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> QuantConfig:
        """The config of plain values.

        Raises:
            ValueError: for a field that is unknown or out of range.
            TypeError: for a value of another type.
        """
        unknown = set(fields) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown fields of a QuantConfig: {', '.join(sorted(map(str, unknown)))}")
        return cls(**fields)


def _bits(scheme: str) -> str:
    if scheme == "ls-T":
        return "T"
    return str(schemes.parse(scheme).planes or 32)


def _check_choice(field: str, given: object, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise ValueError(f"{field} is one of {', '.join(map(repr, allowed))}; got {given!r}")
