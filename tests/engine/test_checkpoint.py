import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mlvision.engine.checkpoint import check_classes, load_checkpoint, save_checkpoint
from mlvision.errors import InputError


def test_round_trip(tmp_path):
    weights = torch.randn(3, 5)
    save_checkpoint(tmp_path / "new" / "a.pt", {"weights": weights, "step": 7})
    loaded = load_checkpoint(tmp_path / "new" / "a.pt")
    assert torch.equal(loaded["weights"], weights)
    assert loaded["step"] == 7
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.pt"]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from mlvision.engine.checkpoint import save_checkpoint
from mlvision.errors import InputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    save_checkpoint(Path(sys.argv[1]), {"weights": torch.zeros(1_000_000), "step": 2})
except InputError as error:
    print(error)
"""


def test_a_write_that_fails_leaves_the_previous_checkpoint_whole(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})
    before = path.read_bytes()
    # The system itself refuses to write more than 200 kB, as a full disk would.
    result = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True)
    assert "could not be written" in result.stdout
    assert "the previous one is kept" in result.stdout
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_truncated_foreign_and_missing_files_are_named(tmp_path):
    whole = tmp_path / "whole.pt"
    save_checkpoint(whole, {"weights": torch.randn(1000)})
    data = whole.read_bytes()
    for share in (0.1, 0.5, 0.99):
        cut = tmp_path / f"cut{share}.pt"
        cut.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(InputError, match=f"{cut.name}: not a checkpoint, or a truncated one"):
            load_checkpoint(cut)
    damaged = tmp_path / "damaged.pt"
    middle = len(data) // 3
    damaged.write_bytes(data[:60] + bytes(200) + data[260:middle] + data[middle:])
    with pytest.raises(InputError, match="damaged.pt"):
        load_checkpoint(damaged)
    foreign = tmp_path / "foreign.pt"
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, foreign)
    with pytest.raises(InputError, match="foreign.pt: expected 'mlvision checkpoint"):
        load_checkpoint(foreign)
    malicious = tmp_path / "code.pt"
    torch.save({"path": Path}, malicious)  # a class: weights_only refuses to unpickle it
    with pytest.raises(InputError, match="code.pt"):
        load_checkpoint(malicious)
    with pytest.raises(InputError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt")


def test_class_lists_must_agree(tmp_path):
    check_classes(tmp_path, ["a", "b"], ("a", "b"))
    with pytest.raises(InputError, match="class 1 is 'b' in the checkpoint, 'c' in the data"):
        check_classes(tmp_path, ["a", "b"], ("a", "c"))
    with pytest.raises(InputError, match="trained on 2 classes, but the data has 3"):
        check_classes(tmp_path, ["a", "b"], ("a", "b", "c"))
