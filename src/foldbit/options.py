"""What users write on the command line and in YAML: shapes, and what is wrong with the rest, in a sentence.

jsonargparse, which reads both, tells a mistake with the whole tree of types that it has tried. The cause is a
line or two of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

#: Characters of a YAML document, values that it names again counted again.
LONGEST = 200_000
_DEEPEST = 50
#: What parsers raise for a mistake; the last two come out of YAML in an argument, such as "!!int ''".
MISTAKES = (argparse.ArgumentError, ValueError, TypeError, LookupError, ArithmeticError)
#: Of torch: with very many, OpenMP ends the process.
MOST_THREADS = 1024

_KEY = re.compile(r'(?:Parser key|Configuration key) "(.+?)":? ?(.*)')
_UNKNOWN = re.compile(
    r"(?:Option|Key|Subcommand '.+?' does not accept option) '(.+?)'(?: is not accepted.*)?"
)
_UNRECOGNIZED = re.compile(r"unrecognized arguments?: (\S+).*")
_REQUIRED = re.compile(r"the following arguments are required: (.+)")
_EXPECTED = re.compile(r"Expected an? (.+?)(?:\. Got value: (.*))?")
_GIVEN = re.compile(r"Given value: (.*)")
_FRAME = re.compile(r"Does not validate .*|Subtypes: .*|Errors:|Given value.*|Problem with given .*|")


def shape(given: str | Sequence[int]) -> tuple[int, ...]:
    """A shape, as it is written: ``1,3,32,32``, with or without brackets; or as a sequence of numbers.

    Raises:
        ValueError: for anything else.
    """
    parts = given.strip("[]() ").split(",") if isinstance(given, str) else given
    try:
        sizes = tuple(int(part) for part in parts)
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise ValueError(f"a shape is positive whole numbers, such as 1,3,32,32; got {given!r}")
    return sizes


def check_threads(count: int | None) -> None:
    """Refuse a number of torch's threads that cannot be.

    Raises:
        ValueError: for it. None stands for as many as are sensible.
    """
    if count is not None and not 1 <= count <= MOST_THREADS:
        raise ValueError(f"threads is a whole number, from 1 to {MOST_THREADS}; got {count}")


def check_seed(seed: int) -> None:
    """Refuse a seed that random number generators would.

    Raises:
        ValueError: for it.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is a whole number, from 0 to {2**32 - 1}; got {seed}")


def is_unicode(path: str) -> bool:
    """Whether a file's name, which may be any bytes, is one that YAML and other libraries can hold."""
    return not any("\ud800" <= c <= "\udfff" for c in path)


def parser(**settings: Any) -> ArgumentParser:
    """A parser of jsonargparse's that raises mistakes, and reads all YAML by :func:`from_yaml`."""
    import yaml
    from jsonargparse import ArgumentParser, set_loader

    set_loader("foldbit", from_yaml, (yaml.YAMLError,))  # a mode of its own: other parsers stay as they are
    return ArgumentParser(exit_on_error=False, parser_mode="foldbit", **settings)


def from_yaml(text: str) -> Any:
    """What a YAML document holds: text, numbers, lists and mappings, in a size that anybody would write.

    Raises:
        yaml.YAMLError: where it is no YAML, or has values of other kinds; where it is deep, or long once its
            aliases are written out: in a few lines they can stand for a thousand million values.
    """
    import yaml
    from jsonargparse import get_loader

    try:
        _check_extent(text)
        return get_loader("yaml")(text)  # jsonargparse's, which knows that 2e-4 is a number
    except (ValueError, LookupError, ArithmeticError) as error:  # PyYAML lets them out, as of "!!int x"
        raise yaml.YAMLError(f"a value cannot be read ({error}); put text into quotes") from error


def _check_extent(text: str) -> None:
    """Refuse YAML that is long, with its aliases written out, or deep, or has values of other kinds."""
    import yaml

    if len(text) > LONGEST:
        raise yaml.YAMLError(f"more than {LONGEST:,} characters")
    size = 0.0
    named: dict[str | None, float] = {}  # sizes of what has a name
    around: list[tuple[str | None, float]] = []  # the name of what is open, and the size before it
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        assert event.start_mark is not None
        where = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.CollectionStartEvent | yaml.ScalarEvent) and event.tag not in _TAGS:
            kind = str(event.tag).replace("tag:yaml.org,2002:", "!!")
            raise yaml.YAMLError(f"{where}: expected text, numbers, lists and mappings; got {kind}")
        if isinstance(event, yaml.CollectionStartEvent):
            around.append((event.anchor, size))
            named[event.anchor] = math.inf  # should it name itself
            size += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            name, before = around.pop()
            named[name] = size - before
        elif isinstance(event, yaml.ScalarEvent):
            named[event.anchor] = 1 + len(event.value)
            size += 1 + len(event.value)
        elif isinstance(event, yaml.AliasEvent):
            size += named.get(event.anchor, 0)  # an unknown one is the loader's to tell
        if size > LONGEST:
            raise yaml.YAMLError(f"{where}: more than {LONGEST:,} characters, aliases written out")
        if len(around) > _DEEPEST:
            raise yaml.YAMLError(f"{where}: more than {_DEEPEST} levels deep")


_KINDS = ("str", "int", "float", "bool", "null", "seq", "map")
_TAGS = (None, "!", *(f"tag:yaml.org,2002:{kind}" for kind in _KINDS))


def fields_of(record: type) -> list[str]:
    """The names of a dataclass's fields, and of the dataclasses' in it: ``quant``, ``quant.weight``."""
    names = []
    hints = typing.get_type_hints(record)
    for field in dataclasses.fields(record):
        names.append(field.name)
        for inner in (hints[field.name], *typing.get_args(hints[field.name])):
            if dataclasses.is_dataclass(inner) and isinstance(inner, type):
                names += [f"{field.name}.{name}" for name in fields_of(inner)]
    return names


def explain(message: str, known: Iterable[str] = ()) -> str:
    """What is wrong, in one sentence, of what jsonargparse says is wrong.

    Args:
        message: its message.
        known: every option there is, without dashes: an unknown one is told the nearest of them.
    """
    known = list(known)
    keys: list[str] = []
    causes: list[str] = []
    expected: list[str] = []
    given = None
    for line in message.splitlines():
        line = line.strip().removeprefix("- ")
        if key := _KEY.fullmatch(line):
            if key[1] not in keys:
                keys.append(key[1])
            line = key[2]
        if unknown := _UNKNOWN.fullmatch(line):
            return _unknown(".".join([*keys, unknown[1]]), known)
        if unrecognized := _UNRECOGNIZED.fullmatch(line):
            argument = unrecognized[1]
            name = argument.lstrip("-").partition("=")[0]
            return (
                _unknown(name, known)
                if argument.startswith("-")
                else f"{argument!r} is one argument too many"
            )
        if required := _REQUIRED.fullmatch(line):
            return _required(required[1], known)
        if kind := _EXPECTED.fullmatch(line):
            expected.append(_kind(kind[1]))
            given = kind[2] if given is None else given
        elif value := _GIVEN.fullmatch(line):
            given = value[1] if given is None else given  # the innermost comes first
        elif not _FRAME.fullmatch(line):
            causes.append(line)
    where = f"--{'.'.join(keys)}: " if keys else ""
    group = [name for name in known if keys and name.startswith(f"{'.'.join(keys)}.")]
    if group:  # it takes fields, not a value
        return (
            f"{where}expected its fields, such as --{group[0]}, or null; got {given or message.split()[-1]}"
        )
    if causes:
        return where + "; ".join(causes)
    kinds = [kind for kind in dict.fromkeys(expected) if kind != "None"]
    return f"{where}expected {' or '.join(kinds) or 'another value'}; got {given}"


def _unknown(name: str, known: Sequence[str]) -> str:
    """That there is no such option, and which one may be meant."""
    group, _, last = name.rpartition(".")
    beside = {n.rpartition(".")[2]: n for n in known if n.rpartition(".")[0] == group}
    near = difflib.get_close_matches(last, beside, n=1)
    if near:
        return f"unknown option --{name}; did you mean --{beside[near[0]]}?"
    if group and beside:
        return f"unknown option --{name}; {group} has {', '.join(beside)}"
    return f"unknown option --{name}"


def _required(names: str, known: Sequence[str]) -> str:
    """Which arguments are missing, as a user writes them."""
    written = []
    for name in names.split(", "):
        own = name.partition(".")[2] or name  # jsonargparse puts the command's name before
        written.append(f"--{own}" if own in known else own.upper())
    return f"{' and '.join(written)} {'is' if len(written) == 1 else 'are'} required"


def _kind(hint: str) -> str:
    """A type hint for people."""
    if literal := re.fullmatch(r"typing\.Literal\[(.*)\]", hint):
        return "one of " + literal[1].replace("'", "")
    name = re.sub(r"<class '(?:.*\.)?(\w+)'>", r"\1", hint)
    plain = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    return plain.get(name, {"NoneType": "None", "list": "a list", "dict": "a mapping"}.get(name, name))
