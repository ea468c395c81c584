"""What LightningCLI and jsonargparse complain about, in one line.

They print all options of the command, or a traceback, and every type that they have tried. What helps is the argument,
what was given, what is allowed, and a guess.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from textwrap import dedent

from lightning_eff.cli.parser import did_you_mean

_LONGEST = 300
_EXTRAS = {"tensorboard": "tensorboard", "sklearn": "examples", "matplotlib": "plots", "torchft": "ft"}
_OF_TYPES = re.compile(
    r"[ -]*(Does not validate|Subtypes:|Errors:|Expected a <|Given val"
    r"|Not a valid|Subclass types|a class path|a dict with)"
)
_IN_WORDS = {"NoneType": "null", "int": "an integer", "float": "a number", "bool": "true or false", "str": "text"}


def complaint(message: str, args: Sequence[str], names: Sequence[str] = ()) -> str:
    """One line for an error, a sentence or two.

    Args:
        message: jsonargparse's, Lightning's or a constructor's.
        args: the command line.
        names: of the arguments that there are, for a guess.
    """
    if (sentence := refusal(message)) is not None:
        return sentence
    # Within a class that was found: what is wrong with its arguments is told below, further in.
    if found := re.search(r"^( *)(?:- )?Problem with given class_path '([^']+)':\n((?:\1   .*\n?|\n)+)", message, re.M):
        return _within(found[2], dedent(found[3]), args)
    if found := re.search(r"unrecognized arguments: ([^\s=]+)", message):
        return f"there is no argument {_as_given(found[1], args)}.{_guess(found[1], names)}"
    if found := re.search(r"(?:Option|option|Key) '([^']+)'", message):
        return f"there is no argument {_as_given(found[1], args)}.{_guess(found[1], names)}"
    if found := re.search(r"the following arguments are required: ([^\n]+)", message):
        return _missing(found[1].split(", "))
    if found := re.search(r"Parser key \"([^\"]+)\":\s*(.*)", message, re.DOTALL):
        return _not_valid(_as_given(found[1], args), found[2])
    if found := re.search(r"invalid strategy name: `strategy='?([^'`]*)'?`", message):
        return _no_strategy(found[1])
    if found := re.search(r"\b(\w+)\(\) takes no arguments", message):
        return _no_class(found[1])
    return _in_one_line(_without_types(message))


def refusal(message: str) -> str | None:
    """The sentence in which a constructor of ours refuses an argument: it has been said well already."""
    found = re.search(r"\w[\w.\[\]]*=[^\n]* is not allowed: it must be [^\n]*", message)
    return found and found[0]


def _within(path: str, message: str, args: Sequence[str]) -> str:
    try:
        module, _, name = path.rpartition(".")
        cls = getattr(import_module(module), name)
        if inspect.isabstract(cls) or name in ("LightningModule", "LightningDataModule"):
            return _no_class(name)
        return complaint(message, args, list(inspect.signature(cls).parameters))
    except ImportError:
        return f"{path} cannot be imported: {_in_one_line(message)}"
    except (AttributeError, ValueError):  # no such class in the module, or one without a signature
        return f"{path}: {complaint(message, args)}"


def _no_class(base: str) -> str:
    return f"the arguments of a {base} are given, and not its class: name it by class_path."


def _without_types(message: str) -> str:
    """What a constructor says, where jsonargparse lists what each type of the argument has said."""
    if not message.startswith("Does not validate against any"):
        return message
    return "\n".join(line for line in message.splitlines() if not _OF_TYPES.match(line))


def _missing(names: Sequence[str]) -> str:
    names = [f"--{name.split('.', 1)[-1]}" for name in names]
    example = ""
    if "--model" in names:
        example = ", a class such as --model=my_module.MyModel, or a config that says it: --config=run.yaml"
    return f"what is missing is {', '.join(names)}{example}."


def _not_valid(name: str, message: str) -> str:
    """A value that no type of the argument takes."""
    given = re.search(r"(?:Got value|Given value): (.*)", message)
    value = given[1].strip() if given else ""
    if unknown := re.search(r"Expected a dot import path string: (\S+)", message):
        short = sorted({cls.__name__ for base in _types(message) for cls in _subclasses(base)})
        return (
            f"{name}: there is no class {unknown[1]}.{did_you_mean(unknown[1], short)} A class goes by its path, such "
            "as my_module.MyClass, or by a short name: `lightning-eff list`."
        )
    if words := re.findall(r"Literal\[(.*?)\]", message):
        choices = list(dict.fromkeys(word.strip(" '\"") for word in ",".join(words).split(",")))
        return f"{name}={value} is not allowed: it must be one of {', '.join(choices)}.{did_you_mean(value, choices)}"
    if types := re.findall(r"Expected a <class '(\w+)'>", message):
        allowed = " or ".join(dict.fromkeys(_IN_WORDS.get(kind, kind) for kind in types))
        return f"{name}={value} is not allowed: it must be {allowed}."
    return f"{name}: {_in_one_line(message)}"


def _no_strategy(name: str) -> str:
    from lightning.pytorch.strategies import StrategyRegistry

    guess = did_you_mean(name, StrategyRegistry.available_strategies())
    return f"there is no strategy {name!r}.{guess} `lightning-eff list` names the suite's."


def _in_one_line(message: str) -> str:
    text = " ".join(line.strip(" -") for line in message.splitlines() if line.strip())
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    if re.search(r"No module named|cannot be found|Neither", message):
        for module, extra in _EXTRAS.items():
            if re.search(rf"\b{module}\b", message) and "lightning-eff[" not in message:
                return f"{text.rstrip('.')}. It comes with: pip install 'lightning-eff[{extra}]'"
    return text


def _as_given(name: str, args: Sequence[str]) -> str:
    """The argument as it stands on the command line, for jsonargparse may know its last part alone."""
    name = name.removeprefix("--")
    for arg in args:
        option = re.split(r"\+?=", arg)[0].removesuffix("+")
        if arg.startswith("--") and (option == f"--{name}" or option.endswith(f".{name}")):
            return option
    return name


def _guess(name: str, names: Sequence[str]) -> str:
    """By whole paths of options, or by the last parts of both."""
    if guess := did_you_mean(f"--{name.removeprefix('--')}", names):
        return guess
    last = {option.removeprefix("--").rsplit(".", 1)[-1] for option in names}
    return did_you_mean(name.rsplit(".", 1)[-1], sorted(last))


def _types(message: str) -> Iterator[type]:
    """The classes of which the argument takes instances."""
    line = re.search(r"Subtypes: (.*)", message)
    for path in re.findall(r"[\w.]+\.\w+", line[1] if line else ""):
        module, _, name = path.rpartition(".")
        kind = getattr(import_module(module), name, None)
        if inspect.isclass(kind):
            yield kind


def _subclasses(base: type) -> Iterator[type]:
    subclass: type
    for subclass in base.__subclasses__():
        if not subclass.__name__.startswith("_"):
            yield subclass
        yield from _subclasses(subclass)
