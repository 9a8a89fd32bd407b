"""The house: imports point downwards only, and a bare import stays lean."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import foldbit

ROOT = Path(foldbit.__file__).parent

# From the top to the bottom. A room may import what lies on lower floors, and itself; not its neighbours. A
# new module needs a floor here. `foldbit/__init__.py`, which re-exports, stands above them all.
FLOORS = [
    ["__main__"],
    ["cli"],
    ["demo", "benchmark", "analyze", "compare"],
    ["training", "analysis"],
    ["summary", "calibrate", "timing"],
    ["storage"],
    ["convert", "models"],
    ["packed", "nn"],
    ["core"],
    ["kernels"],
    ["tables", "options"],
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(["foldbit", *(parts[:-1] if parts[-1] == "__init__" else parts)])


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def room_of(module: str) -> str:
    """The part of the package that a module belongs to; the package itself has none."""
    return module.split(".")[1] if "." in module else ""


def imports(source: str) -> set[str]:
    """Modules that a source imports, wherever in it: at its top, in functions, or only to check types."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in MODULES else str(node.module))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            found.add(ast.literal_eval(node.args[0]))
    return found


def test_every_module_has_exactly_one_floor():
    rooms = [room for floor in FLOORS for room in floor]
    assert len(rooms) == len(set(rooms))
    assert {room_of(module) for module in MODULES} - {""} == set(rooms)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_downwards(module):
    own = room_of(module)
    if not own:
        return
    for imported in imports(MODULES[module].read_text()):
        if imported.split(".")[0] != "foldbit" or imported == "foldbit._native":
            continue
        room = room_of(imported)
        assert room, f"{module} imports from the package itself: name the module that holds it"
        assert room == own or FLOOR_OF[room] > FLOOR_OF[own], (
            f"{module} imports {imported}, which is not below"
        )


def test_the_arrows_see_every_way_to_import():
    source = """
import torch.nn as nn
from foldbit import convert
from foldbit.packed import files
from foldbit.core.config import QuantConfig
def later():
    import foldbit.training.loop
    importlib.import_module("foldbit._native")
"""
    assert imports(source) == {
        *["torch.nn", "foldbit.convert", "foldbit.packed.files", "foldbit.core.config"],
        *["foldbit.training.loop", "foldbit._native"],
    }
    with pytest.raises(AssertionError, match="imports are absolute"):
        imports("from .core import axes")


def test_kernels_know_numpy_and_nothing_else():
    for module in MODULES:
        if room_of(module) == "kernels":
            outside = {name.split(".")[0] for name in imports(MODULES[module].read_text())}
            assert outside <= {*sys.stdlib_module_names, "numpy", "foldbit"}, module


def test_only_kernels_touch_the_compiled_core():
    users = {room_of(m) for m, path in MODULES.items() if "foldbit._native" in imports(path.read_text())}
    assert users == {"kernels"}


def test_tables_stand_alone():
    assert not {name for name in imports(MODULES["foldbit.tables"].read_text()) if name.startswith("foldbit")}


def test_the_package_re_exports_and_does_nothing_else():
    docstring, *statements = ast.parse(MODULES["foldbit"].read_text()).body
    assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)
    for statement in statements:
        if isinstance(statement, ast.Assign):
            assert ast.unparse(statement.targets[0]) == "__version__"
            assert isinstance(statement.value, ast.Constant)
        else:
            assert isinstance(statement, ast.ImportFrom), ast.unparse(statement)
            assert str(statement.module).split(".")[0] == "foldbit"
            assert all(alias.asname == alias.name for alias in statement.names), ast.unparse(statement)


@pytest.mark.parametrize("module", ["foldbit", "foldbit.cli"])
def test_a_bare_import_is_lean(module):
    """No training, vision or plotting library that the core dependencies do not load by themselves."""
    heavy = {
        *["accelerate", "jsonargparse", "tensorboard", "tqdm", "matplotlib", "torchvision", "timm"],
        *["sklearn", "scipy", "yaml", "pandas", "PIL", "onnxruntime", "openvino"],
    }
    code = f"""
import json, sys
import numpy, safetensors.torch, torch
before = set(sys.modules)
import {module}
print(json.dumps(sorted({{name.split(".")[0] for name in set(sys.modules) - before}})))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(run.stdout))
    assert "foldbit" in loaded and not loaded & heavy
