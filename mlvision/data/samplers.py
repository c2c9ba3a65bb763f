"""Samplers: which training images each epoch visits, in which order. A new one is a function and a line in SAMPLERS.

None keeps a random state: the order follows from (seed, epoch).
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int64

from mlvision.data.manifest import Manifest
from mlvision.errors import InputError

# An epoch to the rows of the manifest that it visits, in order and over all ranks; equally many in every epoch.
EpochOrder = Callable[[int], Int64[np.ndarray, " n"]]


def shuffled(manifest: Manifest, seed: int) -> EpochOrder:
    """Each image once per epoch, in an order that differs between epochs."""
    num_images = len(manifest)

    def order(epoch: int) -> Int64[np.ndarray, " n"]:
        # The key sets these numbers apart from the views': SeedSequence fills up with zeros, so [seed, epoch] alone
        # would be [seed, epoch, 0, 0], the first view of the first image.
        entropy = np.random.SeedSequence([seed, epoch], spawn_key=(0,))
        return np.random.default_rng(entropy).permutation(num_images)

    return order


def class_balanced(manifest: Manifest, seed: int) -> EpochOrder:
    """Classes equally often, each time with the next of their images.

    An epoch has as many rows as there are images: the classes in turn, the images of each in an order of their own.
    Classes of the training split that no image shows are passed over. Images of rare classes come several times per epoch,
    images without a label never. With several labels per image, frequent classes still come more often, next to rare ones.

    Source: Shen et al., "Relay Backpropagation for Effective Learning of Deep Convolutional Neural Networks", ECCV 2016
    (class-aware sampling).

    Raises:
        InputError: no image has a label.
    """
    of_class: list[list[int]] = [[] for _ in manifest.classes]
    for row, record in enumerate(manifest.records):
        for label in record.labels:
            of_class[label].append(row)
    images = [np.array(rows, dtype=np.int64) for rows in of_class if rows]
    if not images:
        raise InputError(f"loader.sampling: split {manifest.split!r} has no label to balance by")

    def order(epoch: int) -> Int64[np.ndarray, " n"]:
        rng = np.random.default_rng(np.random.SeedSequence([seed, epoch], spawn_key=(1,)))
        each = -(-len(manifest) // len(images))
        drawn = [
            np.concatenate([rng.permutation(rows) for _ in range(-(-each // len(rows)))])[:each] for rows in images
        ]
        turns = np.stack([rng.permutation(len(images)) for _ in range(each)])
        return np.stack(drawn, axis=1)[np.arange(each)[:, None], turns].ravel()[: len(manifest)]

    return order


SAMPLERS: dict[str, Callable[[Manifest, int], EpochOrder]] = {
    "shuffled": shuffled,
    "class_balanced": class_balanced,
}


def describe_samplers() -> str:
    """The first line of each sampler's docstring, for the help."""
    summaries = {name: (sampler.__doc__ or "").partition("\n")[0] for name, sampler in SAMPLERS.items()}
    return " ".join(f"{name}: {summary}" for name, summary in summaries.items())
