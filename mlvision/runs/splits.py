"""Which images train, validate and test a run: the splits that its options name, edited, disjoint and readable."""

from mlvision.config import Config
from mlvision.data import read_split
from mlvision.data.edits import apply_edits
from mlvision.data.images import drop_unreadable
from mlvision.data.manifest import Manifest, carve_validation, check_disjoint, check_same_classes
from mlvision.engine import distributed
from mlvision.errors import InputError

ROLES = ("train", "val", "test")


def read_training_manifests(config: Config) -> tuple[Manifest, Manifest, list[tuple[str, str, str]]]:
    """The training and validation manifests, edited, and (split, key, reason) of each image that was skipped.

    The test split is read as well, to refuse data in which it shares images with the others; nothing else is done with it,
    and no edit ever changes it.
    """
    data = config.data
    if not data.train:
        raise InputError("data.train: expected the name of a split, got nothing")
    train = read_split(data, data.train)
    if data.val:
        if data.val == data.test:
            raise InputError(
                f"data.val: '{data.val}' is the test split; checkpoints are chosen on other images "
                "(leave data.val empty to carve them from the training split)"
            )
        val = read_split(data, data.val)
        check_same_classes(train, val)
        check_disjoint(train, val)
    else:
        train, val = carve_validation(train, data.val_fraction, data.val_seed)
    if data.test:
        test = read_split(data, data.test)
        check_same_classes(train, test)
        check_disjoint(train, test)
        check_disjoint(val, test)
    if data.edits:
        train = apply_edits(data.edits, train)
        if data.val_labels == "as_train":
            val = apply_edits(data.edits, val).noted("edited like the training images")
        else:
            val = val.noted("without the edits of the training images")
    (train, bad_train), (val, bad_val) = (_readable(config, m) for m in (train, val))
    return train, val, bad_train + bad_val


def read_role(config: Config, role: str) -> tuple[Manifest, list[tuple[str, str, str]]]:
    """The manifest of the split that plays `role`: train, val or test.

    Raises:
        InputError: no such role, or none was named in the config.
    """
    if role not in ROLES:
        raise InputError(f"split: expected one of {', '.join(ROLES)}, got '{role}'")
    if role != "test":
        train, val, bad = read_training_manifests(config)
        chosen = train if role == "train" else val
        return chosen, [image for image in bad if image[0] == chosen.split]
    if not config.data.test:
        raise InputError("data.test: this run names no test split; give data.test=<split> or split=val")
    return _readable(config, read_split(config.data, config.data.test))


def _readable(config: Config, manifest: Manifest) -> tuple[Manifest, list[tuple[str, str, str]]]:
    if config.data.on_bad_image == "error":
        return manifest, []
    kept, bad = distributed.on_main(lambda: drop_unreadable(manifest, config.loader.num_workers))
    return kept, [(manifest.split, key, reason) for key, reason in bad]


def check_images(in_chans: int, manifest: Manifest) -> None:
    """Refuse a model for images of other channels than a data set gives.

    Raises:
        InputError: naming both numbers.
    """
    if in_chans != manifest.num_channels:
        raise InputError(
            f"model.in_chans: images of split {manifest.split} have {manifest.num_channels} channels, got {in_chans}"
        )


def check_same_data(*manifests: Manifest) -> None:
    """Refuse processes that read other images, labels or classes."""
    hashes = {f"records of split {manifest.split}": manifest.hash for manifest in manifests}
    distributed.check_same({"classes": manifests[0].class_hash} | hashes)
