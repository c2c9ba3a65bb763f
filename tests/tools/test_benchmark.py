import json

import pytest

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
    assert "roi_align" in capsys.readouterr().out


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="expected some of pooling, store, annotate, relabel, got speed"):
        benchmark.main(["speed"])
    with pytest.raises(InputError, match="expected pairs >= 1"):
        benchmark.main(["pooling", "pairs=0"])
