"""The command line, foldbit train | evaluate | summary | pack | analyze | bench | demo: it only wires."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal


def train(run: str, **recipe: Any) -> None:
    """Train a network into a run folder; the same command goes on after an interruption, for Ctrl-C saves.

    The options below are the fields of a recipe. YAML files with the same fields go to --config or, when they
    come with foldbit, by name to --recipe; what comes later on the line changes what came earlier.
    """
    from foldbit.training import loop
    from foldbit.training.recipes import Recipe

    outcome = loop.train(Recipe(**recipe), run)
    if not outcome.finished:
        sys.exit(130)
    print(f"done: test accuracy {outcome.metrics[-1]['test_accuracy']:.2%}, in {run}")


def evaluate(what: str, data: str | None = None, split: Literal["test", "train"] = "test") -> None:
    """Classify a data set with a trained or packed network, and print the accuracy.

    Args:
        what: a run folder, or a packed file (.safetensors) that knows its architecture.
        data: a folder with Fashion-MNIST's files, where they are not found by themselves.
        split: which images.
    """
    from foldbit.training import data as datasets
    from foldbit.training import loop

    model, recipe = _load(what)
    if recipe is None:
        images = datasets.load("fashion-mnist", data)
    else:
        images = datasets.load(recipe.data.name, data or recipe.data.folder, download=recipe.data.download)
    chosen = images.test if split == "test" else images.train
    right = loop.predictions(model, chosen, (images.mean, images.std)) == chosen.labels
    print(f"{right.double().mean().item():.2%} of {len(right):,} {split} images right ({images.source})")


def summary(what: str, input_size: list[int] | None = None) -> None:
    """Print bits, bytes and multiply-accumulates of every layer of a network, and its file's size.

    Args:
        what: a run folder, a packed file, or the name of a model (foldbit.models.names()).
        input_size: shape of one input, batch included; [1, 1, 28, 28] unless given.
    """
    from foldbit.summary import summary as summarise

    model, _ = _load(what)
    print(summarise(model, tuple(input_size or (1, 1, 28, 28))))


def pack(run: str, out: str | None = None) -> None:
    """Pack a trained, quantized network into bits.

    Args:
        run: its run folder.
        out: the file to write; RUN/packed.safetensors unless given.
    """
    from foldbit import convert
    from foldbit.tables import nbytes
    from foldbit.training import loop

    model, _ = loop.load_run(run)
    path = Path(out) if out else Path(run) / "packed.safetensors"
    size = convert.packed_size(model)
    convert.save_packed(convert.pack_(model), path)
    print(f"packed {run} into {path}: {nbytes(size)}")


def analyze(
    what: list[str],
    out: str = "analysis.html",
    schemes: list[str] | None = None,
    images: int = 128,
    data: str | None = None,
    seed: int = 0,
) -> None:
    """See what quantization loses, and why 2 bits: a page of pictures, and their numbers as JSON.

    Weights, and activations where there are inputs, are approximated by every scheme. The page shows the
    error and the angle of each layer, error against bits and operations, and where the levels go.

    Args:
        what: see ``_ABOUT_WHAT``.
        out: the page to write, one file that works offline; the JSON file is written beside it.
        schemes: what to compare, such as [ls-1,ls-2,gf-2]; ls-1, ls-T, gf-2 and ls-2 unless given.
        images: how many test images run through the network of a run folder.
        data: a folder with that network's data set, where it is not found by itself.
        seed: of the samples of distributions, and of random weights.
    """
    from foldbit import analyze as analysis

    page = analysis.run(what, out, compared=schemes or analysis.SCHEMES, images=images, data=data, seed=seed)
    print(f"wrote {page} and {page.with_suffix('.json')}")


def bench(
    what: str, input_size: list[int] | None = None, threads: int | None = None, seconds: float = 3.0
) -> None:
    """Time a packed network against its float and its unpacked twin, interleaved, as ratios.

    Args:
        what: a packed file that knows its architecture, or the run folder of a quantized network.
        input_size: shape of one input, batch included; [1, 1, 28, 28] unless given.
        threads: torch's threads; all unless given.
        seconds: how long to measure.
    """
    from foldbit import benchmark

    model, _ = _load(what)
    print(
        benchmark.against_twins(model, tuple(input_size or (1, 1, 28, 28)), threads=threads, seconds=seconds)
    )


def demo(folder: str = "runs/demo", data: str | None = None, download: bool = True, seed: int = 0) -> None:
    """From a float network to bits on Fashion-MNIST, in minutes: train, pack, check, time, report.

    Args:
        folder: where runs, packed files and report.html go.
        data: a folder with Fashion-MNIST's files, where they are not found by themselves.
        download: whether they may be downloaded where they cannot be found.
        seed: of initial weights and of the order of the images.
    """
    from foldbit import demo as demonstration

    demonstration.run(folder, data=data, download=download, seed=seed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse arguments and run a command. A user's mistake becomes one line, and exit code 1 or 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        given = _parse(arguments)
        _COMMANDS[given.pop("subcommand")](**given)
    except ImportError as error:
        sys.exit(f"foldbit: a library is missing ({error}); try pip install 'foldbit[demo]'")
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        sys.exit(f"foldbit: {error}")
    except KeyboardInterrupt:
        print("foldbit: interrupted", file=sys.stderr)
        sys.exit(130)


def _parse(arguments: list[str]) -> dict[str, Any]:
    """The command's name under ``subcommand``, and its arguments."""
    from jsonargparse import ActionConfigFile, ArgumentParser

    parser = ArgumentParser(prog="foldbit", description="Neural networks of 1 and 2 bits.")
    commands = parser.add_subcommands(title="commands")
    for name, command in _COMMANDS.items():
        about = (command.__doc__ or "").partition("\n\n    Args:")[0]
        sub = ArgumentParser(prog=f"foldbit {name}", description=" ".join(about.split()))
        sub.add_argument("--config", action=ActionConfigFile, help="a YAML file with options of this command")
        if name == "train":
            from foldbit.training.recipes import Recipe, names, path_of

            sub.add_argument("--recipe", help=f"a recipe that comes with foldbit: {', '.join(names())}")
            sub.add_argument("--run", required=True, help="the run folder")
            sub.add_class_arguments(Recipe, as_group=False, instantiate=False)
            # A name is only another way to spell a file, and keeps its place among the other options.
            arguments = _spell_out(arguments, path_of)
        else:
            listed: set[str | int] = {"what"} if command is analyze else set()
            for argument in listed:  # jsonargparse would take one value, a list in YAML
                sub.add_argument(str(argument), nargs="+", help=_ABOUT_WHAT)
            sub.add_function_arguments(command, as_positional=True, as_group=False, skip=listed)
        commands.add_subcommand(name, sub, help=about.partition("\n")[0])
    parsed = parser.instantiate(parser.parse_args(arguments))
    name = parsed.subcommand
    options = {key: value for key, value in vars(parsed[name]).items() if key not in ("config", "recipe")}
    return {"subcommand": name, **options}


def _spell_out(arguments: list[str], path_of: Callable[[str], Path]) -> list[str]:
    """``--recipe NAME`` as ``--config FILE``."""
    spelled = []
    rest = iter(arguments)
    for argument in rest:
        option, equals, name = argument.partition("=")
        if option != "--recipe":
            spelled.append(argument)
        else:
            spelled.append(f"--config={path_of(name if equals else next(rest, ''))}")
    return spelled


_ABOUT_WHAT = (
    "one or more of: a distribution (normal, laplace, uniform, logistic, student-t, relu-normal, "
    "half-normal, log-normal); a run folder of foldbit; a .pt, .pth, .bin, .ckpt, .safetensors or .onnx "
    "file; a trained network that a package brings (efficientnet-lite0, all-minilm-l6-v2), "
    "torchvision/NAME or timm/NAME; a model of foldbit, with random weights"
)

_COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "evaluate": evaluate,
    "summary": summary,
    "pack": pack,
    "analyze": analyze,
    "bench": bench,
    "demo": demo,
}


def _load(what: str) -> tuple[Any, Any]:
    """A network by run folder, packed file or model name, and its recipe where it has one."""
    from foldbit import convert, models

    path = Path(what)
    if path.is_dir():
        from foldbit.training import loop

        return loop.load_run(path)
    if path.is_file():
        return convert.load_packed(path), None
    if what in models.names():
        return models.create(what).eval(), None
    raise ValueError(
        f"{what!r} is no run folder, no packed file, and no model; models are {', '.join(models.names())}"
    )
