"""What users write, and what they are told is wrong with it."""

from dataclasses import dataclass, field

import jsonargparse
import pytest

from foldbit import options


@dataclass(frozen=True)
class Inner:
    """A group of options.

    Attributes:
        weight: a scheme.
        clamp: a number or none.
    """

    weight: str = "ls-1"
    clamp: float | None = None

    def __post_init__(self):
        if not self.weight.startswith("ls-"):
            raise ValueError(f"unknown scheme {self.weight!r}; known are ls-1")


@dataclass(frozen=True)
class Outer:
    """Options.

    Attributes:
        quant: a group or none.
        data: a group.
        epochs: how many.
        sizes: some.
    """

    quant: Inner | None = None
    data: Inner = field(default_factory=Inner)
    epochs: int = 1
    sizes: list[int] | None = None


def said(*arguments):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=jsonargparse.ActionConfigFile)
    parser.add_argument("--run", required=True)
    parser.add_class_arguments(Outer)
    with pytest.raises((jsonargparse.ArgumentError, ValueError)) as caught:
        parser.instantiate(parser.parse_args(list(arguments)))
    return options.explain(str(caught.value), ["config", "run", *options.fields_of(Outer)])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--quant.weight=x"], "unknown scheme 'x'; known are ls-1"),
        (["--quant.weigth=x"], "unknown option --quant.weigth; did you mean --quant.weight?"),
        (["--quant.bogus=x"], "unknown option --quant.bogus; quant has weight, clamp"),
        (["--quant.clamp=x"], "--quant.clamp: expected a number; got x"),
        (["--data.clamp=x"], "--data.clamp: expected a number; got x"),
        (["--epochs=many"], "--epochs: expected a whole number; got many"),
        (["--sizes=1,2"], "--sizes: expected a list; got 1,2"),
        (["--quant=3"], "--quant: expected its fields, such as --quant.weight, or null; got 3"),
        (["--laerning", "3"], "unknown option --laerning"),
        (["--epcohs=3"], "unknown option --epcohs; did you mean --epochs?"),
        (["spare"], "'spare' is one argument too many"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, sentence):
    assert said("--run=r", *arguments) == sentence


def test_a_missing_argument_is_named_as_it_is_written():
    assert said() == "--run is required"
    assert options.explain("the following arguments are required: evaluate.what") == "WHAT is required"


@pytest.mark.parametrize(
    ("yaml", "sentence"),
    [
        ("quant: {wieght: ls-1}", "unknown option --quant.wieght; did you mean --quant.weight?"),
        ("epoch: 3", "unknown option --epoch; did you mean --epochs?"),
        ("epochs: many", "--epochs: expected a whole number; got many"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence(tmp_path, yaml, sentence):
    (tmp_path / "x.yaml").write_text(yaml)
    assert said("--run=r", f"--config={tmp_path / 'x.yaml'}") == sentence


def test_what_it_does_not_know_it_passes_on():
    assert options.explain("the moon is full") == "the moon is full"


def test_fields_of_records_in_records():
    assert options.fields_of(Outer) == [
        "quant", "quant.weight", "quant.clamp", "data", "data.weight", "data.clamp", "epochs", "sizes",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "given", ["1,3,32,32", "[1,3,32,32]", "[1, 3, 32, 32]", [1, 3, 32, 32], (1, 3, 32, 32)]
)
def test_shapes(given):
    assert options.shape(given) == (1, 3, 32, 32)


@pytest.mark.parametrize("given", ["", "1,a", "1,,2", "0,3", "-1,3", "1.5,2", [], "[]"])
def test_what_is_no_shape(given):
    with pytest.raises(ValueError, match="such as 1,3,32,32; got"):
        options.shape(given)
