"""What users write on the command line and in YAML: shapes, and what is wrong with the rest, in a sentence.

jsonargparse, which reads both, tells a mistake with the whole tree of types that it has tried. The cause is a
line or two of it.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Sequence

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
