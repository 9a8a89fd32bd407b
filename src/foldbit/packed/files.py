"""Packed files: safetensors with a versioned description, written atomically and read with suspicion.

A file is a safetensors file: the tensors of a model's state dict, in which packed layers hold their planes
and scales (:meth:`LayerSpec.tensors`). Its metadata has one entry, ``foldbit``, a JSON object:

    {"version": 1,
     "architecture": {"name": "resnet8-xnor", "kwargs": {...}} or null,
     "layers": {"stages.0.conv1": {a LayerSpec}, ...}}

Everything in a file is hostile until it is checked: :func:`read` checks what the file says about itself,
:func:`check_tensors` what a model expects of it.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from foldbit.kernels import layout
from foldbit.packed.layers import PackedLayer
from foldbit.packed.spec import LayerSpec

VERSION = 1


class PackedFileError(ValueError):
    """A packed file cannot be used. Its subclasses say why."""


class NotPackedFile(PackedFileError):
    """Not a safetensors file, truncated, or not one that foldbit wrote."""


class UnsupportedVersion(PackedFileError):
    """Written by a version of foldbit whose layout this one does not know."""


class CorruptPackedFile(PackedFileError):
    """The description or a tensor contradicts the layout: wrong type, shape, length or value."""


class MismatchedModel(PackedFileError):
    """The file is sound but belongs to another model."""


@dataclass(frozen=True)
class Architecture:
    """A registered model's name and the arguments that build it."""

    name: str
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Contents:
    """What a packed file holds."""

    architecture: Architecture | None
    layers: dict[str, LayerSpec]
    tensors: dict[str, Tensor]


def serialize(model: nn.Module, architecture: Architecture | None = None) -> bytes:
    """The bytes of a packed model's file: a header, and every tensor of its state dict.

    A layer that stands in several places is written once for each.

    Raises:
        ValueError: where the state dict holds anything but tensors.
    """
    named = model.named_modules(remove_duplicate=False)
    layers = {name: m.spec.to_dict() for name, m in named if isinstance(m, PackedLayer)}
    description = {
        "version": VERSION,
        "architecture": None
        if architecture is None
        else {"name": architecture.name, "kwargs": architecture.kwargs},
        "layers": layers,
    }
    state = model.state_dict()
    other = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise ValueError(f"a packed file holds tensors only; this model's state has {_some(other)} besides")
    # Cloned, for safetensors refuses tensors that share memory, as tied weights do.
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in state.items()}
    return safetensors.torch.save(tensors, {"foldbit": json.dumps(description, separators=(",", ":"))})


def write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all: under a temporary name beside it, then renamed.

    Behind a symbolic link its target is written. A file that there was keeps its permissions.

    Raises:
        FileNotFoundError: where the folder is missing.
        IsADirectoryError: where there is a folder of that name.
        OSError: where it cannot be written otherwise, or is a device or a pipe; it names the file.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode  # which fails for links in a circle
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}; create it first")
    if mode is not None and stat.S_ISDIR(mode):
        raise IsADirectoryError(f"cannot write {path}: it is a folder; name a file in it")
    if mode is not None and not stat.S_ISREG(mode):  # it would be gone, and a file in its place
        raise OSError(f"cannot write {path}: expected a file, got a device, pipe or socket; name a file")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        file = temporary.open("xb")  # with the permissions that the umask leaves
        try:
            with file:
                if mode is not None:
                    temporary.chmod(stat.S_IMODE(mode))
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:  # that of a full disk names no file
        raise OSError(error.errno, error.strerror, str(path)) from error


def read(path: str | os.PathLike[str]) -> Contents:
    """Read a packed file and check everything that can be checked without a model.

    Raises:
        FileNotFoundError: where there is no such file.
        NotPackedFile, UnsupportedVersion, CorruptPackedFile: as they say.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no packed file at {path}{', but a folder' if path.is_dir() else ''}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            description = _parse_description(path, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except safetensors.SafetensorError as error:
        raise NotPackedFile(
            f"{path} is not a readable safetensors file: {error}. It may be truncated, or of another kind"
        ) from error
    layers = _parse_layers(path, description["layers"])
    for name, spec in layers.items():
        _check_layer(path, name, spec, tensors)
    for name, tensor in tensors.items():  # infinity may be meant, as in masks
        if tensor.is_floating_point() and tensor.isnan().any():
            raise CorruptPackedFile(f"{path}: {name} holds NaN")
        if name.rpartition(".")[2] == "running_var" and not (tensor >= 0).all():
            raise CorruptPackedFile(f"{path}: {name} holds a negative variance")
    return Contents(_parse_architecture(path, description["architecture"]), layers, tensors)


def check_tensors(
    path: str | os.PathLike[str], expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], given: Contents
) -> None:
    """Check a file's tensors, names, dtypes and shapes, against those a model expects.

    Raises:
        MismatchedModel: naming what is missing, extra or different.
    """
    missing = sorted(set(expected) - set(given.tensors))
    extra = sorted(set(given.tensors) - set(expected))
    if missing or extra:
        raise MismatchedModel(
            f"{path} does not belong to this model: "
            f"tensors missing from the file: {_some(missing)}; tensors the model lacks: {_some(extra)}"
        )
    for name, (dtype, shape) in expected.items():
        tensor = given.tensors[name]
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            raise MismatchedModel(
                f"{path}: {name} is {_kind(tensor.dtype, tensor.shape)}, "
                f"the model expects {_kind(dtype, shape)}"
            )


def _parse_description(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if "foldbit" not in metadata:
        raise NotPackedFile(
            f"{path} is a safetensors file, but not a packed one: its metadata lacks the entry 'foldbit'"
        )
    try:
        description = json.loads(metadata["foldbit"])
    except (ValueError, RecursionError) as error:
        raise CorruptPackedFile(f"{path}: the description is not JSON: {error}") from error
    if not isinstance(description, dict) or "version" not in description:
        raise CorruptPackedFile(f"{path}: the description is not an object with a version")
    if type(description["version"]) is not int or description["version"] != VERSION:
        raise UnsupportedVersion(
            f"{path} has layout version {str(description['version'])[:40]}; "
            f"this foldbit reads version {VERSION}"
        )
    if set(description) != {"version", "architecture", "layers"}:
        raise CorruptPackedFile(f"{path}: the description has the entries {_some(sorted(description))}")
    return description


def _parse_layers(path: Path, layers: Any) -> dict[str, LayerSpec]:
    if not isinstance(layers, dict):
        raise CorruptPackedFile(f"{path}: layers is a mapping from names to layers")
    parsed = {}
    for name, fields in layers.items():
        try:
            parsed[name] = LayerSpec.from_dict(fields)
        except ValueError as error:
            raise CorruptPackedFile(f"{path}: layer {name[:200]!r}: {error}") from error
    return parsed


def _parse_architecture(path: Path, fields: Any) -> Architecture | None:
    if fields is None:
        return None
    ok = isinstance(fields, dict) and set(fields) == {"name", "kwargs"}
    if not ok or not isinstance(fields["name"], str) or not isinstance(fields["kwargs"], dict):
        raise CorruptPackedFile(f"{path}: architecture is null or an object with a name and kwargs")
    return Architecture(fields["name"], fields["kwargs"])


def _check_layer(path: Path, name: str, spec: LayerSpec, tensors: dict[str, Tensor]) -> None:
    prefix = f"{name}." if name else ""
    for suffix, (dtype, shape) in spec.tensors().items():
        tensor = tensors.get(prefix + suffix)
        if tensor is None:
            raise CorruptPackedFile(f"{path}: the tensor {prefix + suffix!r} is missing")
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            raise CorruptPackedFile(
                f"{path}: {prefix + suffix} is {_kind(tensor.dtype, tensor.shape)}, "
                f"its layer asks for {_kind(dtype, shape)}"
            )
        if dtype == torch.float32 and not tensor.isfinite().all():
            raise CorruptPackedFile(f"{path}: {prefix + suffix} holds NaN or infinity")
        if suffix in ("scales", "activation_scales") and (tensor < 0).any():
            raise CorruptPackedFile(f"{path}: {prefix + suffix} holds a negative scale")
    if not layout.spare_bits_are_zero(tensors[prefix + "planes"].numpy(), spec.channels):
        raise CorruptPackedFile(f"{path}: {prefix}planes has bits set past channel {spec.channels}")


def _kind(dtype: torch.dtype, shape: Any) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _some(names: list[str]) -> str:
    shown = ", ".join(name[:100] for name in names[:5])
    return (shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "none"
