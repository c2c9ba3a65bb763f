"""Configuration: dataclasses hold the defaults, a YAML says what a run changes, `key=value` overrides both.

A value stays as it is written until its option's type says what it means: an option whose type is text takes the text, on
the command line and in a file alike. `data.name`, `head.name` and `method.name` choose their dataclasses from the tables;
then every key and type is checked.
"""

import dataclasses
import difflib
import functools
import io
import logging
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import yaml

from mlvision.data import DATASETS
from mlvision.data.loader import LoaderConfig
from mlvision.data.manifest import DataConfig
from mlvision.data.text_files import read_text
from mlvision.data.transforms import ViewConfig
from mlvision.engine import distributed
from mlvision.engine.checkpoint import CheckpointConfig
from mlvision.engine.distributed import DdpConfig
from mlvision.engine.log import LogConfig
from mlvision.engine.optim import EmaConfig, OptimConfig
from mlvision.engine.precision import MOST_THREADS
from mlvision.errors import InputError, check_fields, describe_os_error, first_line, shown
from mlvision.files import whole_file
from mlvision.methods import METHODS, MethodConfig
from mlvision.models import HEADS, BackboneConfig, HeadConfig

TABLES: dict[type, dict[str, tuple]] = {DataConfig: DATASETS, HeadConfig: HEADS, MethodConfig: METHODS}
_DEFAULT_CHOICE = {DataConfig: "coco", HeadConfig: "linear", MethodConfig: "baseline"}

# A value, and the file or command line that gives it (empty: not known). Of an option's layers the last one counts.
Layer = tuple[Any, str]


@dataclass(frozen=True)
class Config:
    """All options of a training run."""

    name: Annotated[str, "name of the configuration; empty: the YAML's file name"] = ""
    out: Annotated[str, "run folder; empty: runs/<name>-<date>, or with resume=auto the newest equal run"] = ""
    resume: Annotated[str, "auto: go on from the last checkpoint where there is one; empty: a new run"] = ""
    seed: Annotated[int, "seed of weights, order and views"] = 0
    device: Annotated[
        str, "auto (GPU where there is one), cpu, cuda or cuda:<number>; under torchrun each process has its own GPU"
    ] = "auto"
    precision: Annotated[str, "auto (fp32 on a CPU, bf16 or fp16 on a GPU), fp32, bf16 or fp16"] = "auto"
    threads: Annotated[int, "CPU threads of torch; 0: torch's own choice"] = 0
    deterministic: Annotated[
        bool, "torch's deterministic algorithms alone: slower on a GPU, and an error where an operation has none"
    ] = False
    compile: Annotated[str, "backend of torch.compile for the backbone in training, such as inductor; empty: none"] = ""
    label_maps: Annotated[str, "store of the training images' label maps, made by tools/make_label_maps.py"] = ""
    bootstrap: Annotated[int, "eval.py: resamplings of the images for a 95 % interval of mAP; 0: none"] = 0
    data: DataConfig = field(default_factory=lambda: _default(DataConfig))
    view: ViewConfig = field(default_factory=ViewConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    model: BackboneConfig = field(default_factory=BackboneConfig)
    head: HeadConfig = field(default_factory=lambda: _default(HeadConfig))
    method: MethodConfig = field(default_factory=lambda: _default(MethodConfig))
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    ddp: DdpConfig = field(default_factory=DdpConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        rules = (
            ("name", is_file_name(self.name), "a name for a folder, without / and other than . and .."),
            ("resume", self.resume in ("", "auto"), "auto or nothing; out= names the folder"),
            ("seed", self.seed >= 0, "0 or more"),
            ("threads", 0 <= self.threads <= MOST_THREADS, f"0 (torch's own choice) to {MOST_THREADS}"),
            ("bootstrap", self.bootstrap == 0 or 2 <= self.bootstrap <= 1_000_000, "0, or 2 to a million resamplings"),
        )
        check_fields(self, "", rules)


def is_file_name(name: str) -> bool:
    """Whether a name, which may be empty, names a file or folder in another folder and nothing outside it."""
    return "/" not in name and name not in (".", "..")


def _default(base: type) -> Any:
    return TABLES[base][_DEFAULT_CHOICE[base]][0]()


def parse_options(cls: type, argv: list[str], *, prog: str, description: str | None) -> Any:
    """An instance of the dataclass `cls` from `[config.yaml ...] key=value ...`; `--help` prints the options and exits.

    Later arguments win. A run's YAML serves every script: of a Config's options, those that `cls` does not have are passed
    over. A field whose type is a base class of `TABLES` takes the dataclass that its `name` chooses.

    Raises:
        InputError: naming the key (with the nearest right one), or the file and line.
    """
    if any(argument in ("-h", "--help") for argument in argv):
        print(f"usage: {prog} [config.yaml ...] [key=value ...]\n\n{description}\n\n{describe_options(cls)}")
        raise SystemExit(0)
    layers: list[Layer] = []
    for argument in argv:
        if argument.endswith((".yaml", ".yml")) and not is_override(argument):
            part = read_yaml(Path(argument))
            known, known_to_runs = ({f.name for f in dataclasses.fields(c)} for c in (cls, Config))
            part = {key: value for key, value in part.items() if key in known or key not in known_to_runs}
            if "name" in known:
                part.setdefault("name", Path(argument).stem)
            layers.append((part, argument))
        else:
            layers.append(_read_override(argument, "a .yaml file or key=value"))
    return _build(cls, layers)


def build_options(cls: type, values: Any, *, source: str = "", overrides: Sequence[str] = ()) -> Any:
    """An instance of `cls` from nested plain data with `key=value` on top, every key and type checked.

    Args:
        source: the file that gives the values, for messages.

    Raises:
        InputError: an unknown key, another choice's option, a wrong type, or an override that is no `key=value`.
    """
    return _build(cls, [(values, source), *(_read_override(argument, "key=value") for argument in overrides)])


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
        values = _parse_yaml(read_text(str(path)))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: malformed YAML ({getattr(error, 'problem', None) or error})") from None
    if values is None:  # an empty file
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a mapping of options, got {shown(_resolve(values))}")
    return values


def to_plain(config: Any) -> dict[str, Any]:
    """A config dataclass as nested dicts, lists and scalars, as YAML and JSON hold them."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(config))


def save_options(config: Any, path: Path) -> None:
    """Write a config dataclass as YAML, every option spelled out.

    Raises:
        InputError: an option that could not be read again, such as a text that holds NUL.
    """
    values = to_plain(config)
    build_options(type(config), values)
    text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    with whole_file(path) as file:
        file.write(text)


def load_options(cls: type, path: Path) -> Any:
    """Read what `save_options` wrote.

    Raises:
        InputError: the file is missing, malformed, or has keys that `cls` does not know.
    """
    return build_options(cls, read_yaml(path), source=str(path))


_NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # torch has no class of errors for it


def run_command(main: Callable[[list[str]], Any], *, several_processes: bool = False) -> NoReturn:
    """Run a script's `main(argv)`: a user's mistake becomes one line on stderr and exit code 2, never a traceback.

    An integer that `main` returns is the exit code. What the package logs (which weights were loaded, say) goes to stderr.
    Under torchrun, rank 0 prints the errors of all; another rank prints only its own. A script that
    does not share its work among them (`several_processes`) refuses them: each would do all of it and write the same files.
    """
    for stream in (sys.stdout, sys.stderr):  # names of files may hold bytes that are no text, which print refuses
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with distributed.session():
        logging.basicConfig(format="%(message)s")
        logging.getLogger("mlvision").setLevel(logging.INFO if distributed.is_main() else logging.CRITICAL)
        alone = several_processes or distributed.world_size() == 1
        raise SystemExit(_run(main if alone else _refuse_several))


def _refuse_several(_argv: list[str]) -> NoReturn:
    error = InputError(f"{Path(sys.argv[0]).name} runs in one process: expected python, not torchrun with several")
    error.on_every_rank = True
    raise error


def _run(main: Callable[[list[str]], Any]) -> int:
    try:
        result = main(sys.argv[1:])
        code = result if isinstance(result, int) else 0
    except InputError as error:
        if distributed.is_main() or not error.on_every_rank:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        if not error.on_every_rank:
            raise SystemExit(2) from error  # the others may wait for this rank: torchrun ends them
        distributed.wait_for_all()  # once one process ends, torchrun ends the others: not before rank 0 has spoken
        code = 2
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {describe_os_error(error)}", file=sys.stderr)
        raise SystemExit(2) from error
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or _NO_MEMORY in str(error)):
            raise
        print(f"error: memory ran out; smaller batches or images take less ({first_line(error)})", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        if distributed.is_main():
            print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    return code


def describe_options(cls: type) -> str:
    """One line an option: key, type, default, meaning; every choice of a table is listed."""
    return "\n".join(_describe(cls, ""))


def _describe(cls: type, prefix: str, skip: frozenset[str] = frozenset()) -> Iterator[str]:
    hints = _hints(cls)
    # Groups last: what followed one would read as a part of it. A subclass's own options come after its base's groups.
    for option in sorted(dataclasses.fields(cls), key=lambda one: dataclasses.is_dataclass(_bare(hints[one.name]))):
        if option.name in skip:
            continue
        kind = _bare(hints[option.name])
        key = prefix + option.name
        if kind in TABLES:
            yield ""
            yield _option_line(f"{key}.name (text, {_DEFAULT_CHOICE[kind]!r})", f"one of {', '.join(TABLES[kind])}")
            yield from _describe(kind, f"{key}.", frozenset({"name"}))
            shared = frozenset(f.name for f in dataclasses.fields(kind))
            for choice, (chosen, *_) in TABLES[kind].items():
                yield f"  with {key}.name={choice}:"
                yield from (f"  {line}" for line in _describe(chosen, f"{key}.", shared))
        elif dataclasses.is_dataclass(kind):
            yield ""
            yield from _describe(kind, f"{key}.")  # pyright: ignore[reportArgumentType]
        else:
            text = hints[option.name].__metadata__[0] if typing.get_origin(hints[option.name]) is Annotated else ""
            yield _option_line(f"{key} ({_type_name(kind)}{_default_text(option)})", text)


def _option_line(option: str, text: str) -> str:
    return f"  {option}".ljust(46) + f"  {text}"


def _default_text(option: dataclasses.Field) -> str:
    if option.default is not dataclasses.MISSING:
        return f", {option.default!r}"
    if option.default_factory is not dataclasses.MISSING:
        return f", {option.default_factory()!r}"
    return ""


def _build(cls: type, layers: Sequence[Layer]) -> Any:
    schema = _choose(cls, _by_key(layers, "options", "a mapping"))
    return _fill(schema, layers, "", schema)


def _choose(cls: type, options: dict[Any, list[Layer]]) -> Any:
    """An instance of `cls` with defaults, in which each table's field holds the dataclass that its `name` chooses."""
    chosen = {}
    for option, hint in _hints(cls).items():
        table = TABLES.get(_bare(hint))
        if table is None:
            continue
        names = _by_key(options.get(option, []), option, _group(option)).get("name")
        name, source = names[-1] if names else (_DEFAULT_CHOICE[_bare(hint)], "")
        if not isinstance(name, str) or name not in table:
            given, near = shown(_resolve(name)), _near(str(name), list(table))
            raise InputError(f"{option}.name: expected one of {', '.join(table)}, got {given}{near}{_where(source)}")
        chosen[option] = table[name][0]()
    return cls(**chosen)


def _fill(schema: Any, layers: Sequence[Layer], key: str, root: Any) -> Any:
    """`schema` with the options that the layers of the group `key` give.

    Args:
        root: all options of the script, among which the nearest right one is looked for.
    """
    hints, given, prefix = _hints(type(schema)), {}, f"{key}." if key else ""
    options = _by_key(layers, key, _group(key))
    for name, of_name in options.items():
        if name not in hints:
            hint = f"{_owner(schema, str(name))}{_suggest(root, schema, f'{prefix}{name}')}"
            raise InputError(f"{prefix}{name}: no such option{hint}{_where(of_name[-1][1])}")
    for name, of_name in options.items():
        child = getattr(schema, name)
        if dataclasses.is_dataclass(child):
            given[name] = _fill(child, of_name, f"{prefix}{name}", root)
        else:
            given[name] = _convert(of_name, hints[name], f"{prefix}{name}")
    return dataclasses.replace(schema, **given)


def _by_key(layers: Sequence[Layer], key: str, expected: str) -> dict[Any, list[Layer]]:
    """What the layers of a mapping say of each of its keys."""
    result: dict[Any, list[Layer]] = {}
    for value, source in layers:
        mapping = _parsed(value)
        if not isinstance(mapping, dict):
            raise InputError(f"{key}: expected {expected}, got {shown(_resolve(value))}{_where(source)}")
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
        if value is None or (isinstance(value, _Written) and value in ("", "~", "null")):
            return None
        (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    container, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        schema = hint()  # pyright: ignore[reportCallIssue]
        return _fill(schema, layers, key, schema)
    if container is dict:
        return {
            _convert([(name, source)], arguments[0], key): _convert(of_name, arguments[1], f"{key}.{name}")
            for name, of_name in _by_key(layers, key, expected).items()
        }
    if hint is Any:
        return _resolve(value)
    items = _parsed(value)
    if container in (list, tuple) and isinstance(items, list | tuple):
        kinds = arguments * len(items) if container is list else arguments
        if len(items) == len(kinds):
            places = enumerate(zip(items, kinds, strict=True))
            return container(_convert([(item, source)], kind, f"{key}[{i}]") for i, (item, kind) in places)
    if container is list and isinstance(value, _Written) and items is value and arguments[0] in _SCALARS:
        return [_convert([(value, source)], arguments[0], f"{key}[0]")] if value else []  # `x` for `[x]`
    converted = _SCALARS[hint](value) if hint in _SCALARS else None
    if converted is not None:
        return converted
    note = ""
    if hint is str:
        note = "; it holds NUL or what is not UTF-8" if isinstance(value, str) else "; quote it if it is meant as text"
    raise InputError(f"{key}: expected {expected}, got {shown(_resolve(value))}{note}{_where(source)}")


def _group(key: str) -> str:
    return f"a group of options such as {key}.<option>"


def _where(source: str) -> str:
    return f" (in {source})" if source else ""


class _Written(str):
    """A value as it is typed on the command line or stands unquoted in a file: its option's type says what it means."""


class _Loader(yaml.SafeLoader):
    """YAML whose unquoted values are `_Written`, but for null; tags, and keys that stand twice, are refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """YAML in which every text can be read again: within single quotes some line breaks would become others."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar(_TEXT, data, style=None if data.isprintable() else '"')


_NULL, _MERGE, _TEXT, _LIST, _MAPPING = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "merge", "str", "seq", "map"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in (_NULL, _MERGE)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.yaml_constructors = {
    **{tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (_NULL, _LIST, _MAPPING, None)},
    _TEXT: lambda _, node: node.value if node.style else _Written(node.value),
}
_Dumper.add_representer(str, _Dumper.represent_str)
_MOST_VALUES = 1_000_000  # of one YAML: aliases of aliases make more than memory holds out of a few lines


def _parse_yaml(text: str) -> Any:
    """What a YAML holds.

    Raises:
        YAMLError: malformed, nested too deeply, or larger than anyone writes.
    """
    try:
        content = yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    waiting, count = [content], 0
    while waiting:
        value, count = waiting.pop(), count + 1
        if count > _MOST_VALUES:
            raise yaml.YAMLError(f"more than {_MOST_VALUES:,} values, or an alias that holds itself")
        waiting += (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()
    return content


def _parsed(value: Any) -> Any:
    """The list or mapping that a text from the command line writes, such as `[a, b]`; anything else as it is."""
    if not isinstance(value, _Written) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return _parse_yaml(value)
    except yaml.YAMLError:
        return value


def _resolve(value: Any) -> Any:
    """A value whose option takes anything, or that a message shows: what it looks like."""
    value = _parsed(value)
    if isinstance(value, dict):
        return {_resolve(key): _resolve(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolve(inner) for inner in value]
    if not isinstance(value, _Written):
        return value
    if value in ("~", "null"):
        return None
    if value in ("true", "false"):
        return value == "true"
    numbers = (convert(value) for convert in (_whole_number, _number))
    return next((number for number in numbers if number is not None), str(value))


def _text(value: Any) -> str | None:
    return str(value) if isinstance(value, str) and not re.search("[\\0\\ud800-\\udfff]", value) else None


def _switch(value: Any) -> bool | None:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    return words.get(value.lower()) if isinstance(value, str) else value if isinstance(value, bool) else None


def _whole_number(value: Any) -> int | None:
    if isinstance(value, str):  # no option takes a number of a hundred digits
        return int(value) if len(value) < 100 and re.fullmatch("[+-]?[0-9]+(_[0-9]+)*", value) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        return None


# What a value is as text, switch or number; None if it is none.
_SCALARS: dict[Any, Callable[[Any], Any]] = {str: _text, bool: _switch, int: _whole_number, float: _number}


def _owner(schema: Any, key: str) -> str:
    """Says so where an unknown key is an option of another choice of the same table."""
    for base, table in TABLES.items():
        if isinstance(schema, base):
            owners = [name for name, (cls, *_) in table.items() if key in {f.name for f in dataclasses.fields(cls)}]
            if owners:
                return f" of '{schema.name}': it belongs to '{', '.join(owners)}'"
    return ""


def _suggest(root: Any, schema: Any, full: str) -> str:
    """The nearest right key: in the same group, else anywhere in the script's own options."""
    prefix, _, key = full.rpartition(".")
    here = [option.name for option in dataclasses.fields(schema)]
    near = difflib.get_close_matches(key, here, n=1)
    if near:
        return f"; did you mean {prefix + '.' if prefix else ''}{near[0]}?"
    others = list(_schema_keys(root))
    everywhere = [k for k in others if k.rpartition(".")[2] == key] or difflib.get_close_matches(full, others, n=1)
    return f"; did you mean {everywhere[0]}?" if everywhere else f"; expected one of {', '.join(here)}"


def _near(word: str, words: list[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _read_override(argument: str, expected: str) -> Layer:
    if "=" not in argument or argument.startswith("-"):
        raise InputError(f"{shown(argument)}: expected {expected}; --help lists the options")
    key, _, text = argument.partition("=")
    value: Any = _Written(text)
    for part in reversed(key.split(".")):
        value = {part: value}
    return value, "the command line"


def _schema_keys(schema: Any, prefix: str = "") -> Iterator[str]:
    for option in dataclasses.fields(schema):
        child = getattr(schema, option.name)
        if dataclasses.is_dataclass(child):
            yield from _schema_keys(child, f"{prefix}{option.name}.")
        else:
            yield f"{prefix}{option.name}"


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _bare(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


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
