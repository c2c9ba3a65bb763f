"""text_files.py: each fault named with its file and line."""

import pytest

from mlvision.errors import InputError
from mlvision.text_files import list_splits, read_json, read_lines, read_names


def test_lines_keep_their_numbers(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbf first \r\nsecond\n\n \n")
    assert read_lines(str(path)) == ["first", "second"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\n\nb\n", "list.txt, line 2: is empty"),
        (b" \n\n", "list.txt: the file is empty"),
        (b"a\nb\n\xff\n", "list.txt, line 3: not UTF-8 text"),
        (b"a\nb\nc\nb\n", "list.txt, line 4: repeats the name 'b' of line 2"),
    ],
)
def test_a_faulty_list_is_refused(tmp_path, content, message):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_names(str(path), "name")


def test_missing_file_and_malformed_json(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}/none.json: cannot be read: No such file"):
        read_json(str(tmp_path / "none.json"))
    (tmp_path / "a.json").write_text('{"a": 1,\n "b": }')
    with pytest.raises(InputError, match="a.json, line 2, column 7: Expecting value"):
        read_json(str(tmp_path / "a.json"))


def test_splits_are_listed_where_the_template_finds_them(tmp_path):
    for name in ("b_list.txt", "a_list.txt", "c_other.txt"):
        (tmp_path / name).touch()
    assert list_splits(f"{tmp_path}/{{split}}_list.txt") == "a, b"
    assert list_splits(f"{tmp_path}/lists/{{split}}.txt") == "none"
