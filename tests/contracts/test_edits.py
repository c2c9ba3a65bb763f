"""What every edit of EDITS keeps: the order of images and classes, the input, and a draw by seed and key."""

from dataclasses import replace
from typing import Annotated

import numpy as np
import pytest

from mlvision.config import Config
from mlvision.data.edits import EDITS, EditConfig, KnownLabelsConfig, apply_edits
from mlvision.data.manifest import Manifest
from mlvision.data.records import Record
from mlvision.errors import InputError
from mlvision.options import build_options, describe_options, to_plain

every_edit = pytest.mark.parametrize("edit", [config() for config in EDITS.values()], ids=EDITS.keys())


def labelled(num_images, num_classes):
    """Images with all numbers of present classes, some of which are unknown already; long-tailed."""
    present = np.random.default_rng(5).random((num_images, num_classes)) < np.linspace(0.9, 0.05, num_classes)
    records = [
        Record(
            f"{i:03d}.jpg",
            f"x/{i:03d}.jpg",
            tuple(np.flatnonzero(row).tolist()),
            (0,) if i % 7 == 0 and not row[0] else (),
        )
        for i, row in enumerate(present)
    ]
    return Manifest(tuple(f"class {c}" for c in range(num_classes)), records, "train", "made up")


def labels_by_key(manifest):
    return {record.key: (record.labels, record.unknown) for record in manifest.records}


@every_edit
@pytest.mark.parametrize("num_classes", [9, 1])
def test_images_classes_and_split_are_as_they_were(edit, num_classes):
    whole = labelled(80, num_classes)
    keys, before, given_hash = whole.keys, labels_by_key(whole), whole.hash
    edited = edit.apply(whole)
    assert (edited.classes, edited.split) == (whole.classes, whole.split)
    assert edited.keys == [key for key in keys if key in set(edited.keys)]  # none new, none moved
    assert len(edited) == 80 or f"{len(edited)} of 80 images" in edited.protocol
    assert [edited.records[i].path for i in range(len(edited))] == [f"x/{key}" for key in edited.keys]
    for labels, unknown in labels_by_key(edited).values():
        assert labels == tuple(sorted(set(labels)))
        assert unknown == tuple(sorted(set(unknown)))
        assert not set(labels) & set(unknown)
        assert set(labels) | set(unknown) <= set(range(num_classes))
    assert (whole.keys, whole.protocol, labels_by_key(whole)) == (keys, "made up", before)
    assert replace(whole).hash == given_hash


@every_edit
def test_it_changes_something_and_the_hash_and_the_protocol_show_it(edit):
    whole = labelled(80, 9)
    edited = edit.apply(whole)
    assert labels_by_key(edited) != labels_by_key(whole)
    assert edited.hash != whole.hash
    assert edited.protocol.startswith("made up; ")
    assert len(edited.protocol) > len("made up; ")


@every_edit
def test_the_draw_depends_on_seed_and_key_only(edit):
    whole = labelled(80, 9)
    edited = edit.apply(whole)
    assert edit.apply(whole).hash == edited.hash
    assert labels_by_key(edit.apply(whole.select(range(79, -1, -1)))) == labels_by_key(edited)
    if hasattr(edit, "seed"):
        assert replace(edit, seed=edit.seed + 1).apply(whole).hash != edited.hash


@every_edit
def test_options_are_read_again_and_refused_out_of_range(edit):
    config = build_options(Config, {}, overrides=[f"data.edits=[{edit.name}]"])
    assert config.data.edits == [edit]
    assert build_options(Config, to_plain(config)) == config
    assert f"with data.edits.0.name={edit.name}: " in describe_options(Config)
    assert EDITS[edit.name] is type(edit)
    if hasattr(edit, "seed"):
        with pytest.raises(InputError, match=f"data.edits.{edit.name}.seed: expected 0 or more, got -1"):
            replace(edit, seed=-1)


class Drop(EditConfig):
    """Drops the first image."""

    name: Annotated[str, "which edit"] = "drop"

    def apply(self, manifest):
        return manifest.select(range(1, len(manifest))).noted("the first image dropped")


def test_edits_are_applied_in_their_order_and_leave_an_image():
    whole = labelled(2, 3)
    assert apply_edits([], whole) is whole
    assert apply_edits([Drop("drop")], whole).protocol == "made up; the first image dropped"
    with pytest.raises(InputError) as raised:
        apply_edits([Drop("drop"), Drop("drop")], whole)
    assert str(raised.value) == (
        "data.edits.1: drop leaves none of the 1 images of split 'train'; expected at least one"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.edits=[known_lables]"], "data.edits.0.name: expected one of .*did you mean known_labels?"),
        (["data.edits=[known_labels]", "data.edits.0.shares=0.5"], "did you mean data.edits.0.share?"),
        (["data.edits=[known_labels]", "data.edits.0.gamma=2"], "data.edits.0.gamma: no such option"),
        (["data.edits=[known_labels]", "data.edits.1.share=0.5"], "data.edits.1: no such item, there are 1"),
        (["data.edits=3"], "data.edits.0.name: expected one of "),
        (["data.val_labels=all"], "data.val_labels: expected as_train or full, got 'all'"),
    ],
)
def test_options_that_are_none_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        build_options(Config, {}, overrides=arguments)


def test_options_on_the_command_line():
    config = build_options(
        Config, {}, overrides=["data=csv", "data.edits=[known_labels,known_labels]", "data.edits.0.share=0.4"]
    )
    assert config.data.edits == [KnownLabelsConfig(share=0.4), KnownLabelsConfig()]
