"""Outputs that are whole or not there, and inputs of bytes that nobody vouches for."""

import argparse
import multiprocessing
import os
import re
import socket
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faults import damaged, dead_process

from mlvision.errors import InputError
from mlvision.files import (
    check_out,
    check_out_folder,
    is_alive,
    open_arrays,
    read_torch,
    spreadsheet_text,
    whole_file,
    whole_folder,
)


def test_a_file_appears_at_the_end_of_the_block(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")
    with whole_file(path, newline="") as file:
        file.write("köln,\udcff\r\n")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_bytes() == "köln,\\udcff\r\n".encode()
    assert os.listdir(tmp_path) == ["a.csv"]


@pytest.mark.parametrize("error", [RuntimeError("ours"), OSError(5, "of another file"), KeyboardInterrupt()])
def test_after_an_error_nothing_has_changed(tmp_path, error):
    (tmp_path / "old.bin").write_bytes(b"old")

    def write_half(name):
        with whole_file(tmp_path / name, "wb") as file:
            file.write(b"half")
            raise error

    for name in ("old.bin", "new.bin"):
        with pytest.raises(type(error)) as caught:
            write_half(name)
        assert caught.value is error  # not blamed on the file
    assert os.listdir(tmp_path) == ["old.bin"]
    assert (tmp_path / "old.bin").read_bytes() == b"old"


def test_what_a_killed_process_left_is_taken_over(tmp_path):
    (tmp_path / "a.txt.partial").write_text("the longer remains of a killed process")
    with whole_file(tmp_path / "a.txt") as file:
        file.write("new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_two_processes_that_write_one_file_do_not_mix(tmp_path):
    with whole_file(tmp_path / "a.txt") as file:
        file.write("first")
        other = os.fork()
        if other == 0:
            try:
                with whole_file(tmp_path / "a.txt"):
                    os._exit(0)
            except InputError as error:
                os._exit(2 if "a.txt: another process is writing this file" in str(error) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 2
    assert (tmp_path / "a.txt").read_text() == "first"


def test_a_partial_name_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "a.txt.partial").symlink_to(tmp_path / "precious")
    with pytest.raises(InputError, match="a.txt: could not be written"), whole_file(tmp_path / "a.txt"):
        pass
    assert (tmp_path / "precious").read_text() == "precious"


def place(kind: str, path: Path) -> None:
    (path.parent / "there").write_text("there")
    if kind == "a link":
        path.symlink_to(path.parent / "there")
    elif kind == "a dangling link":
        path.symlink_to(path.parent / "nowhere")
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))


@pytest.mark.parametrize("kind", ["a link", "a dangling link", "a folder", "a pipe", "a socket"])
def test_what_is_no_regular_file_is_refused_before_and_at_writing(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    path = Path("out.csv")
    place(kind, path)
    before = os.lstat(path)
    with pytest.raises(InputError, match=f"^out: out.csv is {kind.replace('dangling ', '')}, which would be replaced"):
        check_out(path)
    with pytest.raises(InputError, match="^out.csv is "), whole_file(path):
        pass
    assert os.path.samestat(before, os.lstat(path))
    assert sorted(os.listdir()) == ["out.csv", "there"]


@pytest.mark.parametrize("kind", ["a file", "a dangling link", "a pipe"])
def test_what_is_no_folder_is_refused_before_anything_is_computed(tmp_path, kind):
    path = tmp_path / "out"
    path.write_text("x") if kind == "a file" else place(kind, path)
    with pytest.raises(InputError, match=f"^records: {path} is {kind.replace('dangling ', '')}; expected a folder"):
        check_out_folder(path, "records")


def test_folders_and_links_to_them_are_taken(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    for name in ("there", "link", "new", "new/below"):
        assert check_out_folder(tmp_path / name) == tmp_path / name


@pytest.mark.parametrize("path", ["/dev/null", "/dev/stdout", "/dev/full"])
def test_devices_are_refused(path):
    with pytest.raises(InputError, match=f"out: {path} is a (device|link)"):
        check_out(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nowhere/x.csv", "out: the folder /nowhere does not exist"),
        ("x.json", "out: expected a name that ends in .csv or .jsonl, got 'x.json'"),
        ("x", "out: expected a name that ends in .csv"),
        ("a\0b.csv", "out: expected the name of a file"),
        (f"{'x' * 300}.csv", "File name too long"),
    ],
)
def test_places_where_no_file_can_be(path, message):
    with pytest.raises(InputError, match=message):
        check_out(path, (".csv", ".jsonl"))


def test_suffixes_in_capitals_are_the_same():
    assert check_out("X.CSV", (".csv",)) == Path("X.CSV")


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+1", "'=1+1"), ("+a.jpg", "'+a.jpg"), ("-1.jpg", "'-1.jpg"), ("@home", "'@home"), ("\tx", "'\tx"),
        ("\rx", "'\rx"), ("'=x", "''=x"), ("''@x", "'''@x"), ("cat", "cat"), ("'cat'", "'cat'"), ("a=b", "a=b"),
        ("", ""), ("'", "'"), ("deep/-1.jpg", "deep/-1.jpg"),
    ],
)  # fmt: skip
def test_cells_that_a_spreadsheet_would_compute(text, cell):
    assert spreadsheet_text(text) == cell
    # As documented: one apostrophe less where apostrophes precede such a sign.
    undone = (
        cell[1:] if cell.startswith("'") and cell.lstrip("'").startswith(("=", "+", "-", "@", "\t", "\r")) else cell
    )
    assert undone == text


def test_what_training_scripts_store_is_read(tmp_path):
    path = tmp_path / "a.pt"
    content = {
        "best": np.float64(0.5), "epoch": np.int64(3), "single": np.float32(0.25), "on": np.bool_(True),
        "name": np.str_("x"), "curve": np.arange(6.0).reshape(2, 3), "names": np.array(["a", "bc"]),
        "args": argparse.Namespace(lr=0.1, out=Path("runs/x")), "simple": SimpleNamespace(a=1),
        "state_dict": {"weight": torch.arange(3.0)},
    }  # fmt: skip
    torch.save(content, path)
    loaded = read_torch(path)
    for name in ("best", "epoch", "single", "on", "name", "args", "simple"):
        assert loaded[name] == content[name]
        assert type(loaded[name]) is type(content[name])
    assert np.array_equal(loaded["curve"], content["curve"])
    assert loaded["names"].tolist() == ["a", "bc"]
    assert torch.equal(loaded["state_dict"]["weight"], torch.arange(3.0))


class Executed:
    """What a hostile file holds: reading it runs what `__reduce__` names."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_objects_are_refused_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content, name in (
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ({"model": torch.nn.Sequential(torch.nn.ReLU())}, "torch.nn.modules.container.Sequential"),
        (Executed(), "posix.mkdir"),
    ):
        torch.save(content, "a.pt")
        with pytest.raises(InputError) as caught:
            read_torch("a.pt")
        assert str(caught.value) == (
            f"a.pt: holds an object of {name}, and reading it would run code; expected tensors and plain values, as "
            "torch.save(model.state_dict(), file) writes them: save those where that class is defined"
        )
    torch.save({"array": np.array([Executed()], dtype=object)}, "a.pt")
    with pytest.raises(InputError, match="a.pt: cannot be read"):
        read_torch("a.pt")
    assert os.listdir() == ["a.pt"]


def test_programs_and_packed_archives_are_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with pytest.raises(InputError, match="script.pt: holds a TorchScript program; expected weights"):
        read_torch(tmp_path / "script.pt")
    torch.save({"weight": torch.zeros(1 << 20)}, tmp_path / "big.pt")
    with (
        zipfile.ZipFile(tmp_path / "big.pt") as whole,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in whole.infolist():
            packed.writestr(entry.filename, whole.read(entry))
    assert (tmp_path / "bomb.pt").stat().st_size < 20_000
    with pytest.raises(InputError, match="bomb.pt: '.*' is compressed; expected a file that torch.save wrote"):
        read_torch(tmp_path / "bomb.pt")


@pytest.mark.parametrize("by_column", [False, True])
def test_arrays_are_known_before_they_are_unpacked(tmp_path, by_column):
    rows = np.arange(35, dtype=np.float32).reshape(7, 5)
    rows = np.asfortranarray(rows) if by_column else rows
    np.savez_compressed(tmp_path / "a.npz", rows=rows, words=np.array(["a", "bcd"]), one=np.array(3))
    with open_arrays(tmp_path / "a.npz") as arrays:
        assert {name: array.shape for name, array in arrays.items()} == {"rows": (7, 5), "words": (2,), "one": ()}
        assert arrays["words"].dtype == np.dtype("<U3")
        blocks = list(arrays["rows"].blocks(3))
        assert [len(block) for block in blocks] == [3, 3, 1]
        assert np.array_equal(np.concatenate(blocks), rows)
        assert np.array_equal(arrays["rows"].read(), rows)
        assert arrays["one"].read() == 3


def test_arrays_of_objects_and_false_headers_are_refused(tmp_path):
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    with (
        pytest.raises(InputError, match="objects.npz: a.npy holds Python objects"),
        open_arrays(tmp_path / "objects.npz"),
    ):
        pass
    np.save(tmp_path / "a.npy", np.zeros(5))
    content = (tmp_path / "a.npy").read_bytes()
    with zipfile.ZipFile(tmp_path / "false.npz", "w") as archive:
        archive.writestr("a.npy", content.replace(b"(5,)", b"(9,)"))
    with (
        pytest.raises(InputError, match="false.npz: a.npy holds 168 bytes, its header promises others"),
        open_arrays(tmp_path / "false.npz"),
    ):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zip", "legacy", "npz"])
def test_damage_is_one_line_or_harmless(tmp_path, kind):
    """Flipped bits, other bytes, missing ends and holes; formats with checksums give what was written, or nothing."""
    path = tmp_path / ("a.npz" if kind == "npz" else "a.pt")
    numbers = np.random.default_rng(0).standard_normal((20, 6)).astype(np.float32)
    if kind == "npz":
        np.savez_compressed(path, numbers=numbers)
    else:
        content = {"numbers": torch.from_numpy(numbers), "best": np.float64(0.5), "names": ["a", "b"]}
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")

    def read() -> np.ndarray:
        if kind != "npz":
            return read_torch(path)["numbers"].numpy()
        with open_arrays(path) as arrays:
            return np.concatenate(list(arrays["numbers"].blocks(7)))

    assert np.array_equal(read(), numbers)
    refused = []
    for content in damaged(path.read_bytes(), num=300, seed=1, hole=30):
        path.write_bytes(content)
        try:
            result = read()
        except InputError as error:
            refused.append(str(error))
        except (KeyError, TypeError):  # a name that is another: what it holds is the caller's to check
            pass
        else:
            assert kind == "legacy" or np.array_equal(result, numbers)
    assert len(refused) > 100
    assert all(message.startswith(f"{path}: ") and "\n" not in message for message in refused)


# Folders


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with whole_folder(tmp_path / "new/set") as folder:
        (folder / "a").touch()
        assert not (tmp_path / "new/set").exists()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["new", "new/set", "new/set/a"]
    with pytest.raises(FileExistsError), whole_folder(tmp_path / "new/other") as folder:
        folder.mkdir()
    assert os.listdir(tmp_path / "new") == ["set"]


def test_a_folder_that_is_there_is_replaced_only_if_asked(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/old").touch()
    with pytest.raises(OSError), whole_folder(tmp_path / "set") as folder:
        (folder / "new").touch()
    assert os.listdir(tmp_path / "set") == ["old"]
    with pytest.raises(ValueError), whole_folder(tmp_path / "set", replace=True) as folder:
        raise ValueError
    assert os.listdir(tmp_path / "set") == ["old"]
    with whole_folder(tmp_path / "set", replace=True) as folder:
        (folder / "new").touch()
    assert os.listdir(tmp_path / "set") == ["new"]
    assert os.listdir(tmp_path) == ["set"]


def test_only_what_dead_processes_of_this_host_left_of_this_folder_is_removed(tmp_path):
    host, dead = re.sub(r"[^\w-]", "_", socket.gethostname()), dead_process()
    left = f".set.unfinished-{host}-{dead}-1a2b"
    kept = [
        f".set.unfinished-{host}-{os.getpid()}-1a2b",  # a living one's
        f".set.unfinished-elsewhere-{dead}-1a2b",
        f".other.unfinished-{host}-{dead}-1a2b",
        f"set.unfinished-{host}-{dead}-1a2b",
        ".set.unfinished-1a2b3c4d",
    ]
    for name in (left, *kept):
        (tmp_path / name).mkdir()
        (tmp_path / name / "image.jpg").touch()
    with whole_folder(tmp_path / "set"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "set"])


def test_a_living_process_is_told_from_a_dead_one():
    assert is_alive(os.getpid())
    assert is_alive(10**30)  # no number of a process: nothing is known
    assert not is_alive(dead_process())


def test_a_process_that_a_writer_has_forked_does_not_hold_its_file(tmp_path):
    """Loader workers outlive a killed main process by seconds, and would refuse the next one."""
    writer = os.fork()
    if writer == 0:
        with whole_file(tmp_path / "a.csv"):
            multiprocessing.get_context("fork").Process(target=time.sleep, args=(5,)).start()
            os._exit(0)
    os.waitpid(writer, 0)
    with whole_file(tmp_path / "a.csv") as file:
        file.write("new")
    assert (tmp_path / "a.csv").read_text() == "new"


def test_a_name_that_leaves_no_room_for_the_unfinished_file_is_refused_before_any_work(tmp_path):
    with pytest.raises(InputError, match="File name too long"):
        check_out(tmp_path / ("a" * 248 + ".csv"))
    check_out(tmp_path / ("a" * 240 + ".csv"))


def test_an_archive_that_is_not_there_is_not_called_damaged(tmp_path):
    with pytest.raises(InputError, match=r"none\.npz: No such file or directory$"), open_arrays(tmp_path / "none.npz"):
        pass
