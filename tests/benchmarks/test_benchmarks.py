import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from factories import build_method
from torch.utils.flop_counter import FlopCounterMode

from mlvision.benchmarks import base, data, training
from mlvision.commands import benchmark
from mlvision.data.loader import Loader
from mlvision.data.manifest import Manifest
from mlvision.engine.checkpoint import CheckpointConfig
from mlvision.engine.fit import fit
from mlvision.engine.optim import OptimConfig
from mlvision.engine.trainer import Trainer
from mlvision.errors import InputError
from mlvision.methods import BaselineConfig
from mlvision.models import BackboneConfig, LinearHeadConfig, build_classifier


def test_a_row_compares_the_same_results(tmp_path, capsys):
    benchmark.main(["pooling", "pairs=1", "threads=1", f"out={tmp_path}/rows.json"])
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [row["what"].split(",")[1] for row in written["rows"]] == [" B=64", " B=256"]
    for row in written["rows"]:
        assert row["difference"] < 1e-5
    assert written["environment"]["machine"]
    header, _, *rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert all("roi_align" in row and row.count("|") == header.count("|") for row in rows)


def test_a_ratio_is_the_median_of_pairs(monkeypatch):
    """By a clock that only the calls move: after the warm-up ours takes 1, 2 and 10 s, the peer 3, 2 and 5 s a call."""
    clock = [0.0]
    monkeypatch.setattr(base.time, "perf_counter", lambda: clock[0])

    def taking(*seconds):
        left = iter((9.0, 9.0, *seconds))  # the first two calls warm up and choose the repetitions

        def call():
            clock[0] += next(left)

        return call

    options = base.BenchmarkOptions(pairs=3)
    row = base.compare(taking(1, 2, 10), taking(3, 2, 5), options)
    low, high = 0.5 + 0.2 * 0.5, 1 + 0.8 * 2  # the ratios are 3, 1 and 0.5
    assert row == {"ratio": 1.0, "interval": pytest.approx((low, high)), "ours_ms": 2000.0, "peer_ms": 3000.0}
    of_parts = base.compare(taking(1, 2, 10), taking(3, 2, 5), options, peer_calls=4)
    assert of_parts["ratio"] == 4.0
    assert of_parts["peer_ms"] == 12_000.0


def test_a_short_call_is_repeated(monkeypatch):
    clock, calls = [0.0], {"ours": 0, "peer": 0}
    monkeypatch.setattr(base.time, "perf_counter", lambda: clock[0])

    def taking(name, seconds):
        def call():
            calls[name] += 1
            clock[0] += seconds

        return call

    row = base.compare(taking("ours", 1 / 512), taking("peer", 1 / 8), base.BenchmarkOptions(pairs=2))
    assert row["ratio"] == pytest.approx(64)  # of one call, not of the repetitions
    assert calls == {"ours": 2 + 2 * 10, "peer": 2 + 2}  # 20 ms hold ten calls of 2 ms


def test_the_peak_is_what_a_call_holds_at_once():
    def call():
        for _ in range(3):
            first = torch.ones(1000, 500)
            second = first + first
            del first, second

    assert base.peak_bytes(call, "cpu") == pytest.approx(2 * 4 * 1000 * 500, rel=0.01)


def test_unknown_names_are_refused():
    with pytest.raises(
        InputError,
        match="expected some of mean_ap, .*, loader, .*, train, .*, transport, patchct, heads, explainers, got speed",
    ):
        benchmark.main(["speed"])
    for wrong in ("pairs", "workers", "threads", "device"):
        with pytest.raises(InputError, match=f"{wrong}: expected "):
            benchmark.main(["pooling", f"{wrong}=-1"])


SMALL = [training.TrainSetting("test_resnet", 32, 4), training.TrainSetting("test_vit", 160, 2)]


def baseline(setting):
    torch.manual_seed(0)
    classifier = build_classifier(BackboneConfig(setting.model), LinearHeadConfig(), 5, image_size=setting.side)
    return build_method(BaselineConfig(), classifier)


@pytest.mark.parametrize("setting", SMALL, ids=lambda setting: setting.model)
def test_both_training_steps_do_the_same_work(setting):
    options = base.BenchmarkOptions()
    batch = replace(training.host_batch(setting.num_images, setting.side, 5, options), label_map=None)
    spent = []
    for call in (training.training_step(baseline(setting), batch, options), training.timm_step(setting, 5, options)):
        with FlopCounterMode(display=False) as counter:
            call()
        spent.append(counter.get_total_flops())
    assert spent[0] == spent[1] > 0


def test_the_step_that_is_timed_is_that_of_a_run(tmp_path):
    setting, options, steps = SMALL[0], base.BenchmarkOptions(), 3
    batch = training.host_batch(setting.num_images, setting.side, 5, options)

    class SameBatch(Loader):
        images_per_step = setting.num_images

        def __init__(self, times):
            self.times, self.dataset = times, SimpleNamespace(manifest=Manifest(tuple("abcde"), (), "train"))

        def set_position(self, epoch, start_step=0, plan=None):
            pass

        def __len__(self):
            return training.TRAIN_STEPS

        def __iter__(self):
            return iter([batch] * self.times)

    timed, run = baseline(setting), baseline(setting)
    before = timed.get_parameter("classifier.head.linear.weight").clone()
    step = training.training_step(timed, batch, options)
    for _ in range(steps):
        step()
    run.to(memory_format=torch.channels_last)
    precision, keys = options.precision(), list("abcd")
    optim, size = OptimConfig(epochs=1), setting.num_images
    trainer = Trainer(run, optim, precision, steps_per_epoch=training.TRAIN_STEPS, images_per_step=size, keys=keys)
    fit(
        trainer,
        SameBatch(steps),
        {"val": SameBatch(1)},
        lambda predictions: {"mAP": 0.0},
        run_dir=tmp_path,
        identity={"classes": list("abcde"), "groups": [1] * 5, "data_hashes": {}},
        checkpoint=CheckpointConfig(),
        tensorboard=False,
    )
    ours, its = timed.state_dict(), run.state_dict()
    assert all(torch.equal(ours[name], its[name]) for name in its)
    assert not torch.equal(before, timed.get_parameter("classifier.head.linear.weight"))


def test_each_method_is_trained_against_timm(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "TRAIN_SETTINGS", {"cpu": SMALL[:1]})
    benchmark.main(["train", "pairs=1", "threads=1", f"out={tmp_path}/rows.json"])
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["what"].split()[0], row["target"]) for row in rows] == [
        ("baseline", "0.95"),
        ("ReLabel", "0.85"),
        ("PatchCT", "0.80"),
    ]
    for row in rows:
        assert "test_resnet, 32 px, B=4, C=80, fp32" in row["what"]
        assert row["ours_ms"] > 0
        assert row["peer_ms"] > 0


@pytest.mark.parametrize("workers", [0, 1])
def test_all_loaders_give_the_same_kind_of_batches(workers, tmp_path):
    ours, peers = data.image_loaders(tmp_path, 64, workers)
    for name, loader in (ours | peers).items():
        batches = list(loader)
        assert len(batches) == len(loader) == 2
        assert getattr(loader, "_loader", loader).num_workers == workers
        for batch in batches:
            images = batch.images if name in ours else batch[0]
            assert images.dtype == torch.uint8
            assert images.shape == (32, 3, 224, 224)
            assert images.float().std() > 20  # pictures, not what a failed read would leave
    with_maps = {name: next(iter(loader)).label_map is not None for name, loader in ours.items()}
    assert with_maps == {"loader without label maps": False, "loader with label maps": True}


def test_rows_of_loaders_name_their_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LOADER_IMAGES", 32)
    timed = {"ratio": 4.0, "interval": (4.0, 4.0), "ours_ms": 16.0, "peer_ms": 64.0}
    monkeypatch.setattr(data, "compare", lambda ours, peer, options: timed)
    benchmark.main(["loader", "pairs=1", "threads=1", "workers=0", f"out={tmp_path}/rows.json"])
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [("with label maps" in row["what"], row["peer"].split()[0]) for row in rows] == [
        (False, "timm's"),
        (False, "DataLoader,"),
        (True, "timm's"),
        (True, "DataLoader,"),
    ]
    for row in rows:
        assert "num_workers=0" in row["what"]
        assert row["note"] == "2000 against 500 images/s"  # 32 in 16 ms, 32 in 64 ms
