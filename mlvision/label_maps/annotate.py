"""From dense maps to a label-map store: the best classes of each cell, filling a store, and checking one."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from mlvision.errors import InputError
from mlvision.label_maps.store import LabelMapStore, LabelMapWriter, Rows, StoreMeta
from mlvision.progress import Progress
from mlvision.space import Groups, has_groups

MapsOf = Callable[[Any], Float[Tensor, "B C h w"]]


def top_k_of(
    maps: Float[Tensor, "B C h w"], k: int, kind: str, groups: Groups = ()
) -> tuple[Float32[Tensor, "B K h w"], Int32[Tensor, "B K h w"], Float32[Tensor, "B h w"]]:
    """The k best classes of each cell, highest first, and the fill that keeps the mass of the rest.

    The fill is the one value that, in the place of each class left out, gives them the same total probability: for softmax
    logits the log of their mean exponential, for sigmoid logits the logit of their mean probability, for probabilities
    their mean. It never exceeds the least stored value; where all classes are stored it is that value.

    Of equal values the lower class comes first, on every device: the same logits give the same classes.

    Args:
        kind: logit or probability.
        groups: of logits: one softmax of all classes, or a sigmoid of each.

    Raises:
        InputError: another kind, several groups that share a softmax, or a k beyond the classes.
    """
    num_classes = maps.shape[1]
    if not 1 <= k <= num_classes:
        raise InputError(f"top_k: expected 1 to the {num_classes} classes, got {k}")
    softmax = kind == "logit" and has_groups(groups)
    if kind not in ("logit", "probability") or (softmax and len(groups) > 1):
        found = f"logits in {len(groups)} groups" if softmax else kind
        raise InputError(
            f"the best of each cell: expected logits of one softmax or of sigmoids, or probabilities, got {found}; store "
            "all classes (top_k=0)"
        )
    maps = maps.float()
    # topk orders equal values as it likes. No two of these keys are equal: the float's bits, which order as integers once
    # those of negative numbers are turned round, then the class; + 0.0 makes one zero of two.
    bits = (maps + 0.0).view(torch.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    keys |= torch.arange(num_classes - 1, -1, -1, device=maps.device)[:, None, None]
    ids = keys.topk(k, dim=1).indices
    values = maps.gather(1, ids)
    least = values[:, -1]
    if k == num_classes:
        fill = least
    elif kind == "probability":
        fill = maps.scatter(1, ids, 0.0).sum(dim=1) / (num_classes - k)
    elif softmax:
        fill = maps.scatter(1, ids, -torch.inf).logsumexp(dim=1) - np.log(num_classes - k)
    else:  # log of the sum of p, less log of the sum of 1 - p: exact where either vanishes
        present, absent = (F.logsigmoid(x).scatter(1, ids, -torch.inf) for x in (maps, -maps))
        fill = present.logsumexp(dim=1) - absent.logsumexp(dim=1)
    return values, ids.int(), torch.minimum(fill, least)


def annotate(maps_of: MapsOf, batches: Iterable[tuple[Rows, Any]], writer: LabelMapWriter) -> None:
    """Make the maps of all blocks that the writer has outstanding.

    Batches of other sizes can change the last bits of a network's maps. A store that is to be the same for any interruption
    needs batches that each lie in a block and divide it in the same way every time.

    Args:
        maps_of: images -> dense maps of the store's kind, on any device.
        batches: (rows, images), the rows of `writer.outstanding()` in its order.

    Raises:
        InputError: maps of other classes or cells than the store's, rows that are not this rank's, or blocks left over.
    """
    meta = writer.meta
    total = sum(map(len, writer.outstanding()))
    with torch.inference_mode(), Progress(total, "label maps", shown=writer.rank == 0) as progress:
        for rows, images in batches:
            maps = _dense(maps_of, images, meta)
            writer.write(rows, *(top_k_of(maps, meta.top_k, meta.kind, meta.groups) if meta.top_k else (maps,)))
            progress.update(len(rows))
    left = writer.outstanding()
    if left:
        raise InputError(f"{writer.path}: the batches ended with {len(left)} blocks left, from row {left[0].start}")


def verify(maps_of: MapsOf, batches: Iterable[tuple[Rows, Any]], store: LabelMapStore, tolerance: float) -> float:
    """Make the maps of some rows again and compare them with what is stored: the values, the choice of classes, the fill.

    Classes whose values are nearly equal may change places.

    Args:
        tolerance: highest difference, as a share of the image's largest absolute value or of 1, whichever is more. Rounding
            takes 5e-4 of it in float16, 2e-3 (of maps with values of both signs: 4e-3) in uint8.

    Returns:
        The largest difference found, in the unit of `tolerance`.

    Raises:
        InputError: names the first row that differs, and by how much.
    """
    worst = 0.0
    for rows, images in batches:
        with torch.inference_mode():
            difference = _differences(_dense(maps_of, images, store.meta), rows, store)
        wrong = np.flatnonzero(~(difference <= tolerance))
        if wrong.size:
            raise InputError(
                f"{store.path}: row {int(rows[wrong[0]])} differs by {difference[wrong[0]]:.3g} from the map made now, "
                f"more than the tolerance {tolerance:g}"
            )
        worst = max(worst, float(difference.max()))
    return worst


def _dense(maps_of: MapsOf, images: Any, meta: StoreMeta) -> Float[Tensor, "B C h w"]:
    maps = maps_of(images)
    if maps.shape[1:] != (meta.num_classes, *meta.grid):
        raise InputError(
            f"maps of (classes, h, w) {tuple(maps.shape[1:])}, but the store's are {(meta.num_classes, *meta.grid)}"
        )
    return maps


def _differences(maps: Float[Tensor, "B C h w"], rows: Rows, store: LabelMapStore) -> np.ndarray:
    """`[B]`: the largest difference of each image, as `verify` counts it."""
    meta, stored, maps = store.meta, store.read(rows), maps.float().cpu()
    values = stored.values.float()
    pairs = [(values, maps)]
    if stored.ids is not None:
        best, _, fill = top_k_of(maps, meta.top_k, meta.kind, meta.groups)
        # The values at the stored classes, and those of the best: the same, unless the stored are not the best.
        pairs = [(values, maps.gather(1, stored.ids.long())), (values, best), (torch.as_tensor(stored.fill), fill)]
    difference = torch.stack([(a - b).abs().flatten(1).amax(1) for a, b in pairs]).amax(0)
    size = torch.stack([a.abs().flatten(1).amax(1) for a, _ in pairs]).amax(0).clamp(min=1)
    return (difference / size).numpy()
