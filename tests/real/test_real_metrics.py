"""Metrics on real label matrices (real prevalences and co-occurrence), with simulated scores, against scikit-learn."""

import csv
import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, precision_recall_fscore_support

from mlvision.metrics import average_precision, decide, f_measures, multilabel_summary


@pytest.fixture(scope="module")
def label_files():
    root = os.environ.get("MLVISION_REAL_DATA")
    if not root:
        pytest.skip("MLVISION_REAL_DATA is not set")
    folder = Path(root) / "label_files"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing")
    return folder


def multi_hot_list(path):
    """`image 0 1 0 ...` lines."""
    with gzip.open(path, "rt") as lines:
        return np.array([line.split()[1:] for line in lines]).astype(np.float32)


def simulated_logits(targets, seed=0):
    """Some classes easy, some near chance; shifted so that rare classes are rarely predicted, as in practice."""
    rng = np.random.default_rng(seed)
    gap = rng.uniform(0.2, 5, targets.shape[1])
    noise = rng.standard_normal(targets.shape)
    return (noise + gap * np.nan_to_num(targets) - 2).astype(np.float32)


@pytest.mark.parametrize("name", ["coco_test", "nuswide_81_m_test", "mirflickr_test"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lists_match_sklearn(label_files, name, dtype):
    targets = multi_hot_list(label_files / "other" / f"{name}.txt.gz")
    logits = torch.from_numpy(simulated_logits(targets)).to(dtype).float().numpy()
    present = targets.any(axis=0)
    ours = average_precision(logits, targets)
    assert (np.isnan(ours) == ~present).all()
    expected = average_precision_score(targets[:, present], logits[:, present], average=None)
    np.testing.assert_allclose(ours[present], expected, rtol=0, atol=1e-9)

    for threshold, top_k in [(0.0, None), (0.0, 3), (None, 3)]:
        decided = decide(logits, threshold=threshold, top_k=top_k)
        measures = f_measures(decided, targets)
        assert measures.num_skipped == (~present).sum()
        macro = precision_recall_fscore_support(
            targets[:, present], decided[:, present], average="macro", zero_division=0
        )
        micro = precision_recall_fscore_support(targets, decided, average="micro")
        np.testing.assert_allclose((measures.CP, measures.CR, measures.CF1_mean), macro[:3], rtol=1e-12)
        np.testing.assert_allclose((measures.OP, measures.OR, measures.OF1), micro[:3], rtol=1e-12)


def test_voc_difficult_labels_are_left_out(label_files):
    with gzip.open(label_files / "voc2007" / "multilabel_test.csv.gz", "rt") as lines:
        rows = list(csv.reader(lines))[1:]
    ternary = np.array([row[-20:] for row in rows]).astype(np.float32)
    assert ternary.shape == (4952, 20)
    targets = np.select([ternary == 1, ternary == -1], [1.0, 0.0], default=np.nan).astype(np.float32)
    logits = simulated_logits(targets)
    ours = average_precision(logits, targets)
    for c in range(20):
        known = ~np.isnan(targets[:, c])
        expected = average_precision_score(targets[known, c], logits[known, c])
        assert ours[c] == pytest.approx(expected, abs=1e-12)
    summary = multilabel_summary(logits, targets)
    assert summary["num_unknown"] == (ternary == 0).sum() > 0
    assert summary["mAP_voc11"] < summary["mAP"] < summary["mAP_envelope"]
