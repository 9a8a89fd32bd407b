"""What users write, and what they are told is wrong with it."""

from dataclasses import dataclass, field

import jsonargparse
import pytest
import yaml

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


def bomb(levels=9):
    """A few hundred characters that stand for 9**9 values."""
    lines = [f"a0: &a0 [{','.join('x' * 9)}]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb(), "line 6: more than 200,000 characters, aliases written out"),
        ("a: &a {b: *a}", "line 1: more than"),
        (f"a: &a {'x' * 1000}\nb: [{'*a,' * 300}]", "line 2: more than"),
        ("a: " + "[" * 60 + "]" * 60, "line 1: more than 50 levels deep"),
        ("a: 1\nb: !!set {x}", "line 2: expected text, numbers, lists and mappings; got !!set"),
        ("a: 1\nb: !!binary aGk=", "got !!binary"),
        ("a: !mine 3", "got !mine"),
        ("a: *nobody", "undefined alias"),
        ("a: !!bool q", r"a value cannot be read \('q'\); put text into quotes"),
        ("a: !!int ''", "cannot be read .string index out of range"),
        ("a: !!int abc", "cannot be read .invalid literal"),
        ("a: 0b_", "cannot be read .invalid literal"),
        ("a: !!float ''", "cannot be read"),
        (f"a: {':'.join(['59'] * 200)}.5", "cannot be read .*too large"),
        (f"a: {'9' * 5000}", "cannot be read"),
        ("a: \udcff", "cannot be read|not allowed"),
    ],
)
def test_yaml_that_nobody_would_write_is_refused(text, message):
    with pytest.raises(yaml.YAMLError, match=message):
        options.from_yaml(text)


def test_yaml_with_names_and_tags_of_its_own_kinds_is_read():
    text = "a: &a {lr: 2e-4, l: [1, null, true]}\nb: {<<: *a, n: !!str 3, q: '4'}"
    assert options.from_yaml(text)["b"] == {"lr": 2e-4, "l": [1, None, True], "n": "3", "q": "4"}
    assert options.from_yaml("") is None and options.from_yaml("x") == "x"


def test_parsers_read_their_files_so_and_leave_other_parsers_alone(tmp_path):
    (tmp_path / "bomb.yaml").write_text(bomb())
    parser = options.parser()
    parser.add_argument("--config", action=jsonargparse.ActionConfigFile)
    parser.add_argument("--a", type=dict)
    for given in (f"--config={tmp_path / 'bomb.yaml'}", "--a={" + bomb().replace("\n", ", ") + "}"):
        with pytest.raises((jsonargparse.ArgumentError, ValueError), match=r"aliases written|Expected a"):
            parser.parse_args([given])
    theirs = jsonargparse.ArgumentParser(exit_on_error=False)
    assert theirs.parser_mode == "yaml" and jsonargparse.get_loader("yaml") is not options.from_yaml


@pytest.mark.parametrize("count", [0, -3, 1025, 10**8])
def test_numbers_of_threads_in_range(count):
    options.check_threads(None)
    options.check_threads(1)
    with pytest.raises(ValueError, match=f"threads is a whole number, from 1 to 1024; got {count}"):
        options.check_threads(count)


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
