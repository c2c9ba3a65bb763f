"""Post-hoc steps of a run: eval.py fits them, and eval.py, predict.py and explain.py use them."""

import csv
import json
import shutil

import numpy as np
import pytest

from mlvision import load_run
from mlvision.commands import eval as eval_script
from mlvision.commands import explain, predict
from mlvision.commands import train as train_script
from mlvision.errors import InputError


@pytest.fixture(scope="module")
def trained(scenes_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("posthoc") / "run"
    train_script.main(
        ["configs/smoke/scenes_test_resnet_baseline.yaml", f"data.root={scenes_root}", "device=cpu", "threads=1",
         "data.val_fraction=0.4", "optim.epochs=1", "loader.num_workers=0", "log.tensorboard=false", f"out={folder}"]
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def judged(trained):
    """The run with the metrics of its test split before and after steps were fitted."""
    plain = eval_script.main([str(trained)])
    return trained, plain, eval_script.main([str(trained), "posthoc=[{name: thresholds, min_positives: 2}]"])


def chain_of(folder):
    return json.loads((folder / "posthoc/chain.json").read_text())


def thresholds_of(folder):
    return np.array(chain_of(folder)["steps"][0]["state"]["thresholds"], dtype=np.float32)


def cf1(decided, targets):
    """By hand: the harmonic mean of the mean precision and the mean recall of classes that are present somewhere."""
    known = targets.sum(0) > 0
    hits, predicted = (decided * targets).sum(0)[known], decided.sum(0)[known]
    precision, recall = (hits / np.maximum(predicted, 1)).mean(), (hits / targets.sum(0)[known]).mean()
    return 2 * precision * recall / (precision + recall)


def test_eval_reports_what_the_fitted_thresholds_give_beside_the_plain_results(judged, capsys):
    folder, plain, found = judged
    assert {name: found[name] for name in ("raw", "ema")} == {name: plain[name] for name in ("raw", "ema")}
    assert "posthoc" not in plain
    with np.load(folder / "predictions_test.npz") as arrays:
        scores, targets = 1 / (1 + np.exp(-arrays["logits"])), arrays["targets"]
    assert found["posthoc"]["CF1"] == pytest.approx(cf1(scores >= thresholds_of(folder), targets))
    assert found["posthoc"]["CF1"] > plain["ema"]["CF1"]
    assert found["posthoc"]["mAP"] == plain["ema"]["mAP"]
    assert found["protocol"].startswith(plain["protocol"] + "; posthoc: thresholds of the highest F1 for ")
    assert found["protocol"].endswith(", fitted on 38 validation images")
    saved = {name: json.loads((folder / name).read_text()) for name in ("metrics.json", "record.json")}
    assert saved["metrics.json"]["test"]["posthoc"]["threshold"] is None
    assert saved["record.json"]["metrics"]["posthoc"]["CF1"] == found["posthoc"]["CF1"]
    rows = list(csv.DictReader(open(folder / "per_class_test.csv", newline="")))
    assert np.float32([row["threshold"] for row in rows]).tolist() == thresholds_of(folder).tolist()
    f1 = [float(row["f1_posthoc"]) for row in rows if int(row["num_positive"])]
    assert np.mean(f1) == pytest.approx(found["posthoc"]["CF1_mean"])

    # The run has them from now on.
    capsys.readouterr()
    assert eval_script.main([str(folder)])["posthoc"]["CF1"] == found["posthoc"]["CF1"]
    assert f"posthoc  CF1 {plain['ema']['CF1']:.4f} -> {found['posthoc']['CF1']:.4f}  OF1 " in capsys.readouterr().out
    fitting = eval_script.main([str(folder), "split=val", "posthoc=[thresholds]", "posthoc.0.min_positives=2"])
    assert "(of the images that it was fitted on)" in capsys.readouterr().out
    assert fitting["posthoc"]["CF1_mean"] >= fitting["ema"]["CF1_mean"]
    assert chain_of(folder)["fitted_on"] == {
        "role": "val",
        "protocol": chain_of(folder)["fitted_on"]["protocol"],
        "num_images": 38,
        "weights": "ema",
        "step": load_run(folder, device="cpu").step,
    }


def test_predictions_and_explanations_use_them_unless_a_threshold_is_given(judged, tmp_path, capsys):
    folder, thresholds = judged[0], thresholds_of(judged[0])
    arguments = [str(folder), "split=val", "device=cpu", "num_workers=0"]
    predict.main([*arguments, f"out={tmp_path}/p.jsonl"])
    predict.main([*arguments, f"out={tmp_path}/half.jsonl", "threshold=0.5"])
    assert "post-hoc steps: thresholds of the highest F1 for " in capsys.readouterr().out
    with pytest.raises(InputError, match="extra_labels: the run's post-hoc steps were fitted for its own classes only"):
        predict.main([*arguments, f"out={tmp_path}/p.jsonl", "extra_labels=[unicorn]"])
    differ = 0
    for line, half in zip(*(map(json.loads, open(tmp_path / name)) for name in ("p.jsonl", "half.jsonl")), strict=True):
        scores = np.array(list(line["scores"].values()))
        sure = np.abs(scores - thresholds) > 1e-6  # scores are written with six decimals
        reached = np.isin(list(line["scores"]), line["labels"])
        assert (reached == (scores >= thresholds))[sure].all()
        assert line["scores"] == half["scores"]
        assert half["labels"] == [name for name, score in half["scores"].items() if score >= 0.5]
        differ += line["labels"] != half["labels"]
    assert differ
    run = load_run(folder, device="cpu")
    assert run.thresholds.tolist() == thresholds.tolist()
    out = explain.main([*arguments, "num_images=4", "labels=predicted", f"out={tmp_path}/explained"])
    with np.load(next((out / "maps/grad_cam").iterdir())) as arrays:
        assert arrays["labels"].tolist() == np.flatnonzero(arrays["scores"] >= thresholds).tolist()
        assert json.loads(str(arrays["about"]))["threshold"] == thresholds.tolist()
    assert "each label's own" in (out / "report/data/index.js").read_text()


def test_steps_of_another_checkpoint_are_refused_and_the_command_that_fits_them_anew_is_named(judged, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(judged[0], folder)
    anew = f"fit anew with: python eval.py {folder} split=val posthoc=.thresholds."
    with pytest.raises(InputError, match=f"on the ema weights of step .* these are the raw weights .*; {anew}"):
        _ = load_run(folder, device="cpu", weights="raw").posthoc
    chain = chain_of(folder)
    chain["fitted_on"]["step"] += 1
    (folder / "posthoc/chain.json").write_text(json.dumps(chain))
    arguments = [str(folder), "split=val", "device=cpu", "num_workers=0", f"out={tmp_path}/p.csv"]
    for main, given in ((eval_script.main, [str(folder)]), (predict.main, arguments)):
        with pytest.raises(InputError, match=f"chain.json: fitted on the ema weights of step .*; {anew}"):
            main(given)
    predict.main([*arguments, "threshold=0.5"])
    last = load_run(folder / "checkpoints/last.pt", device="cpu")  # has its own steps, or none
    assert (last.posthoc, last.thresholds) == (None, 0.5)
    assert last.posthoc_file.name == "chain_last.json"


def test_steps_that_are_none_are_refused_before_anything_is_predicted(trained, monkeypatch):
    monkeypatch.setattr(eval_script, "predict", lambda *_: pytest.fail("evaluation has begun"))
    for arguments, message in (
        (["posthoc=[treshold]"], "posthoc.0.name: expected one of thresholds, .* did you mean thresholds?"),
        (["posthoc=[thresholds]", "posthoc.0.gamma=2"], "posthoc.0.gamma: no such option"),
        (["posthoc=[thresholds]", "posthoc.0.min_positives=0"], "posthoc.thresholds.min_positives: expected 1 or more"),
    ):
        with pytest.raises(InputError, match=message):
            eval_script.main([str(trained), *arguments])


def test_too_few_positives_leave_the_run_as_it_was(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/posthoc", ignore_errors=True)
    with pytest.raises(InputError, match="posthoc.thresholds: expected a class that is present in 39 of the 38 "):
        eval_script.main([f"{tmp_path}/run", "posthoc=[thresholds]", "posthoc.0.min_positives=39"])
    assert not (tmp_path / "run/posthoc").exists()
