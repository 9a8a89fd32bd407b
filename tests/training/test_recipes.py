"""Recipes: those that come with foldbit, how files build on each other, what a command line makes of them."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import yaml

from foldbit import QuantConfig, cli, demo, models
from foldbit.training import catalogue, composition, recipes
from foldbit.training.recipes import DataConfig, Distillation, Recipe

SMALL = {"lenet5": {}, "resnet8-xnor": {"widths": [4, 4, 4]}}
CLASSES = {"mnist": 10, "fashion-mnist": 10, "cifar10": 10, "cifar100": 100, "imagenet": 1000}

#: A few hundred characters that stand for 9**9 values.
BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)


def packaged(name, **schemes):
    return recipes.load(recipes.path_of(name), **schemes)


def write(folder, **files):
    """YAML files; the first one's path."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


class TestPackaged:
    def test_every_experiment_of_the_paper_is_there(self):
        expected = {
            "mnist/lenet5",
            "fashion-mnist/lenet5",
            "fashion-mnist/resnet8",
            "fashion-mnist/resnet8-float",
        }
        for network in (
            "cifar10/resnet18",
            "cifar100/resnet18",
            *(f"imagenet/resnet{n}" for n in (18, 34, 50)),
        ):
            expected |= {network, f"{network}-teacher", f"{network}-distilled"}
        assert set(recipes.names()) == expected

    @pytest.mark.parametrize("name", recipes.names())
    def test_each_builds_what_its_name_says(self, name):
        recipe = packaged(name)
        data, _, network = name.partition("/")
        assert recipe.data.name == data
        assert (recipe.quant is None) == name.endswith(("teacher", "float"))
        assert (recipe.distill is not None) == name.endswith("distilled")
        channels = 1 if "mnist" in data else 3
        small = {**SMALL.get(recipe.model, {"widths": [4, 4, 4, 4]}), **recipe.model_args}
        fitted = recipes.fit(dataclasses.replace(recipe, model_args=small), CLASSES[data], channels)
        side = 64 if data == "imagenet" else 28
        model = recipes.build(fitted).eval()
        assert model(torch.randn(2, channels, side, side)).shape == (2, CLASSES[data])
        if "resnet" in network and "fashion" not in data:
            assert recipe.model == network.partition("-")[0] + ("-cifar" if data.startswith("cifar") else "")
            assert model.block == ("regular" if name.endswith("teacher") else "xnor")

    @pytest.mark.parametrize(
        "name, what",
        [  # the paper's, as its code has it
            ("mnist/lenet5", dict(epochs=10, batch_size=64, optimizer="adadelta", lr=1.0, gamma=0.7)),
            (
                "cifar100/resnet18-teacher",
                dict(epochs=200, optimizer="sgd", lr=0.1, weight_decay=5e-4, gamma=0.2),
            ),
            (
                "cifar100/resnet18",
                dict(
                    epochs=350,
                    batch_size=128,
                    optimizer="adam",
                    lr=2e-4,
                    milestones=[150, 250, 320],
                    gamma=0.1,
                ),
            ),
            (
                "imagenet/resnet18-teacher",
                dict(epochs=100, batch_size=256, milestones=[30, 60, 90], weight_decay=1e-4),
            ),
            (
                "imagenet/resnet34",
                dict(epochs=240, optimizer="adam", lr=2e-4, schedule="linear", weight_decay=0.0),
            ),
            (
                "cifar10/resnet18-distilled",
                dict(distill=Distillation("runs/cifar10/resnet18-teacher", temperature=5.0, correct=True)),
            ),
            (
                "imagenet/resnet50-distilled",
                dict(distill=Distillation("torchvision/resnet50", temperature=1.0)),
            ),
        ],
    )
    def test_settings_are_the_papers(self, name, what):
        recipe = packaged(name)
        assert {field: getattr(recipe, field) for field in what} == what

    def test_epochs_and_milestones_fit(self):
        for name in recipes.names():
            recipe = packaged(name)
            assert recipe.schedule != "steps" or max(recipe.milestones) < recipe.epochs

    @pytest.mark.parametrize(
        "activation, clamp, nonlinearity",
        [("ls-1", 2.0, "prelu"), ("ls-T", 2.0, "prelu"), ("gf-2", 3.0, "prelu"), ("ls-2", 3.0, "relu")],
    )
    def test_clamp_and_nonlinearity_follow_the_scheme(self, activation, clamp, nonlinearity):
        recipe = packaged("imagenet/resnet50-distilled", activation=activation)
        assert recipe.quant.activation == activation and recipe.quant.clamp == clamp
        assert recipe.model_args == {"block": "xnor", "nonlinearity": nonlinearity}

    @pytest.mark.parametrize("weight, activation", [("ls-1", "fp"), ("ls-T", "fp"), ("ls-2", "ls-2")])
    def test_any_pair_of_schemes(self, weight, activation):
        quant = packaged("imagenet/resnet18", weight=weight, activation=activation).quant
        assert (quant.weight, quant.activation) == (weight, activation)

    def test_a_recipe_trains_in_float_too(self):
        recipe = packaged("imagenet/resnet18", weight="fp", activation="fp")
        assert recipe.quant is None and recipe.model_args["block"] == "xnor"

    def test_the_demo_trains_them(self):
        assert packaged("fashion-mnist/resnet8-float") == demo.FLOAT
        for quant in demo.SCHEMES.values():
            recipe = packaged("fashion-mnist/resnet8", activation=quant.activation)
            assert recipe == dataclasses.replace(demo.QUANTIZED, quant=quant)

    @pytest.mark.parametrize(
        "name, said",
        [
            ("imagenet/resnet19", "unknown recipe 'imagenet/resnet19'; did you mean imagenet/resnet18?"),
            ("../recipes/mnist/lenet5", "unknown recipe"),
            ("published", r"unknown recipe 'published'\. `foldbit recipes` lists them"),
        ],
    )
    def test_unknown_names(self, name, said):
        with pytest.raises(ValueError, match=said.replace("?", r"\?")):
            recipes.path_of(name)


SCHEMES = dict(
    top="base: bottom.yaml\nepochs: 1\nby_activation: {ls-T: {seed: 7}}\n",
    bottom=(
        "epochs: 9\nseed: 1\nquant: {activation: ls-2, clamp: 3.0}\n"
        "by_activation: {ls-1: {epochs: 5, quant: {clamp: 2.0}}, ls-2: {seed: 2}, ls-T: {seed: 3}}\n"
    ),
)


class TestComposition:
    def test_mappings_merge_and_other_values_replace(self, tmp_path):
        top = write(
            tmp_path,
            top="base: middle.yaml\nlr: 0.25\nquant: {clamp: 4.0}\nmodel_args: {b: [3]}\n",
            middle="base: bottom.yaml\nmodel_args: {a: 1}\nmilestones: [7]\n",
            bottom=(
                "epochs: 9\nmilestones: [1, 2]\nmodel_args: {b: [1, 2], c: x}\n"
                "quant: {weight: ls-2}\nlr: 2e-4\n"
            ),
        )
        assert composition.resolve(top) == {
            "epochs": 9,
            "lr": 0.25,
            "milestones": [7],
            "model_args": {"a": 1, "b": [3], "c": "x"},
            "quant": {"weight": "ls-2", "clamp": 4.0},
        }
        assert composition.resolve(tmp_path / "bottom.yaml")["lr"] == 2e-4  # a number, as in any YAML of ours

    def test_a_file_builds_on_a_packaged_recipe(self, tmp_path):
        top = write(
            tmp_path, top="base: cifar100/resnet18\nepochs: 5\ndata: {name: folder, folder: my/images}\n"
        )
        recipe = recipes.load(top)
        expected = packaged("cifar100/resnet18")
        data = dataclasses.replace(expected.data, name="folder", folder="my/images")
        assert recipe == dataclasses.replace(expected, epochs=5, data=data)

    @pytest.mark.parametrize(
        "activation, epochs, clamp, seed", [(None, 1, 3.0, 2), ("ls-1", 1, 2.0, 1), ("ls-T", 1, 3.0, 7)]
    )
    def test_settings_for_a_scheme(self, tmp_path, activation, epochs, clamp, seed):
        recipe = recipes.load(write(tmp_path, **SCHEMES), activation=activation)
        assert (recipe.epochs, recipe.quant.clamp, recipe.seed) == (epochs, clamp, seed)

    def test_the_file_on_top_states_the_scheme(self, tmp_path):
        top = write(tmp_path, own="base: top.yaml\nquant: {activation: ls-T}\n", **SCHEMES)
        assert recipes.load(top).seed == 7
        top = write(tmp_path, own="base: top.yaml\nquant: null\n", **SCHEMES)
        assert recipes.load(top).seed == 1 and recipes.load(top).quant is None  # float: no scheme at all
        top = write(tmp_path, own="quant: {weight: ls-1}\nby_activation: {ls-2: {seed: 3}}\n")
        assert recipes.load(top).seed == 3  # the scheme that a config has where none is stated

    @pytest.mark.parametrize(
        "files, said",
        [
            (dict(a="base: b.yaml", b="base: c.yaml", c="base: b.yaml"), "circle: b.yaml → c.yaml → b.yaml"),
            (dict(a="base: a.yaml"), "circle: a.yaml → a.yaml"),
            (dict(a="base: b.yaml"), "b.yaml cannot be read: No such file"),
            (
                dict(a="base: imagenet/resnet81"),
                r"a.yaml: base: unknown recipe .*; did you mean imagenet/resnet18\?",
            ),
            (dict(a="base: 3"), "a.yaml: base is text; got 3"),
            (dict(a="base: [b.yaml]"), "a.yaml: base is text"),
            (dict(a="- 1"), "a.yaml is not a recipe: expected fields"),
            (dict(a="a: ["), "a.yaml is not YAML: while parsing"),
            (dict(a="3: 4"), "is not a recipe"),
            (dict(a="lr: 1\nmilestones: !!set {a, b}"), r"a.yaml is not YAML: line 2: expected .*got !!set"),
            (dict(a="model: !!binary aGk="), r"a.yaml is not YAML: line 1: expected .*got !!binary"),
            (dict(a="data: {download: !!bool q}"), r"a.yaml is not YAML: a value cannot be read \('q'\)"),
            (dict(a="seed: !!int ''"), "a.yaml is not YAML: a value cannot be read"),
            (dict(a=BOMB), "a.yaml is not YAML: line .*, aliases written out"),
            (dict(a="base: b.yaml", b=BOMB), "b.yaml is not YAML: line .*, aliases written out"),
            (dict(a="#" * 10**6), "a.yaml is not YAML: .*characters"),
            (
                dict(a="x: !!python/object/apply:os.getcwd []"),
                "is not YAML: line 1: expected text, numbers, lists and mappings; got !!python/object",
            ),
            (dict(a="by_activation: ls-1"), "by_activation gives fields for schemes"),
            (dict(a="by_activation: {ls-1: 3}"), "by_activation gives fields for schemes"),
            (dict(a="by_activation: {ls-9: {lr: 3}}"), "a.yaml: by_activation: unknown scheme 'ls-9'"),
            (
                dict(a="recipe: mnist/lenet5"),
                "'recipe' is an option of the command line; in a file write 'base: ...'",
            ),
            (dict(a="activation: ls-1"), "in a file write 'quant: {activation: ...}'"),
        ],
    )
    def test_mistakes_in_files(self, tmp_path, files, said):
        with pytest.raises(ValueError, match=said):
            recipes.load(write(tmp_path, **files))

    def test_a_file_that_is_no_text(self, tmp_path):
        (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match="is not text, and so no recipe"):
            recipes.load(tmp_path / "a.yaml")

    def test_an_empty_file_changes_nothing(self, tmp_path):
        assert recipes.load(write(tmp_path, a="# nothing\n")) == Recipe()


class TestLoading:
    def test_later_files_and_options_win(self, tmp_path):
        write(
            tmp_path,
            a="epochs: 5\nlr: 0.5\nquant: {weight: ls-2, clamp: 3.0}\nmodel_args: {a: 1, b: [1, 2]}\n",
        )
        write(tmp_path, b="lr: 0.25\nquant: {weight: gf-3}\nmodel_args: {a: 2, c: x}\n")
        recipe = recipes.load(tmp_path / "a.yaml", tmp_path / "b.yaml", overrides=["--data.name=digits"])
        assert recipe == Recipe(
            epochs=5,
            lr=0.25,
            quant=QuantConfig(weight="gf-3", clamp=3.0),
            model_args={"a": 2, "b": [1, 2], "c": "x"},
            data=DataConfig(name="digits"),
        )

    def test_round_trip(self, tmp_path):
        recipe = Recipe(
            model_args={"widths": [8, 8, 16], "nonlinearity": "none"},
            quant=QuantConfig("ls-1", "ls-2", activation_scales="static", clamp=3.0),
            init="runs/x",
            lr=1e-7,
            distill=Distillation("runs/y", temperature=2.0),
            schedule="steps",
            milestones=[1, 2],
        )
        recipes.save(recipe, tmp_path / "r.yaml")
        assert recipes.load(tmp_path / "r.yaml") == recipe
        written = (tmp_path / "r.yaml").read_text()
        assert recipes.is_dump(written) and not recipes.is_dump(f"{written}# a remark\n")

    @pytest.mark.parametrize(
        "text",
        [
            "epoch: 3",
            "epochs: many",
            "quant: {weight: ls-9}",
            "- 1",
            "epochs: -1",
            "data: {name: cifar}",
            "seed: \"!!int ''\"",
        ],
    )
    def test_what_does_not_fit_is_said(self, tmp_path, text):
        with pytest.raises(ValueError, match="not a recipe"):
            recipes.load(write(tmp_path, bad=text))


class TestFitting:
    def test_classes_and_channels_follow_from_the_images(self):
        recipe = packaged("cifar100/resnet18")
        fitted = recipes.fit(recipe, 7, 1)
        assert fitted.model_args == {"block": "xnor", "num_classes": 7, "in_channels": 1}
        assert recipes.fit(fitted, 7, 1) == fitted and "num_classes" not in recipe.model_args
        small = dataclasses.replace(recipe, model_args={"widths": [4, 4, 4, 4]})
        built = recipes.build(small, classes=7, channels=1)
        assert models.architecture_of(built)[1] == {
            "widths": [4, 4, 4, 4],
            "num_classes": 7,
            "in_channels": 1,
        }
        assert built.eval()(torch.randn(1, 1, 16, 16)).shape == (1, 7)

    @pytest.mark.parametrize("wrong", [{"num_classes": 10}, {"in_channels": 3}])
    def test_a_conflict_is_said(self, wrong):
        ((name, count),) = wrong.items()
        with pytest.raises(
            ValueError, match=rf"model_args.{name} is {count}, and the images \(digits\) have . c"
        ):
            recipes.fit(Recipe(model_args=wrong, data=DataConfig("digits")), 7, 1)

    def test_a_model_without_such_arguments_is_left_alone(self, monkeypatch):
        monkeypatch.setattr(
            models.registry, "_BUILDERS", {"plain": lambda width=3: torch.nn.Linear(width, 2)}
        )
        recipe = Recipe(model="plain")
        assert recipes.fit(recipe, 7, 3) == recipe
        with pytest.raises(ValueError, match="unknown model 'nope'"):
            recipes.fit(Recipe(model="nope"), 7, 3)

    def test_without_images_the_models_defaults_hold(self):
        assert recipes.fit(Recipe()) == Recipe()
        assert recipes.build(Recipe()).classifier.out_features == 10

    def test_the_same_seed_the_same_weights(self):
        one, other = (recipes.build(Recipe(model_args={"widths": [4, 4, 4]}), classes=3) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def parsed(*arguments):
    """The recipe that a command line comes to."""
    given = cli._parse(["train", "--run=x", *arguments])
    return Recipe(**{field.name: given[field.name] for field in dataclasses.fields(Recipe)})


class TestCommandLine:
    def test_schemes_choose_a_recipes_variant_wherever_they_stand(self):
        variant = packaged("imagenet/resnet18", weight="ls-2", activation="ls-1")
        recipe, schemes = ["--recipe", "imagenet/resnet18"], ["--weight=ls-2", "--activation", "ls-1"]
        assert parsed(*recipe, *schemes) == parsed(*schemes, *recipe) == variant
        assert parsed("--recipe=imagenet/resnet18", "--activation=gf-2", *schemes) == variant  # the last one

    def test_options_win_by_their_place(self):
        recipe = parsed(
            "--quant.clamp=9", "--recipe=imagenet/resnet18", "--quant.weight=ls-2", "--activation=ls-1"
        )
        assert recipe.quant.clamp == 2.0  # written before the recipe, which has its own
        assert recipe.quant.weight == "ls-2"
        recipe = parsed("--recipe=imagenet/resnet18", "--quant.clamp=9", "--activation=ls-1", "--lr", "5")
        assert recipe.quant.clamp == 9 and recipe.quant.activation == "ls-1" and recipe.lr == 5
        assert recipe.model_args["nonlinearity"] == "prelu"
        dotted = parsed("--recipe=imagenet/resnet18", "--quant.activation=ls-1")
        assert dotted.quant.clamp == 3.0 and dotted.model_args["nonlinearity"] == "relu"  # that field alone

    def test_float(self):
        recipe = parsed("--recipe=mnist/lenet5", "--weight=fp", "--activation=fp")
        assert recipe == dataclasses.replace(packaged("mnist/lenet5"), quant=None)

    def test_without_a_recipe_they_are_fields(self):
        assert parsed("--weight=ls-2", "--quant.clamp=3").quant == QuantConfig("ls-2", clamp=3.0)
        assert parsed("--activation=ls-1", "--quant=null").quant is None

    def test_files_and_recipes_on_one_line(self, tmp_path):
        mine = write(
            tmp_path, mine="epochs: 3\nmodel_args: {shortcut: single}\nby_activation: {ls-1: {seed: 5}}\n"
        )
        recipe = parsed("--recipe=cifar100/resnet18", f"--config={mine}", "--activation=ls-1")
        assert (recipe.epochs, recipe.seed, recipe.lr) == (3, 5, 2e-4)
        assert recipe.model_args == {"block": "xnor", "shortcut": "single"}

    def test_what_is_printed_is_a_file_again(self, tmp_path, capsys):
        with pytest.raises(SystemExit):
            cli._parse(["train", "--run=x", "--recipe=cifar100/resnet18-distilled", "--print_config"])
        again = write(tmp_path, again=capsys.readouterr().out)
        assert parsed(f"--config={again}") == packaged("cifar100/resnet18-distilled")

    @pytest.mark.parametrize(
        "arguments, said",
        [
            (["--recipe"], "--recipe needs a value"),
            (["--recipe=mnist/lenet5", "--activ=ls-1"], "unknown option --activ; did you mean --activation"),
            (["--recip=mnist/lenet5"], "unknown option --recip; did you mean --recipe"),
            (["--recipe=mnist/lenet5", "--weight=ls-9"], "unknown scheme 'ls-9'"),
            (["--recipe=mnist/lenet5", "--activation=ls-3"], "'ls-3' is not foldable"),
            (["--config=nowhere.yaml"], "nowhere.yaml cannot be read"),
        ],
    )
    def test_mistakes(self, arguments, said):
        with pytest.raises(ValueError, match=said):
            parsed(*arguments)


class TestCatalogue:
    def test_the_table_has_every_recipe_and_the_papers_numbers(self, capsys):
        cli.main(["recipes"])
        said = capsys.readouterr().out
        rows = [line for line in said.splitlines() if re.search(r"\w/\w", line)]
        assert [row.split()[0] for row in rows if row[0] != " "][: len(recipes.names())] == list(
            recipes.names()
        )
        assert re.search(r"imagenet/resnet18-distilled +240 +ls-1/ls-2 +63.4 / 84.6 +- +paper", said)
        assert re.search(r"\n +ls-1/ls-1 +58.9 / 81.4 +- +paper", said)
        assert re.search(r"cifar10/resnet18-teacher +200 +fp/fp +- +- ", said)
        assert re.search(r"fashion-mnist/resnet8-float +2 +fp/fp +- +91.56 ± 0.08 +readme", said)
        for source in ("  paper: Pouransari", "  earlier: ", "  torchvision: ", "  readme: foldbit's README"):
            assert source in said
        assert max(map(len, said.splitlines())) <= 140

    def test_accuracies_belong_to_recipes_and_schemes(self):
        known = catalogue.accuracies()
        assert set(known) <= set(recipes.names())
        for name, rows in known.items():
            for row in rows:
                recipe = packaged(name, weight=row.weight, activation=row.activation)
                assert (recipe.quant is None) == (row.weight == row.activation == "fp"), name
                assert 0 < row.top1 < (row.top5 or 100) <= 100
                assert row.source.ours == (row.source.name == "readme")
        paper = [row for row in known["imagenet/resnet18-distilled"] if row.source.name == "paper"]
        assert {row.activation for row in paper} == {"ls-1", "ls-T", "gf-2", "ls-2", "fp"}

    @pytest.mark.parametrize("schemes", [{}, {"activation": "ls-1"}, {"weight": "fp", "activation": "fp"}])
    def test_a_recipe_is_shown_whole_and_is_a_recipe_again(self, tmp_path, capsys, schemes):
        options = [f"--{what}={scheme}" for what, scheme in schemes.items()]
        cli.main(["recipes", "imagenet/resnet18-distilled", *options])
        said = capsys.readouterr().out
        assert said.startswith(
            "# imagenet/resnet18-distilled: ResNet-18 of XNOR blocks, taught by a float one\n"
        )
        assert set(yaml.safe_load(said)) == {field.name for field in dataclasses.fields(Recipe)}
        expected = packaged("imagenet/resnet18-distilled", **schemes)
        assert recipes.load(write(tmp_path, shown=said)) == expected
        flat = " ".join(said.replace("\n#", " ").split())
        assert "ls-1/ls-2 63.4 / 84.6" in flat and "published, Pouransari" in flat
        if not schemes:
            changes = "model_args.nonlinearity prelu, quant.activation ls-1, quant.clamp 2.0"
            assert f"--activation ls-1 makes it {changes}" in flat
            assert "--activation ls-2" not in flat  # it is that

    @pytest.mark.parametrize(
        "arguments, said",
        [
            (["nope"], "unknown recipe 'nope'"),
            (["mnist/lenet5", "--activation=ls-9"], "unknown scheme 'ls-9'"),
            (["--activation=ls-1"], "go with a recipe: foldbit recipes NAME"),
        ],
    )
    def test_mistakes(self, arguments, said):
        with pytest.raises(SystemExit, match=said):
            cli.main(["recipes", *arguments])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": float("inf")}, "lr must be positive and finite; got inf"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0 and finite; got nan"),
        ({"seed": -1}, "seed is a whole number, from 0 to 4294967295; got -1"),
        ({"seed": 10**20}, "seed is a whole number, from 0 to 4294967295; got 100000000000000000000"),
    ],
)
def test_numbers_out_of_range_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**changes)


def test_the_page_says_what_is_known(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    rows = {}
    for line in page.splitlines():
        if line.startswith("| `"):
            name, epochs, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            rows[name.split("`")[1]] = (int(epochs), cells)
    assert set(rows) == set(recipes.names())
    text = re.findall(r"\d+\.\d+", "".join(line for line in page.splitlines() if not line.startswith("|")))
    for name, (epochs, cells) in rows.items():
        assert epochs == packaged(name).epochs
        known = {str(row).partition(" /")[0]: row for row in catalogue.accuracies().get(name, [])}
        assert {cell for cell in cells if cell} <= set(known)
        assert all(said in cells or said in text or row.weight == "fp" for said, row in known.items())
    half = recipes.load(
        write(tmp_path, half=re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1]), activation="ls-1"
    )
    assert (half.epochs, half.quant.clamp, half.model_args["nonlinearity"]) == (120, 1.5, "prelu")
