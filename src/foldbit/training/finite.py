"""Where a training breaks: the layer that first makes NaN or infinity of finite numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


@torch.no_grad()
def culprit(model: nn.Module, x: Tensor) -> str:
    """What is not finite first on the way from the images to the logits, in words.

    The model runs once more on the batch that broke it, in the mode it is in.

    Args:
        model: as it is when the loss is found not to be finite.
        x: the images of that step.
    """
    if not x.isfinite().all():
        return "the images hold NaN or infinity, before any layer"
    broken = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    first: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def look(_module: nn.Module, _inputs: object, output: object) -> None:
            if not first and isinstance(output, Tensor) and not output.isfinite().all():
                first.append(name)

        return look

    layers = {name: m for name, m in model.named_modules() if not any(True for _ in m.children())}
    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        logits = model(x)
    finally:
        for handle in handles:
            handle.remove()
    if broken:
        return (
            f"{len(broken)} of the parameters hold NaN or infinity already, {broken[0]} the first of them: "
            "the gradient of an earlier step was not finite"
        )
    if first:
        return f"layer {first[0].removesuffix('.input_quantizer')} makes NaN or infinity of finite inputs"
    if logits.isfinite().all():
        return "the network's outputs are finite, so that it comes from the loss, or from the teacher"
    return "the network's outputs are not finite, though each layer's are"
