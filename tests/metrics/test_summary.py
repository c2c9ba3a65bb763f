import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, precision_recall_fscore_support

from mlvision.errors import InputError
from mlvision.metrics import average_precision, multilabel_summary, per_class_table
from mlvision.space import LabelSpace

NAN = math.nan
SEVEN = ("CP", "CR", "CF1", "CF1_mean", "OP", "OR", "OF1")


def simulated(num_images=500, num_classes=9, seed=0):
    rng = np.random.default_rng(seed)
    targets = (rng.random((num_images, num_classes)) < np.geomspace(0.05, 0.5, num_classes)).astype(np.float32)
    targets[0] = 1
    return (rng.standard_normal(targets.shape) + 2 * targets - 1).astype(np.float32), targets


def test_numbers_match_sklearn():
    logits, targets = simulated()
    summary = multilabel_summary(logits, targets, threshold=0.3, top_k=2)
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    ranks = (-logits).argsort(axis=1).argsort(axis=1)
    rules = {"": probabilities >= 0.3, "_top2": (probabilities >= 0.3) & (ranks < 2), "_exact2": ranks < 2}
    for suffix, decided in rules.items():
        cp, cr, cf1_mean, _ = precision_recall_fscore_support(targets, decided, average="macro", zero_division=0)
        op, overall_recall, of1, _ = precision_recall_fscore_support(targets, decided, average="micro")
        expected = (cp, cr, 2 * cp * cr / (cp + cr), cf1_mean, op, overall_recall, of1)
        np.testing.assert_allclose([summary[name + suffix] for name in SEVEN], expected, rtol=1e-12)
    assert summary["mAP"] == pytest.approx(average_precision_score(targets, logits), abs=1e-12)
    for flavour in ("envelope", "voc11"):
        assert summary[f"mAP_{flavour}"] == average_precision(logits, targets, flavour).mean()


def test_keys_are_flat_and_the_dict_is_json():
    logits, targets = simulated()
    targets[:, 4] = 0
    targets[3, [1, 2]] = NAN
    summary = multilabel_summary(torch.from_numpy(logits), torch.from_numpy(targets))
    names = ["mAP", "mAP_envelope", "mAP_voc11"] + [n + s for s in ("", "_top3", "_exact3") for n in SEVEN]
    assert list(summary) == [
        *names,
        *("threshold", "num_images", "num_classes", "num_skipped_classes", "num_unknown"),
    ]
    assert all(type(value) in (float, int) for value in summary.values())
    assert json.loads(json.dumps(summary)) == summary
    counts = {name: summary[name] for name in summary if name.startswith("num_")}
    assert counts == {"num_images": 500, "num_classes": 9, "num_skipped_classes": 1, "num_unknown": 2}


def test_a_logit_of_zero_is_a_yes_at_one_half():
    logits = np.array([[0.0, -1e-30], [1e-30, -5.0]], dtype=np.float32)
    table = per_class_table(logits, np.ones((2, 2), dtype=np.float32), ["a", "b"])
    assert [row["recall"] for row in table] == [1.0, 0.0]


def test_undefined_numbers_are_nan_not_none():
    summary = multilabel_summary(np.zeros((3, 4), dtype=np.float32), np.zeros((3, 4), dtype=np.float32))
    assert all(math.isnan(summary[name]) for name in ("mAP", "mAP_voc11", "CF1", "OP", "OF1_top3"))
    assert summary["num_skipped_classes"] == 4


def test_table_by_hand():
    logits = np.array([[2.0, -1.0, 0.5], [1.0, 3.0, -4.0], [-1.0, 1.0, -3.0], [0.5, -2.0, 2.0]], dtype=np.float32)
    targets = np.array([[1, 0, 0], [0, 1, NAN], [1, NAN, 0], [0, 1, 0]], dtype=np.float32)
    rows = per_class_table(logits, targets, ["cat", "dog", "owl"])
    assert rows[0] == {
        "class": "cat",
        "num_positive": 2,
        "num_negative": 2,
        "num_unknown": 0,
        "ap": (1 + 2 / 4) / 2,
        "precision": 1 / 3,
        "recall": 1 / 2,
        "f1": 2 / 5,
    }
    # Known images by score: present, absent, present.
    assert rows[1]["ap"] == (1 + 2 / 3) / 2
    assert (rows[1]["num_positive"], rows[1]["num_negative"], rows[1]["num_unknown"]) == (2, 1, 1)
    assert (rows[1]["precision"], rows[1]["recall"]) == (1.0, 0.5)
    assert (rows[2]["num_positive"], rows[2]["num_negative"], rows[2]["num_unknown"]) == (0, 3, 1)
    assert all(math.isnan(rows[2][name]) for name in ("ap", "precision", "recall", "f1"))
    assert all(type(value) in (str, float, int) for row in rows for value in row.values())


def test_means_of_the_table_are_the_summary():
    logits, targets = simulated(seed=2)
    targets[:, 2] = 0
    targets[np.random.default_rng(0).random(targets.shape) < 0.2] = NAN
    summary = multilabel_summary(logits, targets, threshold=0.4)
    rows = per_class_table(logits, targets, [f"class {c}" for c in range(9)], threshold=0.4)
    for column, name in {"ap": "mAP", "precision": "CP", "recall": "CR", "f1": "CF1_mean"}.items():
        assert np.nanmean([row[column] for row in rows]) == pytest.approx(summary[name], rel=1e-13)
    assert sum(row["num_unknown"] for row in rows) == summary["num_unknown"]


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.5, 50.0])
def test_a_threshold_that_is_no_probability_is_refused(threshold):
    with pytest.raises(InputError, match=f"threshold {threshold}: expected a probability between 0 and 1"):
        multilabel_summary(*simulated(), threshold=threshold)


def test_one_name_for_each_class():
    with pytest.raises(InputError, match="classes: 2 names for logits of 9 classes"):
        per_class_table(*simulated(), ["a", "b"])


def test_a_softmax_model_is_judged_at_its_own_probabilities():
    """Log-softmax logits are all negative: no sigmoid of them reaches a half. Any constant added changes nothing."""
    logits = np.log(np.array([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.4, 0.35, 0.25]], dtype=np.float32))
    targets = np.array([[1, 0, 0], [0, 1, 1], [1, 0, 0]], dtype=np.float32)
    space = LabelSpace(("a", "b", "c")).with_softmax()
    for shift in (0, 5):
        summary = multilabel_summary(logits + shift, targets, space=space)
        assert (summary["OP"], summary["OR"]) == (1.0, 0.5)  # 0.6 and 0.7 reach a half, both right, of four labels
        rows = per_class_table(logits + shift, targets, ["a", "b", "c"], space=space)
        assert [row["recall"] for row in rows] == [0.5, 0.0, 1.0]
    assert multilabel_summary(logits, targets)["OR"] == 0  # every sigmoid is below a half


def test_classes_that_exclude_each_other_are_decided_by_the_highest():
    """Two groups, of two classes and of three, and a class for itself, which alone has a threshold."""
    logits = np.array([[-5, -4, 0, 1, 1, 0.5], [3, 2, -1, -3, -2, -0.5]], dtype=np.float32)
    targets = np.array([[0, 1, 0, 1, 0, 1], [0, 1, 1, 0, 0, 1]], dtype=np.float32)
    space = LabelSpace(tuple("abcdef"), exclusive=(2, 3, 1))
    decided = [[0, 1, 0, 1, 0, 1], [1, 0, 1, 0, 0, 0]]  # of the equal two the first
    for ours in (space, space.with_softmax()):
        summary = multilabel_summary(logits, targets, top_k=2, space=ours)
        hits = np.sum(decided * targets)
        assert (summary["OP"], summary["OR"]) == (hits / 5, hits / 6)
        rows = per_class_table(logits, targets, "abcdef", space=ours)
        assert [row["recall"] for row in rows] == pytest.approx([NAN, 0.5, 1, 1, NAN, 0.5], nan_ok=True)
    with pytest.raises(InputError, match="space: has 6 classes, the logits have 5"):
        multilabel_summary(logits[:, :5], targets[:, :5], space=space)
