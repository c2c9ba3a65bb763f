"""Configuration: dataclasses hold the defaults, a YAML says what a run changes, `key=value` overrides both.

The only file that imports OmegaConf. YAML and overrides are merged as plain data first; then `data.name`, `head.name` and
`method.name` choose their dataclasses from the tables, every key is checked, and one structured merge checks the types.
"""

import copy
import dataclasses
import difflib
import logging
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mlvision.data import DATASETS
from mlvision.data.loader import LoaderConfig
from mlvision.data.manifest import DataConfig
from mlvision.data.transforms import ViewConfig
from mlvision.engine import distributed
from mlvision.engine.checkpoint import CheckpointConfig
from mlvision.engine.distributed import DdpConfig
from mlvision.engine.log import LogConfig
from mlvision.engine.optim import EmaConfig, OptimConfig
from mlvision.errors import InputError, check_fields, describe_os_error
from mlvision.methods import METHODS, MethodConfig
from mlvision.models import HEADS, BackboneConfig, HeadConfig

TABLES: dict[type, dict[str, tuple]] = {DataConfig: DATASETS, HeadConfig: HEADS, MethodConfig: METHODS}
_DEFAULT_CHOICE = {DataConfig: "coco", HeadConfig: "linear", MethodConfig: "baseline"}


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
            ("seed", self.seed >= 0, "0 or more"),
            ("threads", self.threads >= 0, "0 (torch's own choice) or more"),
            ("bootstrap", self.bootstrap == 0 or self.bootstrap >= 2, "0, or at least 2 resamplings"),
        )
        check_fields(self, "", rules)


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
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for argument in argv:
        if argument.endswith((".yaml", ".yml")) and "=" not in argument:
            part, source = read_yaml(Path(argument)), argument
            known, known_to_runs = ({f.name for f in dataclasses.fields(c)} for c in (cls, Config))
            part = {key: value for key, value in part.items() if key in known or key not in known_to_runs}
            if "name" in known:
                part.setdefault("name", Path(argument).stem)
        elif "=" in argument and not argument.startswith("-"):
            part, source = _read_override(argument), "the command line"
        else:
            raise InputError(f"'{argument}': expected a .yaml file or key=value; --help lists the options")
        origin |= dict.fromkeys(_leaf_keys(part), source)
        _merge_into(values, part)
    return build_options(cls, values, origin)


def build_options(cls: type, values: dict[str, Any], origin: dict[str, str] | None = None) -> Any:
    """An instance of `cls` from nested plain data, every key and type checked; `origin` says where keys come from.

    Raises:
        InputError: an unknown key, another choice's option, a wrong type, or a value with `${`.
    """
    origin = origin or {}
    schema = _choose(cls, values, origin)
    _check_keys(schema, values, "", origin, schema)
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except OmegaConfBaseException:
        key = next(key for key in _given_options(schema, values) if not _fits(schema, key, _lookup(values, key)))
    group, _, option = key.rpartition(".")
    expected = _type_name(_hints(type(_child(schema, group)))[option])
    raise InputError(f"{key}: expected {expected}, got {_lookup(values, key)!r}{_where(origin, key)}")


def _where(origin: dict[str, str], key: str) -> str:
    """Says which file, or the command line, set an option or the first of its group; nothing where that is not known."""
    return next((f" (in {source})" for leaf, source in origin.items() if f"{leaf}.".startswith(f"{key}.")), "")


def _nest(key: str, value: Any) -> Any:
    """`a.b.c` and a value to `{"a": {"b": {"c": value}}}`."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _given_options(schema: Any, values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The options, as dotted keys, that `values` sets; a dict or list that is one option's value is not entered."""
    for key, value in values.items():
        child = getattr(schema, key)
        if dataclasses.is_dataclass(child):
            yield from _given_options(child, value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _fits(schema: Any, key: str, value: Any) -> bool:
    """Whether one option takes a value."""
    try:
        OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), _nest(key, value)))
    except OmegaConfBaseException:
        return False
    except InputError:  # of the right type, out of range beside the defaults
        return True
    return True


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping as plain data.

    Raises:
        InputError: no such file, malformed (with line), or not a mapping.
    """
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        raise InputError(f"{path}: no such config file" + (f"; did you mean {path.parent / near[0]}?" if near else ""))
    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.read_text(encoding="utf-8").strip() else {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: malformed YAML ({getattr(error, 'problem', None) or error})") from None
    except (OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: cannot be read as a config ({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a mapping of options, got a {type(values).__name__}")
    return values


def read_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Nested plain data with `key=value` overrides merged into a copy.

    Raises:
        InputError: an argument that is no `key=value`.
    """
    values = copy.deepcopy(values)
    for argument in overrides:
        if "=" not in argument or argument.startswith("-"):
            raise InputError(f"'{argument}': expected key=value; --help lists the options")
        _merge_into(values, _read_override(argument))
    return values


def to_plain(config: Any) -> dict[str, Any]:
    """A config dataclass as nested dicts, lists and scalars, as YAML and JSON hold them."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(config))


def save_options(config: Any, path: Path) -> None:
    """Write a config dataclass as YAML, every option spelled out."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
    partial.replace(path)


def load_options(cls: type, path: Path) -> Any:
    """Read what `save_options` wrote.

    Raises:
        InputError: the file is missing, malformed, or has keys that `cls` does not know.
    """
    values = read_yaml(path)
    return build_options(cls, values, dict.fromkeys(_leaf_keys(values), str(path)))


def run_command(main: Callable[[list[str]], Any], *, several_processes: bool = False) -> NoReturn:
    """Run a script's `main(argv)`: a user's mistake becomes one line on stderr and exit code 2, never a traceback.

    An integer that `main` returns is the exit code. What the package logs (which weights were loaded, say) goes to stderr.
    Of several processes, started by torchrun, rank 0 speaks for all; another does where it alone has failed. A script that
    does not share its work among them (`several_processes`) refuses them: each would do all of it and write the same files.
    """
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


def _choose(cls: type, values: dict[str, Any], origin: dict[str, str]) -> Any:
    """An instance of `cls` with defaults, in which each table's field holds the dataclass that its `name` chooses."""
    chosen = {}
    for option, hint in _hints(cls).items():
        table = TABLES.get(_bare(hint))
        if table is None:
            continue
        given = values.get(option)
        default = _DEFAULT_CHOICE[_bare(hint)]
        name = given.get("name", default) if isinstance(given, dict) else default
        if not isinstance(name, str) or name not in table:
            key = f"{option}.name"
            raise InputError(
                f"{key}: expected one of {', '.join(table)}, got '{name}'{_near(str(name), list(table))}"
                f"{_where(origin, key)}"
            )
        chosen[option] = table[name][0]()
    return cls(**chosen)


def _check_keys(schema: Any, values: dict[str, Any], prefix: str, origin: dict[str, str], root: Any) -> None:
    known = {option.name for option in dataclasses.fields(schema)}
    for key, value in values.items():
        full = f"{prefix}{key}"
        where = _where(origin, full)
        if key not in known:
            raise InputError(f"{full}: no such option{_owner(schema, str(key))}{_suggest(root, schema, full)}{where}")
        child = getattr(schema, key)
        if dataclasses.is_dataclass(child):
            if not isinstance(value, dict):
                raise InputError(f"{full}: expected a group of options such as {full}.<option>, got {value!r}{where}")
            _check_keys(child, value, f"{full}.", origin, root)
        elif _holds_interpolation(value):
            raise InputError(f"{full}: a value may not hold '${{' or be '???', got {value!r}{where}")


def _holds_interpolation(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_interpolation, (*value, *value.values())))
    if isinstance(value, list):
        return any(map(_holds_interpolation, value))
    return isinstance(value, str) and ("${" in value or value == "???")


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


def _read_override(argument: str) -> dict[str, Any]:
    key, _, text = argument.partition("=")
    if "${" in text:
        raise InputError(f"{key}: a value may not hold '${{' or be '???', got {text!r} (in the command line)")
    try:
        value: Any = OmegaConf.from_dotlist([f"value={text}"])["value"] if text else ""
        value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    except (yaml.YAMLError, OmegaConfBaseException):
        value = text  # no YAML, such as a lone comma: plain text, and the type check has the last word
    return _nest(key, value)


def _merge_into(values: dict[str, Any], part: dict[str, Any]) -> None:
    for key, value in part.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge_into(values[key], value)
        else:
            values[key] = value


def _leaf_keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaf_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _schema_keys(schema: Any, prefix: str = "") -> Iterator[str]:
    for option in dataclasses.fields(schema):
        child = getattr(schema, option.name)
        if dataclasses.is_dataclass(child):
            yield from _schema_keys(child, f"{prefix}{option.name}.")
        else:
            yield f"{prefix}{option.name}"


def _lookup(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _child(schema: Any, key: str) -> Any:
    for part in key.split(".") if key else ():
        schema = getattr(schema, part)
    return schema


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _bare(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _type_name(hint: Any) -> str:
    hint = _bare(hint)
    if isinstance(hint, types.UnionType):
        return " or ".join(_type_name(part) for part in typing.get_args(hint))
    arguments = typing.get_args(hint)
    if arguments:
        return f"{hint.__origin__.__name__} of {' to '.join(_type_name(a) for a in arguments)}"
    return {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )
