"""Values as they are written, in YAML and on the command line: what they mean is said by the type of their option.

The only file that knows YAML.
"""

import re
from collections.abc import Callable
from typing import Any

import yaml


class Written(str):
    """A value as it is typed on the command line or stands unquoted in a file: its option's type says what it means."""


class _Loader(yaml.SafeLoader):
    """YAML whose unquoted values are `Written`, but for null; tags, and keys that stand twice, are refused."""

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
    _TEXT: lambda _, node: node.value if node.style else Written(node.value),
}
_Dumper.add_representer(str, _Dumper.represent_str)
_MOST_VALUES = 1_000_000  # of one YAML: aliases of aliases make more than memory holds out of a few lines


def parse_yaml(text: str) -> Any:
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


def dump_yaml(values: Any) -> str:
    """Plain data as YAML that `parse_yaml` reads again."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parsed(value: Any) -> Any:
    """The list or mapping that a text from the command line writes, such as `[a, b]`; anything else as it is."""
    if not isinstance(value, Written) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return parse_yaml(value)
    except yaml.YAMLError:
        return value


def resolve(value: Any) -> Any:
    """A value whose option takes anything, or that a message shows: what it looks like."""
    value = parsed(value)
    if isinstance(value, dict):
        return {resolve(key): resolve(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [resolve(inner) for inner in value]
    if not isinstance(value, Written):
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
SCALARS: dict[Any, Callable[[Any], Any]] = {str: _text, bool: _switch, int: _whole_number, float: _number}
