from collections import Counter

import pytest

from mlvision.data.edits import SinglePositiveConfig
from mlvision.data.manifest import Manifest
from mlvision.data.records import Record
from mlvision.errors import InputError

LABELS = [(0, 2, 3), (1,), (), (0, 1)]


@pytest.fixture
def manifest():
    """Of every fifth image class 4 is unknown."""
    records = [Record(f"{i}", f"{i}", LABELS[i % 4], unknown=(4,) if i % 5 == 0 else ()) for i in range(400)]
    return Manifest(tuple("abcde"), records, "train")


def test_one_present_label_stays_and_all_others_are_unknown(manifest):
    edited = SinglePositiveConfig().apply(manifest)
    for before, after in zip(manifest.records, edited.records, strict=True):
        assert len(after.labels) == min(1, len(before.labels))
        assert set(after.labels) <= set(before.labels)
        assert set(after.unknown) == set(range(5)) - set(after.labels)
    assert "one present label known, others unknown (seed 0)" in edited.protocol


def test_others_may_count_as_absent(manifest):
    absent, unknown = (SinglePositiveConfig(others=others).apply(manifest) for others in ("absent", "unknown"))
    for before, after, other in zip(manifest.records, absent.records, unknown.records, strict=True):
        assert after.labels == other.labels
        assert after.unknown == before.unknown


def test_the_labels_of_an_image_are_drawn_evenly_and_another_seed_draws_others(manifest):
    """Of 100 images with three labels each is kept about 33 times, within four standard deviations of 4.7."""
    drawn = [SinglePositiveConfig(seed=seed).apply(manifest) for seed in (0, 1)]
    kept = Counter(record.labels[0] for record in drawn[0].records[::4])
    assert set(kept) == {0, 2, 3}
    assert all(33 - 19 <= number <= 33 + 19 for number in kept.values())
    assert drawn[0].hash != drawn[1].hash


@pytest.mark.parametrize("options", [{"others": "present"}, {"seed": -1}])
def test_bad_options_are_refused(options):
    with pytest.raises(
        InputError, match=r"^data.edits.single_positive.(others: expected one of unknown|seed: expected 0)"
    ):
        SinglePositiveConfig(**options)
