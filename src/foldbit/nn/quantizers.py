"""Weight and activation quantizers: a scheme, a granularity, and static or dynamic scales."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._guards import detect_fake_mode

from foldbit.core import axes, encoding, folding, low_rank, schemes, solvers
from foldbit.core.config import QuantConfig
from foldbit.nn import estimators


class WeightQuantizer:
    """Quantizes weights ``[out, in, *kernel]``, afresh at every call, so that scales are never stale.

    Args:
        config: its weight fields say how.
        channels: input channels that an output channel sees.
        groups: of the convolution: each has input channels of its own.

    Raises:
        ValueError: where the group size does not divide the channels, the estimator is unknown, or it peels
            and the scheme is not foldable.
    """

    def __init__(self, config: QuantConfig, channels: int, groups: int = 1) -> None:
        self.config = config
        self.groups = groups
        self.scheme = schemes.parse(config.weight)
        self.estimator = estimators.get(config.weight_estimator)
        if config.weight_estimator == "polynomial" and not self.scheme.foldable:
            raise ValueError(
                f"weight_estimator 'polynomial' follows the residuals that peeling leaves, and scheme "
                f"{str(self.scheme)!r} is not foldable: its planes are not peeled; use 'identity', 'clipped' "
                "or 'scaled', or a foldable scheme, such as lsf-3"
            )
        self.segments = 1
        if config.group_size is not None:
            if channels % config.group_size:
                raise ValueError(
                    f"group_size {config.group_size} does not divide the {channels} input channels that an "
                    "output channel sees; pick a divisor or another granularity"
                )
            self.segments = channels // config.group_size

    def check_fits(self, weight: Tensor) -> None:
        """Refuse a weight whose matrix cannot have scales of the config's rank.

        Raises:
            ValueError: for it.
        """
        if self.config.rank is not None and not self.scheme.is_float:
            low_rank.check_fits(self.config.rank, len(weight), math.prod(weight.shape[1:]))

    def __call__(self, weight: Tensor) -> Tensor:
        """The weight's approximation, differentiable through the estimator."""
        if self.scheme.is_float:
            return weight
        if self.config.rank is not None:
            matrix = weight.flatten(1)
            scales = low_rank.foldable_scales(matrix, self.scheme, self.config.rank)
            return estimators.straight_through(matrix, scales, self.estimator).reshape(weight.shape)
        segmented, dims = self._segmented(weight)
        scales = solvers.solve(segmented, self.scheme, dims)
        if not self.scheme.foldable:
            spread = axes.spread(scales, segmented.shape, dims)
            nearest = estimators.straight_through(segmented, spread, self.estimator, values=encoding.nearest)
            return nearest.reshape(weight.shape)
        estimator = self.config.weight_estimator
        return estimators.approximate(segmented, scales, dims, estimator).reshape(weight.shape)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What packing keeps: planes ``[k, out, in, *kernel]``, scales ``[k, out, segments]``.

        Raises:
            ValueError: where the granularity cannot be packed.
        """
        if self.config.why_not_packed is not None:
            raise ValueError(self.config.why_not_packed)
        segmented, dims = self._segmented(weight)
        quantized = folding.quantize(segmented, self.scheme, dims)
        scales = quantized.scales.movedim(-1, 0).reshape(self.scheme.planes, -1, self.segments)
        return quantized.planes.reshape(-1, *weight.shape), scales.expand(-1, len(weight), -1)

    def _segmented(self, weight: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The weight as ``[out, segments, in/segments, *kernel]``, and the dims that share scales.

        One scale an input channel: ``[groups, out/groups, in, *kernel]``.
        """
        if self.config.granularity == "input":
            grouped = weight.unflatten(0, (self.groups, -1))
            return grouped, (1, *range(3, grouped.ndim))
        segmented = weight.unflatten(1, (self.segments, -1))
        first = 0 if self.config.granularity == "tensor" else 2
        return segmented, tuple(range(first, segmented.ndim))


class ActivationQuantizer(nn.Module):
    """Quantizes a layer's input.

    Dynamic scales are solved for every input: one set a sample (dim 0) or one a tensor. Static scales are
    running statistics: training uses the batch's own scales and averages them into ``running_scales``;
    evaluation uses the average, or the input's own scales as long as nothing has been seen yet. Scales that
    somebody else wrote into ``running_scales``, as averages of models do, count as seen.

    Args:
        config: its activation fields say how.
        momentum: the weight of the newest batch in the running scales.
        device: where the running scales live.
    """

    running_scales: Tensor
    _seen = False

    def __init__(
        self, config: QuantConfig, momentum: float = 0.1, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.scheme = schemes.parse(config.activation)
        self.clamp = config.clamp
        self.per_sample = config.activation_granularity == "sample" and config.activation_scales == "dynamic"
        self.static = config.activation_scales == "static" and not self.scheme.is_float
        self.momentum = momentum
        estimators.get(config.activation_estimator)  # refuses unknown ones now
        self.estimator = config.activation_estimator
        if self.static:
            self.register_buffer("running_scales", torch.zeros(self.scheme.planes, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """The input's approximation ``[N, ...]``, differentiable through clamp and estimator."""
        if self.scheme.is_float or x.numel() == 0:
            return x
        scales, dims = self._scales(x)
        return estimators.approximate(x, scales, dims, self.estimator, self.clamp)

    @property
    def seen(self) -> bool:
        """Whether there are running scales. Their values are looked at until there are."""
        return self._seen or self._holds_scales()

    def train(self, mode: bool = True) -> ActivationQuantizer:
        """As in torch.nn; scales that were written into the running ones are remembered as seen."""
        self._seen = self.seen  # compiled code cannot look
        return super().train(mode)

    def extra_repr(self) -> str:
        """The scheme and where its scales come from."""
        if self.scheme.is_float:
            return "fp"
        source = "static" if self.static else f"dynamic per {'sample' if self.per_sample else 'tensor'}"
        return f"{self.scheme}, {source}, clamp={self.clamp}"

    def solve(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The input's own scales ``[..., k]``, and the dims that share them; nothing is remembered."""
        dims = axes.normalize(x.ndim, range(1, x.ndim) if self.per_sample else None)
        return solvers.solve(x, self.scheme, dims, clamp=self.clamp), dims

    def _scales(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Scales for x, and the dims that share them."""
        if self.static and not self.training and self.seen:
            return self.running_scales.to(x.dtype), axes.normalize(x.ndim, None)
        scales, dims = self.solve(x)
        if self.static and self.training:
            self._remember(scales)
        return scales, dims

    def _holds_scales(self) -> bool:
        if not self.static or torch.compiler.is_compiling():
            return False
        scales = self.running_scales
        no_values = scales.is_meta or is_functorch_wrapped_tensor(scales) or detect_fake_mode(scales)
        return not no_values and bool(scales.any())

    @torch.no_grad()
    def set_scales(self, scales: Tensor) -> None:
        """Make these the running scales ``[k]``."""
        self.running_scales.copy_(scales)
        self._seen = True

    @torch.no_grad()
    def _remember(self, scales: Tensor) -> None:
        # Not `seen`, which may wait for the device.
        self.running_scales.lerp_(scales.to(self.running_scales.dtype), self.momentum if self._seen else 1.0)
        self._seen = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A float checkpoint knows no running scales, and loading it strictly must work: none are seen then.
        key = prefix + "running_scales"
        if self.static and key not in state_dict:
            device = "cpu" if self.running_scales.is_meta else self.running_scales.device
            state_dict[key] = torch.zeros(self.scheme.planes, device=device)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._seen = self._holds_scales()
