"""What accuracy networks of 1 and 2 bits reach on Fashion-MNIST in minutes, and which settings help.

    python benchmarks/accuracy.py --folder runs/accuracy --jobs 2
    python benchmarks/accuracy.py --folder runs/accuracy --json docs/accuracy.json --plot docs/accuracy.png

Trains every setting with three seeds, each on one thread, several at a time; what an earlier call has
finished is read, what it has begun goes on. Each run is a run folder, its recipe in it; `--dry` prints
the commands that make the same one by one. Test accuracies are of the last epoch: no epoch is chosen by them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import shlex
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from foldbit import timing
from foldbit.tables import table
from foldbit.training import evaluate, loop, recipes
from foldbit.training.images import ImageData

SEEDS = (0, 1, 2)
SCHEMES = (
    ("ls-1", "fp"),
    ("ls-2", "ls-2"),
    ("ls-1", "ls-2"),
    ("ls-1", "gf-2"),
    ("ls-1", "ls-T"),
    ("ls-1", "ls-1"),
)
FLOAT = ("fp", "fp")
SMALL = "--model_args.widths=[8,16,32]"
# A third of the images and of the epochs: the paper's recipe takes ten minutes a run on one thread.
LENET = ("--data.train_images=20000", "--epochs=3", "--milestones=[1,2]", "--gamma=0.35")


@dataclass(frozen=True)
class Setting:
    """A recipe with options, in which ``{group/name}`` is the run folder of another setting, same seed."""

    group: str
    name: str
    recipe: str
    options: tuple[str, ...] = ()
    schemes: tuple[str, str] = FLOAT

    def folder(self, root: Path, seed: int) -> Path:
        """Its run folder."""
        return root / self.group / self.name / f"seed{seed}"

    def arguments(self, root: Path, seed: int) -> list[str]:
        """Options of `foldbit train` beside recipe, schemes and run folder."""
        options = list(self.options)
        for source in SOURCES:
            place = f"{{{source.group}/{source.name}}}"
            options = [option.replace(place, str(source.folder(root, seed))) for option in options]
        return [*options, f"--seed={seed}"]

    def command(self, root: Path, seed: int) -> str:
        """What trains it."""
        weight, activation = self.schemes
        start = ["foldbit", "train", "--recipe", self.recipe, "--weight", weight, "--activation", activation]
        run = ["--run", str(self.folder(root, seed))]
        return shlex.join([*start, *self.arguments(root, seed), "--threads=1", *run])


def scheme_name(schemes: tuple[str, str]) -> str:
    """As in ``ls-1 ls-2``: of weights, and of activations."""
    return " ".join(schemes)


# Float networks that others start from or learn from.
SOURCES = (
    Setting("resnet8", "float2", "fashion-mnist/resnet8-float", (SMALL,)),
    Setting("resnet8", "float", "fashion-mnist/resnet8-float", (SMALL, "--epochs=3")),
    Setting("lenet5", "float", "fashion-mnist/lenet5", LENET),
)
FROM_FLOAT = (SMALL, "--init={resnet8/float2}")


def _taught(
    teacher: str, temperature: float = 4, weight: float = 0.5, correct: bool = False
) -> tuple[str, ...]:
    options = (f"--distill.teacher={{{teacher}}}", f"--distill.temperature={temperature:g}")
    corrected = ("--distill.correct=true",) if correct else ()
    return (*options, f"--distill.weight={weight:g}", *corrected)


def _schemes(group: str, recipe: str, options: tuple[str, ...], suffix: str = "") -> list[Setting]:
    return [Setting(group, scheme_name(s) + suffix, recipe, options, s) for s in SCHEMES]


def _variant(name: str, *options: str, start: tuple[str, ...] = FROM_FLOAT) -> Setting:
    """Another way to train the network of 1-bit weights and 2-bit activations."""
    return Setting("settings", name, "fashion-mnist/resnet8", (*start, *options), ("ls-1", "ls-2"))


# The paper's way: no float network to start from, Adam at 2e-4, linearly down, scales solved for each sample,
# gradients where |x| <= 1 (as its code has it).
PAPER = (
    SMALL,
    "--epochs=3",
    "--lr=2e-4",
    "--schedule=linear",
    "--quant.activation_scales=dynamic",
    "--quant.activation_estimator=clipped",
)
SETTINGS = (
    *SOURCES,
    *_schemes("resnet8", "fashion-mnist/resnet8", FROM_FLOAT),
    *_schemes("resnet8", "fashion-mnist/resnet8", (*FROM_FLOAT, *_taught("resnet8/float")), "-taught"),
    *_schemes("lenet5", "fashion-mnist/lenet5", LENET),
    _variant("from scratch, 3 epochs", "--epochs=3", "--lr=3e-3", start=(SMALL,)),
    _variant("from scratch, 3 epochs, as in the paper", start=PAPER),
    _variant("dynamic scales", "--quant.activation_scales=dynamic"),
    _variant("schedule linear", "--schedule=linear"),
    _variant("taught, T 1, weight 1", *_taught("resnet8/float", 1, 1)),
    _variant("taught, T 1, weight 1, corrected", *_taught("resnet8/float", 1, 1, True)),
    *_schemes("lenet5", "fashion-mnist/lenet5", (*LENET, *_taught("lenet5/float")), "-taught"),
)


def train(setting: Setting, root: Path, seed: int) -> None:
    """Train one setting with one seed, on one thread, or go on with it. For a process of its own."""
    weight, activation = setting.schemes
    path = recipes.path_of(setting.recipe)
    options = setting.arguments(root, seed)
    recipe = recipes.load(path, overrides=options, weight=weight, activation=activation)
    if recipe.data.name not in _images:
        _images[recipe.data.name] = evaluate.load_data(recipe)
    images = _images[recipe.data.name]
    with contextlib.redirect_stdout(io.StringIO()):
        loop.train(recipe, setting.folder(root, seed), images=images, threads=1)


_images: dict[str, ImageData] = {}  # that this process has loaded


def train_all(root: Path, jobs: int) -> None:
    """All settings with all seeds, those that others wait for first."""
    waves = [[s for s in SETTINGS if s in SOURCES], [s for s in SETTINGS if s not in SOURCES]]
    context = multiprocessing.get_context("spawn")
    total = len(SETTINGS) * len(SEEDS)
    with ProcessPoolExecutor(jobs, context) as pool, tqdm(total=total, unit="run") as bar:
        for wave in waves:
            pending = {
                pool.submit(train, setting, root, seed): f"{setting.group}/{setting.name}, seed {seed}"
                for setting in wave
                for seed in SEEDS
                if not finished(setting, root, seed)
            }
            bar.update(len(wave) * len(SEEDS) - len(pending))
            for done in as_completed(pending):
                try:
                    done.result()
                except Exception as error:
                    pool.shutdown(cancel_futures=True)
                    raise RuntimeError(f"{pending[done]}: {error}") from error
                bar.update()


def metrics(setting: Setting, root: Path, seed: int) -> list[dict[str, float]]:
    """Its records, one an epoch; none where it has not begun."""
    path = setting.folder(root, seed) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def finished(setting: Setting, root: Path, seed: int) -> bool:
    """Whether it has been trained to its end."""
    done = metrics(setting, root, seed)
    return bool(done) and len(done) >= recipes.load(setting.folder(root, seed) / "config.yaml").epochs


@dataclass(frozen=True)
class Result:
    """A setting's test accuracies, in percent, and how long an epoch took, a number a seed."""

    setting: Setting
    accuracies: tuple[float, ...]
    seconds: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of the accuracies."""
        return statistics.mean(self.accuracies)

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {statistics.stdev(self.accuracies):.2f}"


def results(root: Path) -> dict[str, Result]:
    """Of the settings that are finished with every seed, by group and name."""
    found = {}
    for setting in SETTINGS:
        if all(finished(setting, root, seed) for seed in SEEDS):
            records = [metrics(setting, root, seed) for seed in SEEDS]
            found[f"{setting.group}/{setting.name}"] = Result(
                setting,
                tuple(100 * record[-1]["test_accuracy"] for record in records),
                tuple(statistics.mean(r["seconds"] for r in record) for record in records),
            )
    return found


def tables(found: dict[str, Result]) -> str:
    """What came out, for reading."""
    parts = []
    for group, title in (("resnet8", "ResNet-8, widths 8, 16, 32"), ("lenet5", "LeNet-5")):
        rows: list[list[object]] = []
        for name in ("float", *map(scheme_name, SCHEMES)):
            alone, taught = found.get(f"{group}/{name}"), found.get(f"{group}/{name}-taught")
            gain = paired(alone, taught)
            if alone is not None:
                below = paired(found.get(f"{group}/float"), alone) if name != "float" else ""
                rows.append([name, str(alone), below, "" if taught is None else str(taught), gain])
        header = ["weight, activation", "labels alone", "over float", "taught", "over labels alone"]
        parts.append(f"{title}\n{table(header, rows)}")
    base = found.get("resnet8/" + scheme_name(("ls-1", "ls-2")))
    rows = [
        [result.setting.name, str(result), paired(base, result)]
        for name, result in found.items()
        if name.startswith("settings/")
    ]
    rows.insert(0, ["as above", "" if base is None else str(base), ""])
    parts.append(f"ResNet-8, ls-1/ls-2, trained otherwise\n{table(['', 'accuracy', 'difference'], rows)}")
    return "\n\n".join(parts)


def paired(before: Result | None, after: Result | None) -> str:
    """What changed, seed by seed: mean and standard deviation."""
    if before is None or after is None:
        return ""
    changes = [b - a for a, b in zip(before.accuracies, after.accuracies, strict=True)]
    return f"{statistics.mean(changes):+.2f} ± {statistics.stdev(changes):.2f}"


def draw(root: Path, found: dict[str, Result], path: Path) -> None:
    """Loss over steps and accuracy by scheme, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for axis, group, title in zip(axes, ("resnet8", "lenet5"), ("ResNet-8", "LeNet-5"), strict=False):
        for place, name in enumerate(("float", *map(scheme_name, SCHEMES))):
            for suffix, colour, shift in (("", "tab:blue", -0.12), ("-taught", "tab:orange", 0.12)):
                result = found.get(f"{group}/{name}{suffix}")
                if result is not None:
                    axis.plot([place + shift] * len(SEEDS), result.accuracies, "o", color=colour, alpha=0.5)
                    axis.plot(place + shift, result.mean, "_", color=colour, markersize=18)
        axis.set_xticks(range(len(SCHEMES) + 1), ["float", *map(scheme_name, SCHEMES)])
        axis.set_title(f"{title}: test accuracy, three seeds\n(blue: labels alone; orange: taught)")
        axis.set_ylabel("%")
        axis.grid(axis="y", alpha=0.3)
    for name in map(scheme_name, SCHEMES):
        result = found.get(f"resnet8/{name}")
        if result is not None:
            records = (result.setting.folder(root, SEEDS[0]) / "losses.jsonl").read_text().splitlines()
            points = [json.loads(line) for line in records]
            axes[2].plot([p["step"] for p in points], [p["loss"] for p in points], label=name, linewidth=1)
    axes[2].set(title="ResNet-8, seed 0: training loss", xlabel="step", yscale="log")
    axes[2].legend()
    axes[2].grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/accuracy"), help="where the runs go")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--dry", action="store_true", help="print the commands, and train nothing")
    parser.add_argument("--report", action="store_true", help="report what is finished, and train nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture there")
    arguments = parser.parse_args()
    if arguments.dry:
        print("\n".join(s.command(arguments.folder, seed) for s in SETTINGS for seed in SEEDS))
        return
    if not arguments.report:
        train_all(arguments.folder, arguments.jobs)
    found = results(arguments.folder)
    print(tables(found))
    if arguments.json:
        record = {
            name: {
                "command": result.setting.command(arguments.folder, SEEDS[0]),
                "test_accuracy": result.accuracies,
                "seconds_an_epoch": result.seconds,
            }
            for name, result in found.items()
        }
        document = {"machine": timing.machine(), "seeds": SEEDS, "results": record}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    if arguments.plot:
        draw(arguments.folder, found, arguments.plot)


if __name__ == "__main__":
    main()
