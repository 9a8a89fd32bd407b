"""What stands where other modules stood before they were fused: the same parameters under the same names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foldbit.packed.layers import PackedLayer, affine


class Absorbed(nn.Module):
    """A module whose work a layer next to it does: keeps its parameters and names, passes its input on."""

    def __init__(self, original: nn.Module, layer: PackedLayer | FoldedConv2d) -> None:
        super().__init__()
        self._parameters = original._parameters
        self._buffers = original._buffers
        self._non_persistent_buffers_set = original._non_persistent_buffers_set
        self._version = original._version  # torch reads it from the instance, too
        self._held = (original, layer)  # in a tuple, so that they are no children
        self.training = original.training
        self.register_load_state_dict_post_hook(_lay_out_again)

    @property
    def original(self) -> nn.Module:
        """The module as it was."""
        return self._held[0]

    @property
    def layer(self) -> PackedLayer | FoldedConv2d:
        """The layer that does its work."""
        return self._held[1]

    def forward(self, x: Tensor) -> Tensor:
        """x.

        Raises:
            RuntimeError: in training mode, where a batch norm would have to learn.
        """
        if self.training:
            raise RuntimeError(
                f"this {type(self.original).__name__} is part of the layer next to it, for inference: "
                "call model.eval(), or pack with fuse=False"
            )
        return x

    def _apply(self, fn: Any, recurse: bool = True) -> Absorbed:
        super()._apply(fn, recurse)
        _lay_out_again(self)  # parameters in half precision are other parameters
        return self

    def extra_repr(self) -> str:
        """What it was."""
        return f"{type(self.original).__name__}, part of the layer next to it"


class FoldedConv2d(nn.Conv2d):
    """A float convolution that does the work of the batch norm behind it, in evaluation.

    Its parameters are the convolution's own; the folded ones follow them wherever they are loaded or moved.
    """

    _folded: tuple[Tensor, Tensor]

    def __init__(self, original: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        self.__dict__.update(original.__dict__)  # the same parameters, not copies
        self._held = (original, norm)
        self._load_state_dict_post_hooks = original._load_state_dict_post_hooks.copy()
        self.register_load_state_dict_post_hook(_lay_out_again)
        self.lay_out()

    @property
    def original(self) -> nn.Conv2d:
        """The convolution as it was."""
        return self._held[0]

    @torch.no_grad()
    def lay_out(self) -> None:
        """Fold the batch norm into weight and bias: to be called whenever any of them changes."""
        gain, shift = affine(self._held[1])
        bias = torch.zeros(()) if self.bias is None else self.bias.cpu()
        weight = self.weight * gain[:, None, None, None].to(self.weight.device)
        weight = weight.to(self.weight).contiguous(memory_format=torch.channels_last)
        self._folded = weight, (bias * gain + shift).to(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Convolution and batch norm at once, channels-last: the order that packed layers take fastest."""
        y = self._conv_forward(x.contiguous(memory_format=_order(x)), *self._folded)
        wanted = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if wanted and not torch.compiler.is_compiling():
            return _NoGradientHere.apply(y, *self.parameters())
        return y

    def _apply(self, fn: Any, recurse: bool = True) -> FoldedConv2d:
        super()._apply(fn, recurse)
        _lay_out_again(self)
        return self


class _NoGradientHere(torch.autograd.Function):
    """The identity, where a gradient would end silently: the folded weight is not the parameter."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(
            "this convolution does the work of a batch norm, for inference, and passes no gradient on; take "
            "gradients before foldbit.pack_, or pack with fuse=False"
        )


def _order(x: Tensor) -> torch.memory_format:
    # The float work between the layers (pooling above all) is several times faster in this order, too.
    return torch.channels_last if x.ndim == 4 else torch.contiguous_format


def _lay_out_again(module: nn.Module, _incompatible_keys: Any = None) -> None:
    layer = module.layer if isinstance(module, Absorbed) else module
    assert isinstance(layer, PackedLayer | FoldedConv2d)
    if not any(t.is_meta for t in module.state_dict().values()):
        layer.lay_out()
