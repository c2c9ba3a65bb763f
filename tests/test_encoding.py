"""No text file is read or written in the machine's own encoding: names of classes and images are not all ASCII."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "mlvision").rglob("*.py"), *(ROOT / "tools").glob("*.py")])


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def opens_text(call: ast.Call) -> bool:
    """Whether a call is `open(...)` as text, `path.read_text()`, `path.write_text(...)` or a process's `text=True`."""
    if any(keyword.arg == "text" for keyword in call.keywords):
        return True
    if isinstance(call.func, ast.Attribute):
        return call.func.attr in ("read_text", "write_text")
    modes = [*call.args[1:2], *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    binary = any("b" in constant.value for mode in modes for constant in ast.walk(mode) if is_text(constant))
    return isinstance(call.func, ast.Name) and call.func.id == "open" and not binary


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_text_file_is_opened_with_an_encoding(source):
    calls = [node for node in ast.walk(ast.parse(source.read_bytes())) if isinstance(node, ast.Call)]
    silent = [
        f"line {call.lineno}: {ast.unparse(call)}"
        for call in calls
        if opens_text(call) and all(keyword.arg != "encoding" for keyword in call.keywords)
    ]
    assert silent == []
