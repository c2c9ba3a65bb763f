import json

import pytest
import torch

from mlvision.errors import InputError
from tools import benchmark


def test_a_row_compares_the_same_results(tmp_path, capsys):
    benchmark.main(["pooling", "pairs=1", "threads=1", f"out={tmp_path}/rows.json"])
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [row["what"].split(",")[1] for row in written["rows"]] == [" B=64", " B=256"]
    for row in written["rows"]:
        assert row["difference"] < 1e-5
        assert row["ratio"] == pytest.approx(row["peer_ms"] / row["ours_ms"])
    assert written["environment"]["machine"]
    header, _, *rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert all("roi_align" in row and row.count("|") == header.count("|") for row in rows)


def test_the_peak_is_what_a_call_holds_at_once():
    def call():
        for _ in range(3):
            first = torch.ones(1000, 500)
            second = first + first
            del first, second

    assert benchmark.peak_bytes(call, "cpu") == pytest.approx(2 * 4 * 1000 * 500, rel=0.01)


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="expected some of mean_ap, .*, transport, patchct, explainers, got speed"):
        benchmark.main(["speed"])
    with pytest.raises(InputError, match="expected pairs >= 1"):
        benchmark.main(["pooling", "pairs=0"])
