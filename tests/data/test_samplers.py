import numpy as np
import pytest

from mlvision.data.loader import LoaderConfig
from mlvision.data.manifest import Manifest, Record
from mlvision.data.samplers import SAMPLERS, class_balanced, shuffled
from mlvision.errors import InputError
from mlvision.options import describe_options


def manifest_of(labels: list[tuple[int, ...]], classes: tuple[str, ...]) -> Manifest:
    return Manifest(classes, tuple(Record(f"{i}.jpg", f"{i}.jpg", of) for i, of in enumerate(labels)), "train")


FIFTY = manifest_of([(i % 3,) for i in range(50)], ("a", "b", "c"))


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_order_follows_from_seed_and_epoch(name):
    order, again = (SAMPLERS[name](FIFTY, 3) for _ in range(2))
    epochs = [order(epoch) for epoch in range(4)]
    assert all(rows.dtype == np.int64 and len(rows) == len(epochs[0]) for rows in epochs)
    assert all(((rows >= 0) & (rows < 50)).all() for rows in epochs)
    different = {tuple(rows.tolist()) for rows in [*epochs, SAMPLERS[name](FIFTY, 4)(0)]}
    assert len(different) == 5
    assert again(2).tolist() == epochs[2].tolist()


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_help_describes_each(name):
    summary = (SAMPLERS[name].__doc__ or "").split("\n")[0]
    assert summary
    assert f"{name}: {summary}" in describe_options(LoaderConfig)


def test_shuffled_has_each_image_once():
    order = shuffled(FIFTY, seed=3)
    assert all(sorted(order(epoch).tolist()) == list(range(50)) for epoch in range(4))


def test_class_balanced_sampling_shows_rare_classes_as_often():
    """100 images of class 0, 3 of class 1, none of class 2, one without a label."""
    labels = [(0,)] * 100 + [(1,)] * 3 + [()]
    order = class_balanced(manifest_of(labels, ("common", "rare", "absent")), seed=3)
    rows = order(0)
    assert len(rows) == 104
    assert sum(row < 100 for row in rows) == 52
    counts = [int((rows == row).sum()) for row in (100, 101, 102)]
    assert sorted(counts) == [17, 17, 18]
    assert 103 not in rows
    assert len({int(row) for row in rows if row < 100}) == 52  # none of a class's images twice before all came once
    assert (order(0) == rows).all()
    assert (order(1) != rows).any()
    with pytest.raises(InputError, match="has no label to balance by"):
        class_balanced(manifest_of([()], ("a",)), 0)
