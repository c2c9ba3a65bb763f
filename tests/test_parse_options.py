import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from typing import Annotated

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlvision.config import Config
from mlvision.data import DATASETS
from mlvision.errors import InputError, check_fields
from mlvision.options import (
    EVALUATION,
    INERT,
    Selectable,
    build_options,
    flatten,
    is_override,
    load_options,
    marked,
    parse_options,
    save_options,
    take_path,
    to_plain,
)

READERS = ", ".join(DATASETS)


def parse(*argv):
    return parse_options(Config, list(argv), prog="train.py", description="Train.")


def test_yaml_then_overrides(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("data: {name: csv, root: photos}\noptim:\n  lr: 0.5\n  lr_scales: {head: 10}\nview: {size: 64}\n")
    config = parse(str(path), "optim.lr=3e-4", "optim.lr_scales.backbone=0.1", "data.val=val")
    assert (config.name, config.data.name, config.data.root, config.data.val) == ("mine", "csv", "photos", "val")
    assert config.optim.lr == 3e-4
    assert config.optim.lr_scales == {"head": 10.0, "backbone": 0.1}
    assert config.view.size == 64
    assert parse(str(path), "data.val=val", "data.val=").data.val == ""
    assert config.optim.weight_decay == Config().optim.weight_decay
    with pytest.raises(AttributeError):  # frozen
        config.seed = 3


def test_a_list_of_one_needs_no_brackets():
    def words(argument):
        return parse_options(Words, [argument], prog="", description="").words

    assert words("words=tie #2") == words('words=["tie #2"]') == ["tie #2"]
    assert words("words=a: b, c") == ["a: b, c"]
    assert words("words=null") == ["null"]
    assert words("words=") == words("words=[]") == []
    assert words("words=[a, b]") == ["a", "b"]
    assert words("words=[a") == ["[a"]
    with pytest.raises(InputError, match=r"^words: expected .*, got \{'a': 1\}"):
        words("words={a: 1}")
    assert parse("data.ignore_columns=x", "data.name=csv").data.ignore_columns == ["x"]
    with pytest.raises(InputError, match=r"^seeds\[0\]: expected whole number, got 'x'"):
        parse_options(Words, ["seeds=x"], prog="", description="")


@dataclass(frozen=True)
class Shape(Selectable):
    """A table of parts that is no table of this package."""

    colour: Annotated[str, "of the line"] = "black"


@dataclass(frozen=True)
class Circle(Shape):
    name: Annotated[str, "which shape"] = "circle"
    radius: Annotated[float, "in cm"] = 1.0

    def __post_init__(self):
        check_fields(self, "", [("radius", self.radius > 0, "more than 0")])


@dataclass(frozen=True)
class Frame(Shape):
    name: Annotated[str, "which shape"] = "frame"
    width: Annotated[float, "in cm"] = 2.0
    inner: Shape = field(default_factory=lambda: Circle(radius=0.5))


Shape.choices = {"circle": Circle, "frame": Frame}


@dataclass(frozen=True)
class Words:
    words: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Page:
    title: Annotated[str, "of the page", INERT] = ""
    main: Shape = field(default_factory=Frame)
    others: Annotated[list[Shape], "drawn below"] = field(default_factory=lambda: [Circle()])
    ink: Annotated[Words, INERT, EVALUATION] = field(default_factory=Words)


def page(*argv):
    return parse_options(Page, list(argv), prog="", description="")


def test_a_part_is_chosen_by_name_at_any_depth():
    assert page() == Page()
    assert page("main=circle").main == page("main={name: circle}").main == page("main.name=circle").main == Circle()
    assert page("main=circle", "main.radius=3", "main.colour=red").main == Circle(colour="red", radius=3.0)
    assert page("main.inner.radius=3").main == Frame(inner=Circle(radius=3.0))
    assert page("main.colour=red").main.inner.radius == 0.5  # a default keeps its own values
    deep = page("main.inner=frame", "main.inner.inner=frame", "main.inner.inner.width=7").main
    assert deep == Frame(inner=Frame(inner=Frame(width=7.0)))
    assert build_options(Page, to_plain(page("main.inner=frame"))) == page("main.inner=frame")


def test_parts_are_chosen_in_lists():
    assert page("others=[frame,circle]").others == [Frame(), Circle()]
    assert page("others=frame").others == [Frame()]
    assert page("others=[{name: circle, radius: 2}, frame]").others == [Circle(radius=2.0), Frame()]
    assert page("others=[frame,circle]", "others.1.radius=4").others == [Frame(), Circle(radius=4.0)]
    assert page("others.0.radius=4").others == [Circle(radius=4.0)]
    assert page("others.0=frame", "others.0.inner=frame").others == [Frame(inner=Frame())]
    assert page("others=[frame]", "others=[]").others == page("others=").others == []
    assert build_options(Page, to_plain(page("others=[frame,frame]"))) == page("others=[frame,frame]")


def test_a_part_in_a_file(tmp_path):
    path = tmp_path / "page.yaml"
    path.write_text("main: {inner: frame}\nothers:\n- circle\n- {name: frame, width: 9}\n")
    expected = Page(main=Frame(inner=Frame()), others=[Circle(), Frame(width=8.0)])
    assert page(str(path), "others.1.width=8") == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["main=circel"], "main.name: expected one of circle, frame, got 'circel'; did you mean circle?"),
        (["main.inner=square"], "main.inner.name: expected one of circle, frame, got 'square' (in the command line)"),
        (["main=3"], "main.name: expected one of circle, frame, got 3"),
        (["main.inner=[frame]"], "main.inner: expected a group of options such as main.inner.<option>, got ['frame']"),
        (["main.radius=3"], "main.radius: no such option of 'frame': it belongs to 'circle'"),
        (["main.inner.width=3"], "main.inner.width: no such option of 'circle': it belongs to 'frame'"),
        (["main.inner.radios=3"], "main.inner.radios: no such option; did you mean main.inner.radius?"),
        (["main=circle", "width=1"], "width: no such option; did you mean main.width with main=frame?"),
        (["main.inner.radius=0"], "radius: expected more than 0, got 0.0"),
        (["others=[frame,circel]"], "others.1.name: expected one of circle, frame, got 'circel'; did you mean circle?"),
        (["others=[{radius: 2}]"], "others.0.name: expected one of circle, frame, got nothing (in the command line)"),
        (["others.0.width=1"], "others.0.width: no such option of 'circle': it belongs to 'frame'"),
        (["others.0.radios=1"], "others.0.radios: no such option; did you mean others.0.radius?"),
        (["others=[frame]", "others.1.width=1"], "others.1: no such item, there are 1 (in the command line)"),
        (["others={a: 1}"], "others: expected a list of groups of options, got {'a': 1}"),
        (["others={}"], "others: expected a list of groups of options, got {}"),
        (["others=[[frame]]"], "others.0: expected a group of options such as others.0.<option>, got ['frame']"),
    ],
)
def test_a_part_that_is_none_is_named_with_the_nearest(arguments, message):
    with pytest.raises(InputError) as raised:
        page(*arguments)
    assert message in str(raised.value)


def test_help_lists_the_choices_once(capsys):
    with pytest.raises(SystemExit):
        page("--help")
    text = capsys.readouterr().out
    assert "main.name (text, 'frame')" in text
    assert "with main.name=circle:" in text
    assert text.count("radius (number, 1.0)") == 1
    assert "main.inner.name (text, 'circle')" in text
    assert "main.inner.<option>: as above" in text
    assert "others.0.<option>: as above" in text


def test_marks_of_options_and_groups():
    assert list(marked(Page, INERT)) == ["title", "ink"]
    assert list(marked(Page, EVALUATION)) == ["ink"]
    some = page("main=circle", "title=a", "others=[frame]")
    assert flatten(some, without=INERT) == {
        **{"main.name": "circle", "main.colour": "black", "main.radius": 1.0},
        **{"others.0.name": "frame", "others.0.colour": "black", "others.0.width": 2.0},
        **{"others.0.inner.name": "circle", "others.0.inner.colour": "black", "others.0.inner.radius": 0.5},
    }
    assert flatten(some).keys() - flatten(some, without=INERT).keys() == {"title", "ink.words", "ink.seeds"}


def test_a_saved_config_reads_back_equal(tmp_path):
    config = parse("data.name=csv", "data.root=a b", "data.splits={train: 0-4, test: 5-9}", "method.loss=asl", "seed=7")
    save_options(config, tmp_path / "config.yaml")
    assert load_options(Config, tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("optim.lrr=1", "optim.lrr: no such option; did you mean optim.lr? (in the command line)"),
        ("lr=1", "lr: no such option; did you mean optim.lr? (in the command line)"),
        ("optm.lr=1", "optm: no such option; did you mean optim? (in the command line)"),
        ("optim.lr=fast", "optim.lr: expected number, got 'fast' (in the command line)"),
        ("optim.epochs=1.5", "optim.epochs: expected whole number, got 1.5 (in the command line)"),
        ("seed=true", "seed: expected whole number, got True (in the command line)"),
        ("optim=3", "optim: expected a group of options such as optim.<option>, got 3 (in the command line)"),
        ("data.name=coc", f"data.name: expected one of {READERS}, got 'coc'; did you mean coco? (in the command line)"),
        ("data.separator=,", "data.separator: no such option of 'coco': it belongs to 'csv'"),
        ("data.name=[coco]", f"data.name: expected one of {READERS}, got ['coco']; did you mean coco?"),
        ("optim.lr_scales.head=abc", "optim.lr_scales.head: expected number, got 'abc' (in the command line)"),
        ("optim.lr_scales={head: abc}", "optim.lr_scales.head: expected number, got 'abc' (in the command line)"),
        ("view.scale=[0.5]", "view.scale: expected [number, number], got [0.5]"),
        ("view.scale=[a,b]", "view.scale[0]: expected number, got 'a'"),
        ("optim.epochs=0", "optim.epochs: expected at least 1, got 0"),
        ("optim.lr_scales={head: -1}", "optim.lr_scales: expected factors of 0 or more, got {'head': -1.0}"),
        ("optim.weight_decay=inf", "optim.weight_decay: expected finite numbers"),
        ("seed=18446744073709551616", "seed: expected finite numbers, whole ones of at most 64 bits"),
        ("threads=3000000000", "threads: expected 0 (torch's own choice) to 1024"),
        ("loader.num_workers=5000", "loader.num_workers: expected 0 to 256, got 5000"),
        ("name=../up", "name: expected a name for a folder, without / and other than . and .., got '../up'"),
        ("--seed", "'--seed': expected a .yaml file or key=value; --help lists the options"),
        ("seed", "'seed': expected a .yaml file or key=value; --help lists the options"),
    ],
)
def test_bad_options_are_named_with_the_nearest_right_one(argument, message):
    with pytest.raises(InputError) as raised:
        parse(argument)
    assert message in str(raised.value)


def test_bad_files_are_named_with_the_line(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("seed: 1\noptim: {lr: 1\n")
    with pytest.raises(InputError, match=r"broken.yaml, line \d: malformed YAML"):
        parse(str(broken))
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match=r"list.yaml: expected a mapping"):
        parse(str(tmp_path / "list.yaml"))
    typed = tmp_path / "typed.yaml"
    typed.write_text("optim: {lr: abc}\n")
    with pytest.raises(InputError, match=r"optim.lr: expected number, got 'abc' \(in .*typed.yaml\)"):
        parse(str(typed))
    with pytest.raises(InputError, match=r"brokn.yaml: no such config file; did you mean .*broken.yaml\?"):
        parse(str(tmp_path / "brokn.yaml"))


def test_help_lists_every_option_with_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "optim.lr (number, 0.001)" in text
    assert "peak learning rate" in text
    assert "with data.name=csv:" in text
    for key in flatten(Config()):
        assert f"  {key} (" in text or f"  with {key}=" in text  # the name of a list's item stands with its choices


def test_other_dataclasses_are_read_alike():
    @dataclass(frozen=True)
    class Options:
        out: Annotated[str, "where"] = "x"
        width: Annotated[float | None, "how wide"] = None

    options = parse_options(Options, ["width=2"], prog="p", description="d")
    assert options == replace(Options(), width=2.0)
    with pytest.raises(InputError, match=r"width: expected number or null, got 'a'"):
        parse_options(Options, ["width=a"], prog="p", description="d")


TEXTS = (
    "no", "010", "12:30", "1e3", "~", "null", "", " a", "a ", "#x", "a #x", "a: b", "a\nb", "\n", "\r\n", "\t", "0x10",
    "2001-01-01", "2007_000", "1_000", ".inf", "true", "|", ">", ",", "-", "- a", "?", "*a", "&a", "!a", "%a", "@a", "`",
    "'", '"', "'a'", "[a]", "{a}", "{split}.csv", "${oc.env:HOME}", "???", "<<", "=", "a=b", "\\", "\\n", "\x07", "\x85",
    "\u2028", "\ufeff", "日本", "🦜", "e\u0301", "a" * 3000,
)  # fmt: skip


def any_text():
    """Texts that YAML takes for something else, and any others that a file can hold."""
    return st.one_of(st.sampled_from(TEXTS), st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))


@dataclass(frozen=True)
class Group:
    text: Annotated[str, ""] = ""
    texts: Annotated[list[str], ""] = field(default_factory=list)


@dataclass(frozen=True)
class Texts:
    """An option of each type that holds text."""

    text: Annotated[str, ""] = ""
    maybe: Annotated[str | None, ""] = None
    texts: Annotated[list[str], ""] = field(default_factory=list)
    pair: Annotated[tuple[str, str], ""] = ("", "")
    of_text: Annotated[dict[str, str], ""] = field(default_factory=dict)
    lists: Annotated[dict[str, list[str]], ""] = field(default_factory=dict)
    group: Group = field(default_factory=Group)
    groups: Annotated[list[Group], ""] = field(default_factory=list)


def texts_of_options():
    some, group = st.lists(any_text(), max_size=4), st.builds(Group, any_text(), st.lists(any_text(), max_size=3))
    dicts = st.dictionaries(any_text(), any_text(), max_size=3), st.dictionaries(any_text(), some, max_size=3)
    pair, groups = st.tuples(any_text(), any_text()), st.lists(group, max_size=2)
    return st.builds(Texts, any_text(), st.none() | any_text(), some, pair, *dicts, group, groups)


@settings(deadline=None, max_examples=100)
@given(options=texts_of_options())
def test_every_text_survives_being_written_and_read(options, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "texts.yaml"
    save_options(options, path)
    assert load_options(Texts, path) == options


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_a_text_option_takes_the_text_as_typed(text):
    options = parse_options(Texts, [f"text={text}", f"group.text={text}", f"of_text.k={text}"], prog="", description="")
    assert (options.text, options.group.text, options.of_text) == (text, text, {"k": text})


@pytest.mark.parametrize("text", ["a\0b", "caf\udce9", "\ud800"], ids=ascii)
def test_text_that_no_file_can_hold_is_refused(text, tmp_path):
    with pytest.raises(InputError, match="text: expected text, got .*; it holds NUL or what is not UTF-8"):
        parse_options(Texts, [f"text={text}"], prog="", description="")
    with pytest.raises(InputError, match=r"texts\[1\]: expected text"):
        save_options(Texts(texts=["a", text]), tmp_path / "texts.yaml")
    assert list(tmp_path.iterdir()) == []


def test_lists_and_mappings_of_text_keep_what_is_written():
    typed = ["texts=[no,010,12:30,1e3,'a, b',2001-01-01]", "lists={no: [010, 1e3]}", "pair=[0x10, yes]"]
    options = parse_options(Texts, typed, prog="", description="")
    assert options.texts == ["no", "010", "12:30", "1e3", "a, b", "2001-01-01"]
    assert (options.lists, options.pair) == ({"no": ["010", "1e3"]}, ("0x10", "yes"))


def test_unquoted_text_in_a_file_is_taken_as_written(tmp_path):
    path = tmp_path / "texts.yaml"
    path.write_text(
        "text: 2007_000\nmaybe: 010\ntexts: [no, 12:30, 1e3]\nof_text: {yes: off, 08: 1.50}\n"
        "group:\n  text: ${HOME}\n  texts:\n  - 2001-01-01\n  - 0x10 # a remark\ngroups:\n- {text: on}\n"
    )
    assert parse_options(Texts, [str(path)], prog="", description="") == Texts(
        text="2007_000",
        maybe="010",
        texts=["no", "12:30", "1e3"],
        of_text={"yes": "off", "08": "1.50"},
        group=Group("${HOME}", ["2001-01-01", "0x10"]),
        groups=[Group("on")],
    )


@pytest.mark.parametrize("value", ["~", "null", "", "[a]", "{a: b}", "- a"])
def test_what_is_no_text_in_a_file_is_to_be_quoted(value, tmp_path):
    path = tmp_path / "texts.yaml"
    path.write_text(f"group:\n  text: {value}\n" if value != "- a" else "group:\n  text:\n  - a\n")
    with pytest.raises(InputError, match=r"group.text: expected text, got .*; quote it if .* \(in .*texts.yaml\)"):
        parse_options(Texts, [str(path)], prog="", description="")


def test_null_and_nothing_are_no_text_where_there_may_be_none():
    for typed in ("maybe=null", "maybe=~", "maybe="):
        assert parse_options(Texts, ["maybe=a", typed], prog="", description="").maybe is None


def test_later_options_win_and_mappings_grow(tmp_path):
    path = tmp_path / "texts.yaml"
    path.write_text("of_text: {a: 1, b: 2}\ngroup: {text: x, texts: [y]}\n")
    typed = ["of_text={b: 3}", "of_text.c=4", "group={text: z}", "text={a}", "text={b}"]
    options = parse_options(Texts, [str(path), *typed], prog="", description="")
    assert options.of_text == {"a": "1", "b": "3", "c": "4"}
    assert (options.group, options.text) == (Group("z", ["y"]), "{b}")


NUMBERS = {
    "10": (10, 10.0), "010": (10, 10.0), "1_000": (1000, 1000.0), "-1": (-1, -1.0), "+2": (2, 2.0),
    "1e3": (None, 1000.0), ".5": (None, 0.5), "1.": (None, 1.0), "12:30": (None, None), "0x10": (None, None),
    "nan": (None, None), "inf": (None, None), ".inf": (None, None), "1e999": (None, None), "9" * 4301: (None, None),
    "true": (None, None), "null": (None, None), "": (None, None), "[1]": (None, None), str(2**63): (None, float(2**63)),
}  # fmt: skip


@dataclass(frozen=True)
class Numbers:
    whole: Annotated[int, ""] = 0
    number: Annotated[float, ""] = 0.0
    many: Annotated[list[float], ""] = field(default_factory=list)
    named: Annotated[dict[str, float], ""] = field(default_factory=dict)

    def __post_init__(self):
        check_fields(self, "")


@pytest.mark.parametrize("text", NUMBERS, ids=lambda text: text[:20])
def test_what_is_a_number(text):
    whole, number = NUMBERS[text]
    for key, value, option in [
        (f"whole={text}", whole, "whole"),
        (f"number={text}", number, "number"),
        (f"many=[{text}]", number and [number], "many"),
        (f"named.a={text}", number and {"a": number}, "named"),
    ]:
        if value is None and (text, option) != ("", "many"):
            with pytest.raises(InputError, match=rf"^{option}.*: expected .*number"):
                parse_options(Numbers, [key], prog="", description="")
        elif value is not None:
            assert getattr(parse_options(Numbers, [key], prog="", description=""), option) == value


def test_messages_are_one_line_of_bounded_length(tmp_path):
    path = tmp_path / "long.yaml"
    path.write_text(f"texts: {{a: {'x' * 100_000}}}\n")
    for arguments in ([str(path)], [f"number={'x ' * 50_000}"], [f"{'x' * 100_000}=1"], ["y" * 100_000], ["a\nb"]):
        with pytest.raises(InputError) as raised:
            parse_options(Numbers, arguments, prog="", description="")
        assert len(str(raised.value)) < 2500
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("text: " + "[" * 100_000, "nested too deeply"),
        ("texts: &a [*a]\n", "an alias that holds itself"),
        ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)), "values"),
        ("text: a\ntext: b\n", "line 2: malformed YAML ('text' stands twice)"),
        ("text: !!binary aGVsbG8=\n", "malformed YAML"),
        ("text: !!python/object:os.system {}\n", "malformed YAML"),
        ("? [a]\n: b\n", "malformed YAML"),
        ("null: a\n", "no such option"),
        ("text: \x07\n", "malformed YAML"),
        ("text: *a\n", "malformed YAML"),
    ],
    ids=lambda text: text[:20],
)
def test_yaml_that_no_one_writes_is_refused(text, message, tmp_path):
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as raised:
        parse_options(Texts, [str(path)], prog="", description="")
    assert message in str(raised.value)


def test_aliases_and_merged_mappings_can_be_used(tmp_path):
    path = tmp_path / "aliases.yaml"
    path.write_text("texts: &some [a, no]\nlists: {x: *some, <<: {y: [b]}}\n")
    options = parse_options(Texts, [str(path)], prog="", description="")
    assert (options.texts, options.lists) == (["a", "no"], {"x": ["a", "no"], "y": ["b"]})


@pytest.mark.parametrize(
    ("argument", "is_option"),
    [
        ("optim.lr=1", True),
        ("out=runs/a.yaml", True),
        ("optim.lr_scales.my-head=1", True),
        ("runs/grid/tiny-optim.lr=0.1-seed0", False),
        ("tiny-optim.lr=0.1-seed0", False),
        ("./optim.lr=0.1", False),
        ("runs/a=b/config.yaml", False),
        ("a", False),
    ],
)
def test_a_path_with_an_equals_sign_is_told_from_an_option(argument, is_option):
    assert is_override(argument) == is_option
    if is_option:
        with pytest.raises(InputError, match="expected a run folder first, then key=value, got"):
            take_path([argument], "a run folder")
    else:
        assert take_path([argument, "seed=1"], "a run folder") == (argument, ["seed=1"])


def test_a_path_that_is_there_is_no_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "optim.lr=1").mkdir()
    assert take_path(["optim.lr=1"], "a run folder") == ("optim.lr=1", [])


def test_a_script_prints_names_that_are_no_text(tmp_path):
    """A strict terminal or log; what is no UTF-8 is spelt out instead of ending the script."""
    code = "from mlvision.commands.cli import run_command; import os; "
    code += "run_command(lambda argv: print(os.fsdecode(b'caf\\xe9')))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (0, b"caf\\udce9\n"), done.stderr


MEMORY = """
import numpy, torch
from mlvision.commands.cli import run_command
for call in (lambda argv: torch.empty(10**14), lambda argv: numpy.zeros(10**15), lambda argv: [0] * 10**18):
    try:
        run_command(call)
    except SystemExit as left:
        print(left.code)
"""


def test_memory_that_runs_out_is_one_line():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.split() == ["2", "2", "2"]
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert line.startswith("error: memory ran out; smaller batches or images take less (")
