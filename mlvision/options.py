"""Options: dataclasses hold the defaults, a YAML says what a run changes, `key=value` overrides both.

A value stays as it is written until its option's type says what it means: an option whose type is text takes the text, on
the command line and in a file alike. Where a group of options is a `Selectable`, at any depth and in lists, its `name`
chooses the dataclass; then every key and type is checked. This file knows none of the choices.
"""

import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeGuard, TypeVar

import yaml

from mlvision.errors import InputError, shown
from mlvision.files import whole_file
from mlvision.text_files import read_text
from mlvision.written import SCALARS, Written, dump_yaml, parse_yaml, parsed, resolve

# A value, and the file or command line that gives it (empty: not known). Of an option's layers the last one counts.
Layer = tuple[Any, str]
_T = TypeVar("_T")


class Mark(Enum):
    """What is true of an option besides its meaning. It stands in the `Annotated` type of an option or of a whole group."""

    INERT = auto()  # changes no result: where things are, how fast they go, what is printed
    EVALUATION = auto()  # evaluation heeds it


INERT, EVALUATION = Mark.INERT, Mark.EVALUATION


@dataclass(frozen=True)
class Selectable:
    """Options of something that is chosen by its name; each kind of it has a base class.

    Attributes:
        choices: the options of each choice, by name. The room that owns the table sets it on the kind's base class.
    """

    name: Annotated[str, "which one"]

    choices: ClassVar[Mapping[str, type["Selectable"]]]


def parse_options(
    cls: type[_T],
    argv: Sequence[str],
    *,
    prog: str,
    description: str | None,
    read: Callable[[Path], dict[Any, Any]] | None = None,
) -> _T:
    """An instance of the dataclass `cls` from `[config.yaml ...] key=value ...`; `--help` prints the options and exits.

    Later arguments win.

    Args:
        read: what reads a YAML; `read_yaml` where not given.

    Raises:
        InputError: naming the key (with the nearest right one), or the file and line.
    """
    print_help(
        argv, lambda: f"usage: {prog} [config.yaml ...] [key=value ...]\n\n{description}\n\n{describe_options(cls)}"
    )
    layers: list[Layer] = []
    for argument in argv:
        if argument.endswith((".yaml", ".yml")) and not is_override(argument):
            values = (read or read_yaml)(Path(argument))
            if "name" in _hints(cls):
                values.setdefault("name", Path(argument).stem)
            layers.append((values, argument))
        else:
            layers.append(_read_override(argument, "a .yaml file or key=value"))
    return _build(cls, layers)


def print_help(argv: Sequence[str], page: Callable[[], str], *, needed: bool = False) -> None:
    """Print the help page and exit, if the arguments ask for it, or are none where some are `needed`."""
    if {"-h", "--help"} & set(argv) or (needed and not argv):
        print(page())
        raise SystemExit(0)


def build_options(cls: type[_T], values: Any, *, key: str = "", source: str = "", overrides: Sequence[str] = ()) -> _T:
    """An instance of `cls` from nested plain data with `key=value` on top, every key and type checked.

    Args:
        key: what the options belong to, for messages, which name them `key.<option>`.
        source: the file that gives the values, for messages.

    Raises:
        InputError: an unknown key, another choice's option, a wrong type, or an override that is no `key=value`.
    """
    return _build(cls, [(values, source), *(_read_override(argument, "key=value") for argument in overrides)], key)


def is_override(argument: str) -> bool:
    """Whether an argument is `key=value`. A path may hold "=" too, as those of tools/sweep.py do, but not behind a key."""
    return re.match(r"[a-z_]\w*(\.[^./=]+)*=", argument, re.ASCII | re.IGNORECASE) is not None


def take_path(argv: Sequence[str], what: str) -> tuple[str, list[str]]:
    """The path that a script's arguments begin with, and the rest of them.

    Raises:
        InputError: there is none; `what` was expected.
    """
    if not argv or (is_override(argv[0]) and not Path(argv[0]).exists()):
        given = shown(argv[0]) if argv else "nothing"
        raise InputError(f"expected {what} first, then key=value, got {given}; --help lists the options")
    return argv[0], list(argv[1:])


def read_yaml(path: Path) -> dict[Any, Any]:
    """A YAML mapping as plain data; its unquoted values stay as they are written, and take their types from the options.

    Raises:
        InputError: no such file, malformed (with line), or not a mapping.
    """
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        raise InputError(f"{path}: no such config file" + (f"; did you mean {path.parent / near[0]}?" if near else ""))
    try:
        values = parse_yaml(read_text(str(path)))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: malformed YAML ({getattr(error, 'problem', None) or error})") from None
    if values is None:  # an empty file
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a mapping of options, got {shown(resolve(values))}")
    return values


def to_plain(options: Any) -> dict[str, Any]:
    """A dataclass of options as nested dicts, lists and scalars, as YAML and JSON hold them."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(options))


def flatten(options: Any, without: Mark | None = None, prefix: str = "") -> dict[str, Any]:
    """The value of every option by its whole key, such as `optim.lr`; those that have the mark `without` are left out."""
    flat: dict[str, Any] = {}
    for name, hint in _hints(type(options)).items():
        value, key = getattr(options, name), prefix + name
        if without in _marks(hint):
            continue
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, without, f"{key}.")
        elif _kind_of_items(hint):
            for number, item in enumerate(value):
                flat |= flatten(item, without, f"{key}.{number}.")
        else:
            flat[key] = value
    return flat


def marked(cls: type, mark: Mark, prefix: str = "") -> Iterator[str]:
    """The whole keys of the options that have a mark, of a group that has it the group's own."""
    for name, hint in _hints(cls).items():
        kind = _bare(hint)
        if mark in _marks(hint):
            yield prefix + name
        elif dataclasses.is_dataclass(kind):
            yield from marked(kind, mark, f"{prefix}{name}.")  # pyright: ignore[reportArgumentType]


def save_options(options: Any, path: Path) -> None:
    """Write a dataclass of options as YAML, every option spelled out.

    Raises:
        InputError: an option that could not be read again, such as a text that holds NUL.
    """
    values = to_plain(options)
    build_options(type(options), values)
    text = dump_yaml(values)
    with whole_file(path) as file:
        file.write(text)


def load_options(cls: type[_T], path: Path) -> _T:
    """Read what `save_options` wrote.

    Raises:
        InputError: the file is missing, malformed, or has keys that `cls` does not know.
    """
    return build_options(cls, read_yaml(path), source=str(path))


def describe_options(cls: type) -> str:
    """One line an option: key, type, default, meaning; every choice of a group that is chosen by name is listed once."""
    return "\n".join(_describe(cls, "", set()))


def _describe(cls: type, prefix: str, listed: set[type], skip: frozenset[str] = frozenset()) -> Iterator[str]:
    hints = _hints(cls)

    def is_group(option: dataclasses.Field) -> bool:
        kind = _bare(hints[option.name])
        return dataclasses.is_dataclass(kind) or _is_selectable(_kind_of_items(kind))

    # Groups last: what followed one would read as a part of it. A subclass's own options come after its base's groups.
    for option in sorted(dataclasses.fields(cls), key=is_group):
        if option.name in skip:
            continue
        hint, key = hints[option.name], prefix + option.name
        kind, items = _bare(hint), _kind_of_items(hint)
        if is_group(option):
            yield ""
        if _is_selectable(kind):
            yield _option_line(f"{key}.name (text, {_default(option).name!r})", f"one of {', '.join(_table(kind))}")
            yield from _describe_choices(kind, f"{key}.", listed)
        elif dataclasses.is_dataclass(kind):
            yield from _describe(kind, f"{key}.", listed)  # pyright: ignore[reportArgumentType]
        else:
            text = next((text for text in _metadata(hint) if isinstance(text, str)), "")
            default = _default(option)
            if _is_selectable(items):
                names = "" if default is dataclasses.MISSING else f", [{', '.join(item.name for item in default)}]"
                yield _option_line(f"{key} (list{names})", f"{text}; each one of {', '.join(_table(items))}")
                yield from _describe_choices(items, f"{key}.0.", listed)
            else:
                default = "" if default is dataclasses.MISSING else f", {default!r}"
                yield _option_line(f"{key} ({_type_name(kind)}{default})", text)


def _describe_choices(kind: type[Selectable], prefix: str, listed: set[type]) -> Iterator[str]:
    if kind in listed:
        yield f"  {prefix}<option>: as above"
        return
    listed.add(kind)
    yield from _describe(kind, prefix, listed, frozenset({"name"}))
    shared = frozenset(option.name for option in dataclasses.fields(kind))
    for name, chosen in _table(kind).items():
        summary = (chosen.__doc__ or "").partition("\n")[0]
        summary = "" if summary.startswith(f"{chosen.__name__}(") else f" {summary}"  # which a dataclass gives itself
        yield f"  with {prefix}name={name}:{summary}"
        yield from (f"  {line}" for line in _describe(chosen, prefix, listed, shared))


def _option_line(option: str, text: str) -> str:
    return f"  {option}".ljust(46) + f"  {text}"


def _default(option: dataclasses.Field) -> Any:
    """The value of an option that nobody gives; MISSING where one has to."""
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()


def _build(cls: type, layers: Sequence[Layer], key: str = "", default: Any = None) -> Any:
    """An instance of `cls`, which is the group `key` of the script's options."""
    layers = _spelled_out(cls, layers)
    if _is_selectable(cls):
        default = _selected(cls, default, layers, key)
    elif default is None:
        default = cls()
    schema = _choose(default, layers, key)
    return _fill(schema, layers, key, list(_keys(schema, f"{key}." if key else "")))


def _choose(schema: Any, layers: Sequence[Layer], key: str) -> Any:
    """`schema` with the dataclasses that the names in it choose, at every depth, and their defaults."""
    chosen, options = {}, _options_of(layers, key)
    for name, hint in _hints(type(schema)).items():
        kind, full = _bare(hint), f"{key}.{name}" if key else name
        if not dataclasses.is_dataclass(kind):
            continue
        group, of_group = getattr(schema, name), _spelled_out(kind, options.get(name, []))
        if _is_selectable(kind):
            group = _selected(kind, group, of_group, full)
        chosen[name] = _choose(group, of_group, full)
    return dataclasses.replace(schema, **chosen)


def _selected(kind: type[Selectable], default: Selectable | None, layers: Sequence[Layer], key: str) -> Selectable:
    """The choice that the layers name, with its defaults, or else the default one."""
    table, option = _table(kind), f"{key}.name" if key else "name"
    names = _options_of(layers, key).get("name")
    if names is None and default is not None:
        return default
    name, source = names[-1] if names else (None, layers[-1][1] if layers else "")
    if not isinstance(name, str) or name not in table:
        given = f"{shown(resolve(name))}{_near(str(name), list(table))}" if names else "nothing"
        raise InputError(f"{option}: expected one of {', '.join(table)}, got {given}{_where(source)}")
    return default if default is not None and type(default) is table[name] else table[name]()  # pyright: ignore[reportCallIssue]


def _spelled_out(kind: Any, layers: Sequence[Layer]) -> Sequence[Layer]:
    """The layers of a group; a name stands for the choice of this name."""
    if not _is_selectable(kind):
        return layers
    return [({"name": value} if isinstance(parsed(value), str) else value, source) for value, source in layers]


def _fill(schema: Any, layers: Sequence[Layer], key: str, known: Sequence[str]) -> Any:
    """`schema` with the options that the layers of the group `key` give.

    Args:
        known: the keys of all options, among which the nearest right one is looked for.
    """
    hints, given, prefix = _hints(type(schema)), {}, f"{key}." if key else ""
    options = _options_of(layers, key)
    for name, of_name in options.items():
        if name not in hints:
            hint = _owner(schema, str(name)) or _suggest(known, schema, f"{prefix}{name}")
            raise InputError(f"{prefix}{name}: no such option{hint}{_where(of_name[-1][1])}")
    for name, of_name in options.items():
        child, items = getattr(schema, name), _kind_of_items(hints[name])
        if dataclasses.is_dataclass(child):
            given[name] = _fill(child, _spelled_out(type(child), of_name), f"{prefix}{name}", known)
        elif items:
            given[name] = _fill_list(items, child, of_name, f"{prefix}{name}")
        else:
            given[name] = _convert(of_name, hints[name], f"{prefix}{name}")
    return dataclasses.replace(schema, **given)


def _fill_list(kind: type, default: Sequence[Any], layers: Sequence[Layer], key: str) -> list[Any]:
    """The groups of a list: those of the last layer that gives the list, with the changes that others make by number."""
    items: list[tuple[Any, list[Layer]]] = [(item, []) for item in default]
    for value, source in layers:
        content = parsed(value)
        if isinstance(content, list | tuple):
            items = [(None, [(item, source)]) for item in content]
        elif isinstance(content, str):  # `x` for `[x]`
            items = [(None, [(content, source)])] if content else []
        elif isinstance(content, dict) and content and all(re.fullmatch("[0-9]{1,9}", str(n)) for n in content):
            for number, changes in content.items():
                if int(number) >= len(items):
                    raise InputError(f"{key}.{number}: no such item, there are {len(items)}{_where(source)}")
                items[int(number)][1].append((changes, source))
        else:
            raise InputError(
                f"{key}: expected a list of groups of options, got {shown(resolve(value))}{_where(source)}"
            )
    return [_build(kind, of_item, f"{key}.{number}", item) for number, (item, of_item) in enumerate(items)]


def _options_of(layers: Sequence[Layer], key: str) -> dict[Any, list[Layer]]:
    """What the layers of the group `key` give for each of its options."""
    if not key:
        return _by_key(layers, "options", "a mapping")
    return _by_key(layers, key, f"a group of options such as {key}.<option>")


def _by_key(layers: Sequence[Layer], key: str, expected: str) -> dict[Any, list[Layer]]:
    """What the layers of a mapping give for each of its keys."""
    result: dict[Any, list[Layer]] = {}
    for value, source in layers:
        mapping = parsed(value)
        if not isinstance(mapping, dict):
            raise InputError(f"{key}: expected {expected}, got {shown(resolve(value))}{_where(source)}")
        for name, inner in mapping.items():
            result.setdefault(name, []).append((inner, source))
    return result


def _convert(layers: Sequence[Layer], hint: Any, key: str) -> Any:
    """One option's value as its type wants it: a dict of what the layers say together, anything else of the last one.

    Raises:
        InputError: it does not fit.
    """
    hint, (value, source) = _bare(hint), layers[-1]
    expected = _type_name(hint)
    if isinstance(hint, types.UnionType):
        if value is None or (isinstance(value, Written) and value in ("", "~", "null")):
            return None
        (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    container, arguments = typing.get_origin(hint), typing.get_args(hint)
    if container is dict:
        return {
            _convert([(name, source)], arguments[0], key): _convert(of_name, arguments[1], f"{key}.{name}")
            for name, of_name in _by_key(layers, key, expected).items()
        }
    if hint is Any:
        return resolve(value)
    items = parsed(value)
    if container in (list, tuple) and isinstance(items, list | tuple):
        kinds = arguments * len(items) if container is list else arguments
        if len(items) == len(kinds):
            places = enumerate(zip(items, kinds, strict=True))
            return container(_convert([(item, source)], kind, f"{key}[{i}]") for i, (item, kind) in places)
    if container is list and isinstance(value, Written) and items is value and arguments[0] in SCALARS:
        return [_convert([(value, source)], arguments[0], f"{key}[0]")] if value else []  # `x` for `[x]`
    converted = SCALARS[hint](value) if hint in SCALARS else None
    if converted is not None:
        return converted
    note = ""
    if hint is str:
        note = "; it holds NUL or what is not UTF-8" if isinstance(value, str) else "; quote it if it is meant as text"
    raise InputError(f"{key}: expected {expected}, got {shown(resolve(value))}{note}{_where(source)}")


def _where(source: str) -> str:
    return f" (in {source})" if source else ""


def _owner(schema: Any, name: str) -> str:
    """Says so where an unknown option is one of another choice of the same table."""
    if not isinstance(schema, Selectable):
        return ""
    owners = [choice for choice, cls in schema.choices.items() if name in _hints(cls)]
    return f" of '{schema.name}': it belongs to '{', '.join(owners)}'" if owners else ""


def _suggest(known: Sequence[str], schema: Any, full: str) -> str:
    """The nearest right key: in the same group, else anywhere in the script's own options."""
    prefix, _, name = full.rpartition(".")
    near = difflib.get_close_matches(name, list(_hints(type(schema))), n=1)
    if near:
        return f"; did you mean {prefix + '.' if prefix else ''}{near[0]}?"
    everywhere = [k for k in known if k.rpartition(".")[2] == name] or list(_not_chosen(schema, full))
    # Keys of this group begin like it, which would make any of them near; and its names were compared above.
    others = [k for k in known if k.rpartition(".")[0] != prefix]
    everywhere = everywhere or difflib.get_close_matches(full, others, n=1)
    if everywhere:
        return f"; did you mean {everywhere[0]}?"
    return f"; expected one of {', '.join(_hints(type(schema))) or 'none'}"


def _not_chosen(schema: Any, full: str) -> Iterator[str]:
    """The option as one of a choice within the same group that was not made."""
    prefix, dot, name = full.rpartition(".")
    for group, hint in _hints(type(schema)).items():
        kind = _bare(hint)
        for choice, cls in _table(kind).items() if _is_selectable(kind) else ():
            if name in _hints(cls):
                yield f"{prefix}{dot}{group}.{name} with {prefix}{dot}{group}={choice}"


def _near(word: str, words: list[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _read_override(argument: str, expected: str) -> Layer:
    if "=" not in argument or argument.startswith("-"):
        raise InputError(f"{shown(argument)}: expected {expected}; --help lists the options")
    key, _, text = argument.partition("=")
    value: Any = Written(text)
    for part in reversed(key.split(".")):
        value = {part: value}
    return value, "the command line"


def _keys(schema: Any, prefix: str) -> Iterator[str]:
    """The whole keys of all options, without the items of lists."""
    for name in _hints(type(schema)):
        child = getattr(schema, name)
        if dataclasses.is_dataclass(child):
            yield from _keys(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """The types of a dataclass's options, with what is annotated."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {option.name: hints[option.name] for option in dataclasses.fields(cls)}


def _bare(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _metadata(hint: Any) -> tuple[Any, ...]:
    return hint.__metadata__ if typing.get_origin(hint) is Annotated else ()


def _marks(hint: Any) -> tuple[Any, ...]:
    return tuple(mark for mark in _metadata(hint) if isinstance(mark, Mark))


def _kind_of_items(hint: Any) -> Any:
    """The dataclass of a list's items, where they are groups of options."""
    bare = _bare(hint)
    items = typing.get_args(bare)[0] if typing.get_origin(bare) is list else None
    return items if dataclasses.is_dataclass(items) else None


def _is_selectable(kind: Any) -> TypeGuard[type[Selectable]]:
    return isinstance(kind, type) and issubclass(kind, Selectable)


def _table(kind: type[Selectable]) -> dict[str, type[Selectable]]:
    """The choices that an option of this type has."""
    return {name: cls for name, cls in kind.choices.items() if issubclass(cls, kind)}


def _type_name(hint: Any) -> str:
    hint = _bare(hint)
    if isinstance(hint, types.UnionType):
        return " or ".join(_type_name(part) for part in typing.get_args(hint))
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return f"[{', '.join(_type_name(part) for part in arguments)}]"
    if arguments:
        return f"{hint.__origin__.__name__} of {' to '.join(_type_name(a) for a in arguments)}"
    return {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )
