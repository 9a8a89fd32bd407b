"""The command line, `foldbit train` and the other commands in ``_COMMANDS``: it only wires."""

from __future__ import annotations

import dataclasses
import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from foldbit import options
from foldbit.training.data import Name


def recipes(name: str | None = None, weight: str | None = None, activation: str | None = None) -> None:
    """List the recipes that come with foldbit, with published accuracies; or show one whole, as YAML.

    Args:
        name: the recipe to show; all are listed unless given.
        weight: scheme of its weights, instead of the recipe's own.
        activation: scheme of its activations, with the settings that go with it.
    """
    from foldbit.training import catalogue

    if name is not None:
        print(catalogue.description(name, weight=weight, activation=activation))
    elif weight is None and activation is None:
        print(catalogue.overview())
    else:
        raise ValueError("--weight and --activation go with a recipe: foldbit recipes NAME --activation ls-1")


def train(run: str, threads: int | None = None, **given: Any) -> None:
    """Train a network into a run folder; the same command goes on after an interruption, for Ctrl-C saves.

    The options below are the fields of a recipe. YAML files with the same fields go to --config or, when they
    come with foldbit, by name to --recipe; what comes later on the line changes what came earlier. --weight
    and --activation choose the schemes in all those files, and the settings that they have for them. On
    several processes: torchrun --nproc-per-node=2 -m -- foldbit train ... (docs/training.md).
    """
    from foldbit.training import loop, processes
    from foldbit.training.recipes import Recipe

    habits = loop.Habits(**{f.name: given.pop(f.name) for f in dataclasses.fields(loop.Habits)})
    outcome = loop.train(Recipe(**given), run, threads=threads, habits=habits)
    if not outcome.finished:
        sys.exit(130)
    how = "done" if outcome.steps else "already finished"
    if processes.is_first():
        print(f"{how}: test accuracy {outcome.metrics[-1]['test_accuracy']:.2%}, in {run}")


def evaluate(
    what: str,
    dataset: Name | None = None,
    data: str | None = None,
    split: Literal["test", "train"] = "test",
    threads: int | None = None,
) -> None:
    """Classify a data set with a trained or packed network, and print the accuracy.

    Args:
        what: a run folder, or a packed file (.safetensors) that knows its architecture.
        dataset: which images; those of the run that the network, or the packed file, lies in unless given.
        data: a folder with its files, where they are not found by themselves (docs/data.md).
        split: which images of the data set.
        threads: torch's threads; all, or one where that is faster, unless given.
    """
    from foldbit.training import evaluate as evaluation

    model, recipe = _load(what, trained=True)
    images = evaluation.images_for(what, recipe, dataset, data)
    right = evaluation.accuracy_on(model, images, split, threads)
    print(f"{right:.2%} of {len(images[split]):,} {split} images right: {images.name} ({images.source})")


def summary(what: str, input_size: list[int] | str | None = None) -> None:
    """Print bits, bytes and multiply-accumulates of every layer of a network, and its file's size.

    Args:
        what: a run folder, a packed file, or the name of a model (foldbit.models.names()).
        input_size: shape of one input, batch included, such as 1,3,32,32; guessed from the first
            convolution unless given.
    """
    from foldbit.summary import summary as summarise

    model, _ = _load(what)
    print(summarise(model, _input_size(model, input_size)))


def pack(
    run: str,
    out: str | None = None,
    calibrate: bool | None = None,
    calibration_images: int = 1024,
    data: str | None = None,
) -> None:
    """Pack a trained, quantized network into bits, with static activation scales where it had dynamic ones.

    Args:
        run: its run folder.
        out: the file to write; RUN/packed.safetensors unless given.
        calibrate: whether to calibrate static activation scales on training images; false keeps what the
            network was trained with. Unless given, dynamic scales are calibrated and static ones are kept.
        calibration_images: how many images to calibrate on.
        data: a folder with the run's data set, where it is not found by itself.
    """
    from foldbit import convert, storage
    from foldbit.calibrate import has_dynamic_scales
    from foldbit.tables import nbytes
    from foldbit.training import evaluate as evaluation
    from foldbit.training import runs

    model, recipe = runs.load_run(run)
    if recipe.quant is None:
        raise ValueError(
            f"nothing to pack: {run} was trained in float. Train a quantized network from it, and pack that: "
            f"foldbit train --recipe fashion-mnist/resnet8 --run {run}-w1a2 --init {run}"
        )
    path = Path(out) if out else Path(run) / "packed.safetensors"
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} to write {path.name} into; make it first")
    if has_dynamic_scales(model) if calibrate is None else calibrate:
        print("calibrating static activation scales on training images (--calibrate false does not)")
        images = evaluation.load_data(recipe, data)
        print(evaluation.calibrate(model, recipe, calibration_images, images=images))
    size = storage.packed_size(model)
    storage.save_packed(convert.pack_(model), path)
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
    what: str, input_size: list[int] | str | None = None, threads: int = 1, seconds: float = 3.0
) -> None:
    """Time a packed network against its float and its unpacked twin, interleaved, as ratios.

    Args:
        what: a packed file that knows its architecture, or the run folder of a quantized network.
        input_size: shape of one input, batch included, such as 1,3,32,32; guessed from the first
            convolution unless given.
        threads: torch's threads.
        seconds: how long to measure.
    """
    from foldbit import benchmark

    model, _ = _load(what)
    size = _input_size(model, input_size)
    print(benchmark.against_twins(model, size, threads=threads, seconds=seconds))


def bench_train(threads: int | None = None, seconds: float = 20.0, **recipe: Any) -> None:
    """Time the training steps of a recipe's network, quantized and in float: images per second, interleaved.

    Also spelled bench train. The options below are those of train. Steps are taken on random images of the
    data set's shape, on one device; no data is read.
    """
    from foldbit.training import throughput
    from foldbit.training.recipes import Recipe

    print(throughput.against_float(Recipe(**recipe), threads=threads, seconds=seconds))


def compare(runs: list[str], out: str = "compare.html") -> None:
    """Put trainings side by side: a table of run folders, and a page with their curves.

    Args:
        runs: run folders, or folders with run folders in them, such as runs/*.
        out: the page to write, one file that works offline.
    """
    from foldbit import compare as comparison

    print(comparison.run(runs, out))


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
    try:
        try:
            with _lenient(sys.stdout):
                _run(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            getattr(sys.stdout, "flush", lambda: None)()  # which fails here, not when Python has ended
    except KeyboardInterrupt:
        print("foldbit: interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # of the output: others have been told
        with suppress(OSError, ValueError, AttributeError), Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # what is left has somewhere to go
        if isinstance(error, BrokenPipeError):  # as behind head: nothing to tell, and a shell's number for it
            sys.exit(141)
        sys.exit(f"foldbit: the output cannot be written: {error.strerror or error}")


@contextmanager
def _lenient(output: Any) -> Iterator[None]:
    """Show another character for one that a terminal lacks. The output may be None, or any object."""
    if getattr(output, "errors", None) != "strict" or not hasattr(output, "reconfigure"):
        yield
        return
    output.reconfigure(errors="replace")
    try:
        yield
    finally:
        output.reconfigure(errors="strict")


def _has_no_reader(output: Any) -> bool:
    """Whether it is a pipe that nobody reads any more."""
    with suppress(OSError, ValueError, TypeError, AttributeError):  # no descriptor, or no poll, as on Windows
        poll = select.poll()
        poll.register(output, 0)  # errors alone
        return bool(poll.poll(0))
    return False


def _run(arguments: list[str]) -> None:
    try:
        given = _parse(arguments)
    except ImportError as error:
        sys.exit(_missing(error))
    except (ValueError, TypeError) as error:
        print(f"foldbit: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        options.check_threads(given.get("threads"))
        options.check_seed(given.get("seed", 0))
        _COMMANDS[given.pop("subcommand")](**given)
    except ImportError as error:
        sys.exit(_missing(error))
    except BrokenPipeError as error:
        if _has_no_reader(sys.stdout):
            raise
        sys.exit(f"foldbit: {error}")
    except (ValueError, TypeError, OSError, RuntimeError, FloatingPointError) as error:
        sys.exit(f"foldbit: {error}")


def _missing(error: ImportError) -> str:
    return f"foldbit: a library is missing ({error}); try pip install 'foldbit[demo]'"


def _parse(arguments: list[str]) -> dict[str, Any]:
    """The command's name under ``subcommand``, and its arguments.

    Raises:
        ValueError: for a mistake in them, in a sentence.
    """
    from jsonargparse import ActionConfigFile

    parser = options.parser(
        prog="foldbit", description="Neural networks of 1 and 2 bits.", allow_abbrev=False
    )
    commands = parser.add_subcommands(title="commands")
    known: dict[str, list[str]] = {}
    for name, command in _COMMANDS.items():
        about = (command.__doc__ or "").partition("\n\n    Args:")[0]
        sub = options.parser(prog=f"foldbit {name}", description=" ".join(about.split()))
        sub.add_argument("--config", action=ActionConfigFile, help="a YAML file with options of this command")
        if name in _WITH_RECIPE:
            known[name] = _add_recipe(sub, name)
        else:
            listed: set[str | int] = set()
            if command is analyze:  # jsonargparse would take one value, a list in YAML
                listed = {"what"}
                sub.add_argument("what", nargs="+", help=_ABOUT_WHAT)
            elif command is compare:
                listed = {"runs"}
                sub.add_argument("runs", nargs="+", help="run folders, or folders with run folders in them")
            elif command is recipes:
                listed = {"name"}
                sub.add_argument("name", nargs="?", help="the recipe to show; all are listed unless given")
            sub.add_function_arguments(command, as_positional=True, as_group=False, skip=listed)
        written = (option.lstrip("-") for option in sub._option_string_actions if option != "-h")
        known[name] = [*known.get(name, []), *written]
        commands.add_subcommand(name, sub, help=about.partition("\n")[0])
    try:
        if arguments[:2] == ["bench", "train"]:
            arguments = ["bench-train", *arguments[2:]]
        if arguments and arguments[0] in _WITH_RECIPE:
            from foldbit.training import composition

            arguments = composition.spell_out(arguments)
        parsed = parser.instantiate(parser.parse_args(arguments))
    except options.MISTAKES as error:
        name = next((argument for argument in arguments if argument in _COMMANDS), "")
        help_ = f"foldbit {name} --help".replace("  ", " ")
        raise ValueError(f"{options.explain(str(error), known.get(name, []))} (see {help_})") from error
    name = parsed.subcommand
    given = {key: value for key, value in vars(parsed[name]).items() if key not in ("config", "recipe")}
    if name in _WITH_RECIPE:  # spelled out before
        del given["weight"], given["activation"]
    return {"subcommand": name, **given}


def _add_recipe(sub: Any, name: str) -> list[str]:
    """Options of a command that takes a recipe's fields; and these fields' names."""
    from foldbit.training.loop import Habits
    from foldbit.training.recipes import Recipe

    sub.add_argument("--recipe", help="a recipe that comes with foldbit; `foldbit recipes` lists them")
    for what in ("weight", "activation"):
        sub.add_argument(f"--{what}", help=f"scheme of the {what}s, such as ls-1 or ls-2; fp is float")
    if name == "train":
        sub.add_argument("--run", required=True, help="the run folder")
        sub.add_class_arguments(Habits, as_group=False, instantiate=False)
        threads = "torch's threads; all, or one where that is faster, unless given"
    else:
        sub.add_argument("--seconds", type=float, default=20.0, help="how long to measure")
        threads = "torch's threads, on the CPU; unless given, as many as there are"
    sub.add_argument("--threads", type=int | None, default=None, help=threads)
    sub.add_class_arguments(Recipe, as_group=False, instantiate=False)
    return options.fields_of(Recipe)


_ABOUT_WHAT = (
    "one or more of: a distribution (normal, laplace, uniform, logistic, student-t, relu-normal, "
    "half-normal, log-normal); a run folder of foldbit; a .pt, .pth, .bin, .ckpt, .safetensors or .onnx "
    "file; a trained network that a package brings (efficientnet-lite0, all-minilm-l6-v2), "
    "torchvision/NAME or timm/NAME; a model of foldbit, with random weights"
)

_COMMANDS: dict[str, Callable[..., None]] = {
    "recipes": recipes,
    "train": train,
    "evaluate": evaluate,
    "summary": summary,
    "pack": pack,
    "analyze": analyze,
    "bench": bench,
    "bench-train": bench_train,
    "compare": compare,
    "demo": demo,
}

_WITH_RECIPE = ("train", "bench-train")  # whose options are a recipe's fields


def _input_size(model: Any, given: list[int] | str | None) -> tuple[int, ...]:
    from foldbit.summary import likely_input_size

    return likely_input_size(model) if given is None else options.shape(given)


def _load(what: str, trained: bool = False) -> tuple[Any, Any]:
    """A network by run folder, packed file or, untrained, model name, and its recipe where it has one."""
    from foldbit import models, storage

    path = Path(what)
    if path.is_dir():
        from foldbit.training import runs

        return runs.load_run(path)
    if path.is_file():
        return storage.load_packed(path), None
    if what in models.names():
        if trained:
            raise ValueError(
                f"{what} is a model's name: its weights would be random. Name a run folder, which "
                f"`foldbit train --model {what} --run FOLDER` makes, or a packed file"
            )
        return models.create(what).eval(), None
    raise ValueError(
        f"{what!r} is no run folder, no packed file, and no model; models are {', '.join(models.names())}"
    )
