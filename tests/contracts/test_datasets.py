"""What every reader of DATASETS keeps; each reads a small data set in its publisher's layout."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from layouts import LAYOUTS, make_data

from mlvision.config import Config
from mlvision.data import DATASETS, read_split
from mlvision.data.check import check_data, format_check, write_check
from mlvision.data.images import read_record
from mlvision.errors import InputError
from mlvision.options import parse_options

CONFIGS = sorted(p for p in (Path(__file__).parents[2] / "configs").rglob("*.yaml") if "grids" not in p.parts)
every_reader = pytest.mark.parametrize("name", DATASETS)


@pytest.fixture
def data(name, scenes_root, tmp_path):
    """The options of a reader as a config of the repository has them, of a data set that was made for it."""
    configs = (parse_options(Config, [str(path)], prog="train.py", description="").data for path in CONFIGS)
    found = next(data for data in configs if data.name == name)
    make_data(found, scenes_root, tmp_path)
    return dataclasses.replace(found, root=str(tmp_path))


def splits(data):
    return [split for split in (data.train, data.val, data.test) if split]


def test_every_reader_has_a_layout():
    assert set(LAYOUTS) == set(DATASETS)


@every_reader
def test_a_split_is_whole_and_the_same_again(data):
    for split in splits(data):
        manifest = read_split(data, split)
        assert manifest.split == split
        assert len(manifest) > 0
        assert split in manifest.protocol
        assert len(set(manifest.keys)) == len(manifest)
        for record in (manifest.records[0], manifest.records[-1]):
            assert set(record.labels) | set(record.unknown) <= set(range(len(manifest.classes)))
            assert not set(record.labels) & set(record.unknown)
            assert list(record.labels) == sorted(set(record.labels))
        again = read_split(data, split)
        assert (again.hash, again.class_hash, again.keys) == (manifest.hash, manifest.class_hash, manifest.keys)
        targets = manifest.targets
        assert targets.shape == (len(manifest), len(manifest.classes))
        assert set(np.unique(targets[~np.isnan(targets)])) <= {0.0, 1.0}
        assert (targets == 1).any()


@every_reader
def test_splits_have_the_same_classes_and_other_images(data):
    read = [read_split(data, split) for split in dict.fromkeys(splits(data))]
    assert len({manifest.class_hash for manifest in read}) == 1
    keys = [key for manifest in read for key in manifest.keys]
    assert len(set(keys)) == len(keys)


@every_reader
def test_images_have_the_channels_that_are_stated(data):
    manifest = read_split(data, data.train)
    image = read_record(manifest.records[0])
    assert image.dtype in (np.uint8, np.float32)  # the latter of bands that are no colours
    assert image.shape[-1] == manifest.num_channels


@every_reader
def test_a_folder_that_is_not_there_is_named(data):
    for root, message in (("", "data.root is not set"), (f"{data.root}/nowhere", "nowhere is not a folder")):
        with pytest.raises(InputError, match=message):
            read_split(dataclasses.replace(data, root=root), data.train)


@every_reader
def test_a_split_that_is_not_there_is_named(data):
    with pytest.raises(InputError, match="no_such_split|'no_such_split'"):
        read_split(data, "no_such_split")


@every_reader
def test_it_can_be_checked_with_and_without_images(data, tmp_path):
    check, labels = check_data(data), check_data(data, labels_only=True)

    for split, checked in check.splits.items():
        assert checked.unreadable == ()
        assert all(checked.digests)
        assert labels.splits[split].class_counts["present"].sum() > 0
        assert f"{split}: {checked.manifest.protocol}" in format_check(labels)
    write_check(check, tmp_path / "out", samples=2, seed=0)
    assert (tmp_path / "out" / "contact_sheet.png").is_file()
