import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faults import damaged

from mlvision.engine.checkpoint import FORMAT, check_classes, load_checkpoint, save_checkpoint
from mlvision.engine.seed import rng_state
from mlvision.engine.trainer import LossWindow
from mlvision.errors import InputError


def run_state(weights: torch.Tensor | None = None) -> dict:
    """All that a run of one layer keeps."""
    layer = torch.nn.Linear(5, 3)
    weights = layer.weight.detach() if weights is None else weights
    window = LossWindow()
    window.add({"loss": torch.tensor(1.0)})
    return {
        "method": {"weight": weights},
        "ema": None,
        "classes": ["a", "b", "c"],
        "epoch": 1,
        "step": 7,
        "best": 0.5,
        "best_epoch": 0,
        "data_hashes": {"training records": "0123"},
        "optimizer": torch.optim.AdamW(layer.parameters()).state_dict(),
        "scaler": {},
        "rng": rng_state(),
        "window": window.state(),
        "log_position": 120,
    }


def test_round_trip(tmp_path):
    weights = torch.randn(3, 5)
    save_checkpoint(tmp_path / "new" / "a.pt", run_state(weights))
    loaded = load_checkpoint(tmp_path / "new" / "a.pt", to_resume=True)
    assert torch.equal(loaded["method"]["weight"], weights)
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
    save_checkpoint(path, run_state())
    before = path.read_bytes()
    # The system itself refuses to write more than 200 kB, as a full disk would.
    result = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True)
    assert result.stdout == f"{path}: could not be written (File too large); the previous one is kept\n"
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_truncated_foreign_and_missing_files_are_named(tmp_path):
    whole = tmp_path / "whole.pt"
    save_checkpoint(whole, run_state(torch.randn(1000)))
    data = whole.read_bytes()
    for share in (0.1, 0.5, 0.99):
        cut = tmp_path / f"cut{share}.pt"
        cut.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(InputError, match=f"{cut.name}: the file is damaged, or was cut short"):
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


@pytest.mark.parametrize("entry", ["method", "ema", "classes", "epoch", "step"])
def test_a_checkpoint_without_an_entry_of_a_run_is_refused(tmp_path, entry):
    state = run_state()
    del state[entry]
    save_checkpoint(tmp_path / "best.pt", state)
    with pytest.raises(
        InputError, match=f"best.pt: its entry '{entry}' is missing; expected a checkpoint that train.py"
    ):
        load_checkpoint(tmp_path / "best.pt")


@pytest.mark.parametrize("entry", ["best", "data_hashes", "optimizer", "scaler", "rng", "window", "log_position"])
def test_training_goes_on_from_whole_checkpoints_only(tmp_path, entry):
    state = run_state()
    del state[entry]
    save_checkpoint(tmp_path / "last.pt", state)
    assert load_checkpoint(tmp_path / "last.pt")["classes"] == ["a", "b", "c"]
    with pytest.raises(InputError, match=f"last.pt: its entry '{entry}' is missing"):
        load_checkpoint(tmp_path / "last.pt", to_resume=True)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("method", [torch.zeros(1)]), ("method", {"weight": 1.0}), ("ema", 3), ("classes", []), ("classes", "abc"),
        ("classes", ["a", 1]), ("epoch", -1), ("epoch", "1"), ("epoch", None), ("optimizer", {"state": {}}),
        ("window", {"sums": [], "count": 0}), ("window", {"sums": {"loss": torch.ones(())}, "counts": {}}),
        ("window", {"sums": {"loss": torch.ones(())}, "counts": {"loss": 1.5}}),
        ("window", {"sums": {"loss": torch.ones(())}}), ("data_hashes", {"training records": 5}), ("log_position", 1.5),
        ("groups", [1]), ("groups", [4, -1]), ("groups", "3"), ("groups", None),
        ("helpers", {"teacher": [1]}), ("helpers", None), ("plan", {"order": None}), ("plan", 3),
        ("plan", {"order": 5, "targets": None, "extra": {}}),
    ],
)  # fmt: skip
def test_entries_of_another_kind_are_refused(tmp_path, entry, value):
    save_checkpoint(tmp_path / "last.pt", run_state() | {entry: value})
    with pytest.raises(InputError, match=f"last.pt: its entry '{entry}' is not as a run writes it"):
        load_checkpoint(tmp_path / "last.pt", to_resume=True)


def test_training_goes_on_from_a_checkpoint_with_one_count_of_steps(tmp_path):
    """As they were written first."""
    window = {"sums": {"loss": torch.tensor(6.0)}, "count": 3}
    save_checkpoint(tmp_path / "last.pt", run_state() | {"window": window})
    restored = LossWindow()
    restored.restore(load_checkpoint(tmp_path / "last.pt", to_resume=True)["window"], torch.device("cpu"))
    assert restored.pop() == {"train/loss": 2.0}


def test_a_flipped_bit_of_a_weight_is_noticed(tmp_path):
    """torch reads such a file without a word."""
    weights = torch.randn(1000)
    path = tmp_path / "last.pt"
    save_checkpoint(path, run_state(weights))
    content = bytearray(path.read_bytes())
    content[content.find(weights[500:510].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["method"]["weight"], weights)
    with pytest.raises(InputError, match=r"last.pt: the file is damaged: the checksum of '.*data/\d+' does not match"):
        load_checkpoint(path)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.slow
def test_damage_anywhere_is_noticed_or_harmless(tmp_path):
    """A flipped bit, a byte that is another, a missing end, a hole: the very state, or one line."""
    state, path = run_state(torch.randn(100)), tmp_path / "last.pt"
    save_checkpoint(path, state)
    refused = []
    for content in damaged(path.read_bytes(), num=400, seed=0, hole=40):
        path.write_bytes(content)
        try:
            loaded = load_checkpoint(path, to_resume=True)
        except InputError as error:
            refused.append(str(error))
        else:
            assert same(loaded, {"format": FORMAT, **state})
    assert len(refused) > 200
    assert all(message.startswith(f"{path}: ") and "\n" not in message for message in refused)
