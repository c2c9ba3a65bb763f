"""Partial labels: what stays known, and that it is drawn as it always was."""

import math
from itertools import pairwise

import numpy as np
import pytest

from mlvision.data.edits import KnownLabelsConfig
from mlvision.data.manifest import Manifest
from mlvision.data.records import Record
from mlvision.errors import InputError


def test_hidden_labels_are_unknown_and_the_others_as_they_were():
    classes = tuple(f"class {c}" for c in range(30))
    records = tuple(Record(f"{i:04d}.jpg", f"{i}", (3, 7, 20), unknown=(5,)) for i in range(200))
    whole = Manifest(classes, records, "train", "made up")

    partial = KnownLabelsConfig(share=0.25, seed=4).apply(whole)

    known = ~np.isnan(partial.targets)
    np.testing.assert_array_equal(partial.targets[known], whole.targets[known])
    others = np.delete(known, 5, axis=1)
    assert not known[:, 5].any()  # unknown before
    assert others.mean() == pytest.approx(0.25, abs=0.02)  # 5,800 draws: 3.5 standard deviations
    assert others[:, [3, 7, 19]].mean() == pytest.approx(0.25, abs=0.06)  # the present ones are hidden as often
    assert partial.protocol == "made up; each label known with probability 0.25 (seed 4)"
    assert [record.labels for record in partial.records] == [tuple(np.flatnonzero(row == 1)) for row in partial.targets]


def test_what_stays_known_at_a_smaller_share_stays_so_at_a_larger_one():
    whole = Manifest(("cat", "dog", "owl"), [Record(f"{i}.jpg", "x", (i % 3,)) for i in range(100)], "train")
    shares = (0.05, 0.3, 0.5, 0.9, 1.0)
    unknown = [np.isnan(KnownLabelsConfig(share=share, seed=1).apply(whole).targets) for share in shares]
    for fewer, more in pairwise(unknown):
        assert (more <= fewer).all()
        assert more.sum() < fewer.sum()
    assert not unknown[-1].any()
    assert KnownLabelsConfig(share=1.0).apply(whole).hash == whole.hash
    assert (unknown[2] != np.isnan(KnownLabelsConfig(share=0.5, seed=2).apply(whole).targets)).any()


def test_the_draw_is_that_of_earlier_versions():
    """Checkpoints and label-map stores carry the hash: it must never change."""
    records = [
        Record(f"{i:04d}.jpg", f"x/{i}", (i % 3,) if i % 2 else (0, 1), unknown=() if i % 4 else (2,))
        for i in range(50)
    ]
    whole = Manifest(("cat", "dog", "owl"), records, "train", "made up")
    assert whole.hash == "b0259e616698c43150f7acafe739f450e4f851c32dde8b9eb34c260771137b50"
    partial = KnownLabelsConfig(share=0.4, seed=3).apply(whole)
    assert partial.hash == "e2f262d683b1f1c938e9de22af3126549038f0a513ebae591c30e938e845f181"


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, math.nan])
def test_a_share_that_is_none_is_refused(share):
    expected = "finite numbers" if math.isnan(share) else "a share above 0, at most 1"
    with pytest.raises(InputError, match=rf"data.edits.known_labels.share: expected {expected}"):
        KnownLabelsConfig(share=share)
