"""All that is here needs a CUDA device, and is skipped where there is none."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in Path(item.fspath).parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture
def cuda():
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def whole_floats(monkeypatch):
    """Convolutions in all 24 bits of float32, for the CPU's are."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
