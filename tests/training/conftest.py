"""A small training that all tests of training share."""

import pytest

from foldbit import QuantConfig
from foldbit.training import data, loop
from foldbit.training.recipes import DataConfig, Recipe


@pytest.fixture(scope="session")
def digits():
    return data.digits()


@pytest.fixture(scope="session")
def tiny():
    """22 steps an epoch."""
    return Recipe(
        model_args={"widths": [8, 8, 16]}, data=DataConfig(name="digits"), epochs=2, batch_size=64, lr=1e-2
    )


@pytest.fixture(scope="session")
def quant():
    return QuantConfig("ls-1", "ls-2", activation_scales="static", clamp=3.0)


@pytest.fixture(scope="session")
def float_run(tmp_path_factory, tiny, digits):
    """A run folder, and what training into it gave; not to be changed."""
    run = tmp_path_factory.mktemp("runs") / "float"
    return run, loop.train(tiny, run, images=digits)
