"""Trained weights from elsewhere: networks of torchvision and timm, and files with a state dict.

The weights of torchvision's (and timm's) ResNets have other names than ours, and are otherwise the same:
regular blocks with them compute what theirs compute. Libraries are imported when a name asks for them.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from foldbit.models.resnet import ResNet
from foldbit.nn.quantizers import ActivationQuantizer

LIBRARIES = ("torchvision", "timm")
ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


class PretrainedError(ValueError):
    """Weights cannot be had, or are of another network."""


class MissingLibrary(PretrainedError):
    """They come from a library that is not installed. The message says how to get it."""


def is_source(text: str | os.PathLike[str]) -> bool:
    """Whether a text names what :func:`weights_of` takes: ``torchvision/NAME``, ``timm/NAME`` or a file.

    A file is known by its ending alone. Anything else may be a run folder (:mod:`foldbit.training.runs`).
    """
    library, slash, name = os.fspath(text).partition("/")
    return bool(slash and name and library in LIBRARIES) or Path(text).suffix.lower() in ENDINGS


def load_weights(
    model: nn.Module, source: str | os.PathLike[str], *, allow: Sequence[str] = ()
) -> tuple[str, ...]:
    """Give a model trained weights, as far as they fit; else it is unchanged.

    Args:
        model: float or quantized; changed in place.
        source: as :func:`weights_of` takes it.
        allow: as :func:`adapt` does.

    Returns:
        The names of the model's tensors that stay as they were: those of a classifier for another number of
        classes, and those allowed.

    Raises:
        PretrainedError: as :func:`weights_of` and :func:`adapt` do.
    """
    weights = weights_of(source)
    try:
        fitting, kept = _fit(weights, model, allow)
    except PretrainedError as error:
        raise PretrainedError(f"{os.fspath(source)}: {error}") from error
    model.load_state_dict(fitting)
    return kept


def weights_of(source: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The trained weights that a name or a file stands for, under the names they have there, on the CPU.

    Args:
        source: ``torchvision/NAME`` or ``timm/NAME``, whose weights the library downloads at first use; or a
            file with a state dict, .safetensors or PyTorch's, which is read without running code in it. One
            below ``state_dict`` or ``model``, as training scripts save it, is found.

    Raises:
        PretrainedError: where the library is missing, or does not know the name or get the weights; or the
            file is missing, broken or holds anything else.
    """
    if not is_source(source):
        raise PretrainedError(
            f"weights come from torchvision/NAME, timm/NAME or a file ({', '.join(ENDINGS)}); "
            f"got {os.fspath(source)!r}"
        )
    library, _, name = os.fspath(source).partition("/")
    if library in LIBRARIES:
        return dict(network(library, name).state_dict())
    path = Path(source).expanduser()
    if not path.is_file():
        raise PretrainedError(f"there is no file {path} to take weights from")
    return _safetensors(path) if path.suffix.lower() == ".safetensors" else _checkpoint(path)


def network(library: str, name: str) -> nn.Module:
    """A network of torchvision or timm with its trained weights, in evaluation mode.

    Raises:
        MissingLibrary: where the library is.
        PretrainedError: where it does not know the name, or cannot get the weights.
    """
    try:
        module = import_module("torchvision.models" if library == "torchvision" else library)
    except ImportError as error:
        raise MissingLibrary(
            f"{library}/{name} takes {library}, which cannot be imported ({error}): "
            "pip install 'foldbit[vision]'"
        ) from error
    try:
        if library == "timm":
            found: nn.Module = module.create_model(name, pretrained=True)
        else:
            found = module.get_model(name, weights="DEFAULT")
    except Exception as error:  # unknown names and failed downloads, of every kind
        raise PretrainedError(
            f"{library} gives no trained network {name!r}: {_first_line(error)}. Its list_models() has the "
            "names, and weights are downloaded at first use; a file with the weights does, too"
        ) from error
    return found.eval()


def adapt(weights: Mapping[str, Tensor], model: nn.Module, *, allow: Sequence[str] = ()) -> dict[str, Tensor]:
    """Weights under the model's names: what ``model.load_state_dict`` takes.

    Names are mapped for our ResNets; a prefix ``module.``, which data-parallel training leaves, is dropped.

    A classifier for another number of classes (the module that the model's attribute ``head`` names) keeps
    the values that it has: that is what one starts from on images of one's own. Every other tensor must be
    there, in its shape, and nothing more. Static scales, which float networks lack, are not asked for.

    Args:
        weights: a state dict, of our names or torchvision's.
        model: float or quantized; it is not changed.
        allow: shell-style patterns of names, the model's, that may be missing, be left over or have another
            shape; the model's tensors keep their values then.

    Raises:
        PretrainedError: for all other differences, which it names.
    """
    return _fit(weights, model, allow)[0]


def from_torchvision(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a torchvision ResNet, or of timm's like it, under the names of ours."""
    return {_our_name(name): tensor for name, tensor in weights.items()}


_NAMES = (
    (re.compile(r"conv1\."), lambda match: "stem.0."),
    (re.compile(r"bn1\."), lambda match: "stem.1."),
    (re.compile(r"layer(\d+)\.(\d+)\.downsample\."), lambda m: f"stages.{int(m[1]) - 1}.{m[2]}.shortcut."),
    (re.compile(r"layer(\d+)\."), lambda match: f"stages.{int(match[1]) - 1}."),
    (re.compile(r"fc\."), lambda match: "classifier."),
)


def _our_name(name: str) -> str:
    for pattern, ours in _NAMES:
        if match := pattern.match(name):
            return ours(match) + name[match.end() :]
    return name


def _fit(
    weights: Mapping[str, Tensor], model: nn.Module, allow: Sequence[str]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state dict to load, and the names in it that keep the model's own values."""
    given, renamed = _in_names_of(model, weights)
    head = f"{getattr(model, 'head', '')}."
    optional = _optional(model)
    fitting: dict[str, Tensor] = {}
    kept: list[str] = []
    wrong: list[str] = []
    for name, own in model.state_dict().items():
        trained = given.pop(name, None)
        reason = f"{name} is missing" if trained is None else _difference(name, trained, own)
        if trained is not None and reason is None:
            fitting[name] = trained
            continue
        fitting[name] = own
        if trained is None and name in optional:
            continue
        of_head = trained is not None and name.startswith(head) and trained.shape[1:] == own.shape[1:]
        if of_head or any(fnmatchcase(name, pattern) for pattern in allow):
            kept.append(name)
        else:
            wrong.append(str(reason))
    wrong += [f"{name} is not the model's" for name in given if not any(fnmatchcase(name, p) for p in allow)]
    if wrong:
        more = f", and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        hint = (
            ". A ResNet of XNOR blocks normalises elsewhere and takes no weights of regular ones"
            if renamed and getattr(model, "block", "") == "xnor"
            else ""
        )
        raise PretrainedError(f"these weights are of another network: {', '.join(wrong[:4])}{more}{hint}")
    return fitting, tuple(kept)


def _in_names_of(model: nn.Module, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Weights under the model's names, and whether they were torchvision's."""
    given = dict(weights)
    if given and all(name.startswith("module.") for name in given):
        given = {name.removeprefix("module."): tensor for name, tensor in given.items()}
    if isinstance(model, ResNet) and any(name.startswith("layer1.") for name in given):
        return from_torchvision(given), True
    return given, False


def _optional(model: nn.Module) -> set[str]:
    """Names in the state dict that a float checkpoint, or an old one, may lack."""
    quantizers = [
        name for name, m in model.named_modules() if isinstance(m, ActivationQuantizer) and m.static
    ]
    counters = {name for name in model.state_dict() if name.endswith(".num_batches_tracked")}
    return counters | {f"{name}.running_scales" for name in quantizers}


def _difference(name: str, given: Tensor, own: Tensor) -> str | None:
    if given.shape != own.shape:
        return f"{name} is {list(given.shape)}, in the model {list(own.shape)}"
    if given.is_floating_point() != own.is_floating_point():
        return f"{name} is {given.dtype}, in the model {own.dtype}"
    return None


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            if "foldbit" in (file.metadata() or {}):
                raise PretrainedError(
                    f"{path} is a packed file, whose weights are bits; start from the run that it is of"
                )
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise PretrainedError(f"{path} is not a readable safetensors file: {_first_line(error)}") from error


def _checkpoint(path: Path) -> dict[str, Tensor]:
    try:
        held: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise PretrainedError(
            f"{path} is not a state dict of tensors and plain values, and loading anything else could run "
            f"code that it holds ({_first_line(error)}); save model.state_dict() instead"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PretrainedError(f"{path} is not a readable PyTorch checkpoint: {_first_line(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    if not isinstance(held, Mapping) or not held:
        raise PretrainedError(
            f"{path} holds no state dict but a {type(held).__name__}; save model.state_dict()"
        )
    other = [
        name for name, value in held.items() if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if other:
        raise PretrainedError(
            f"{path} holds {other[0]!r}, which is no tensor, beside {len(held) - len(other)} tensors; save "
            "model.state_dict() alone, or below 'state_dict'"
        )
    return dict(held)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
