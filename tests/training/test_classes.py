"""A run knows its classes, and refuses to be judged by others."""

import json

import pytest
from PIL import Image

from foldbit.training import evaluate, loop, runs
from foldbit.training.recipes import DataConfig, Recipe


def folder_of_images(folder, classes):
    for split, count in (("train", 8), ("test", 2)):
        for shade, name in enumerate(classes):
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (60 * shade, 10 * i, 0)).save(place / f"{i}.png")
    return folder


def recipe_for(folder, **changes):
    data = DataConfig(name="folder", folder=str(folder))
    model = {"widths": [8, 8, 8]}
    return Recipe(model_args=model, data=data, epochs=1, batch_size=8, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    base = tmp_path_factory.mktemp("classes")
    images = folder_of_images(base / "images", ["ant", "bee"])
    habits = loop.Habits(keep_best=True)
    loop.train(recipe_for(images), base / "run", threads=1, habits=habits)
    return base


def test_a_run_holds_the_names_of_its_classes(trained):
    for run in (trained / "run", trained / "run" / "best"):
        assert json.loads((run / "classes.json").read_text()) == ["ant", "bee"]


@pytest.mark.parametrize("classes", [["ant", "cow"], ["bee", "ant", "cow"]])
def test_other_classes_are_refused_where_they_would_be_counted_as_those(trained, tmp_path, classes):
    other = folder_of_images(tmp_path / "other", classes)
    recipe = runs.recipe_of(trained / "run")
    for what, given in ((trained / "run", recipe), (trained / "run" / "packed.safetensors", None)):
        with pytest.raises(runs.RunError, match="was trained on the 2 classes ant, bee; these images have"):
            evaluate.images_for(what, given, folder=other)
    same = evaluate.images_for(trained / "run", recipe, folder=trained / "images")
    assert same.classes == ("ant", "bee")


def test_training_does_not_go_on_with_other_classes(trained):
    extra = trained / "images" / "train" / "ant"
    renamed = extra.with_name("wasp")
    extra.rename(renamed)
    (trained / "images" / "test" / "ant").rename(trained / "images" / "test" / "wasp")
    with pytest.raises(runs.RunError, match="these images have 2: bee, wasp"):
        loop.train(recipe_for(trained / "images"), trained / "run", threads=1)


def test_a_damaged_list_of_classes_is_named(tmp_path):
    (tmp_path / "classes.json").write_text("[")
    with pytest.raises(runs.RunError, match=r"classes\.json is damaged"):
        runs.check_classes(tmp_path, ["ant"])
