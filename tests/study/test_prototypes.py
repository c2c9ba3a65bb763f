"""Prototypes: against a loop over all patches of all images, and the page that shows them."""

import numpy as np
import pytest
import torch
from factories import build_method
from torch.nn.functional import cosine_similarity

from mlvision.errors import InputError
from mlvision.explain import Subject
from mlvision.methods import METHODS
from mlvision.models import HEADS, BackboneConfig, build_classifier
from mlvision.study.prototypes import Prototypes, draw_prototypes, find_prototypes, nearness
from mlvision.types import Batch, CropBox

C, SIDE = 3, (64, 96)


def subject_with(head: str, **options) -> Subject:
    torch.manual_seed(4)
    assets = {"label_embeddings": torch.randn(C, 8)} if head == "text" else {}
    classifier = build_classifier(
        BackboneConfig("test_resnet"), HEADS[head](**options), C, image_size=SIDE, assets=assets
    )
    return Subject(build_method(METHODS["baseline"](), classifier).eval())


def batches(num: int, size: int) -> list[Batch]:
    noise = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (num, 3, *SIDE), dtype=torch.uint8, generator=noise)
    rows = torch.arange(num) + 10
    return [
        Batch(part, torch.zeros(len(part), C), index, CropBox(torch.tensor([[0.0, 0, 1, 1]]).expand(len(part), 4)))
        for part, index in zip(images.split(size), rows.split(size), strict=True)
    ]


def test_nearest_patches_of_every_label_are_those_of_a_loop_over_all():
    subject, given = subject_with("text"), batches(7, 3)
    found = find_prototypes(subject, given, 4)
    head, classifier = subject.classifier.head, subject.classifier
    best: dict[int, list] = {c: [] for c in range(C)}
    for batch in given:
        with torch.no_grad():
            cells = classifier.backbone(subject.normalise(subject.pixels(batch.images))).map
        for image, index in zip(cells, batch.index.tolist(), strict=True):
            for c in range(C):
                of_image = []
                for y in range(image.shape[1]):
                    for x in range(image.shape[2]):
                        with torch.no_grad():
                            patch = (head.project_cells or head.project)(image[:, y, x])
                        of_image.append((float(cosine_similarity(patch, head.label_embeddings[c], dim=0)), index, y, x))
                best[c].append(max(of_image))
    assert found.grid == (image.shape[1], image.shape[2]) == (2, 3)
    for c in range(C):
        expected = sorted(best[c], reverse=True)[:4]
        assert found.indices[c].tolist() == [e[1] for e in expected]
        assert found.cells[c].tolist() == [[e[2], e[3]] for e in expected]
        torch.testing.assert_close(found.nearness[c], torch.tensor([e[0] for e in expected]), atol=1e-5, rtol=0)
    whole = find_prototypes(subject, batches(7, 7), 4)
    assert torch.equal(whole.indices, found.indices)
    assert torch.equal(whole.cells, found.cells)
    assert find_prototypes(subject, given, 50).indices.shape == (C, 7)  # no more than there are images


def test_a_linear_head_is_read_cell_by_cell_and_attention_is_refused():
    subject, (batch,) = subject_with("linear"), batches(2, 2)
    head = subject.classifier.head.linear
    with torch.no_grad():
        cells = subject.classifier.backbone(subject.normalise(subject.pixels(batch.images))).map
        expected = torch.einsum("cd,bdhw->bchw", head.weight, cells) + head.bias[:, None, None]
    torch.testing.assert_close(nearness(subject, batch.images), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="shares of an image"):
        nearness(subject_with("ml_decoder", width=16, num_heads=2, feedforward=16), batch.images)
    with pytest.raises(InputError, match="there is no image"):
        find_prototypes(subject, [], 3)


@pytest.mark.parametrize(("cell", "corner"), [((0, 4), (0, 2)), ((3, 0), (1, 0)), ((2, 2), (1, 1))])
def test_a_tile_frames_the_patch_among_its_neighbours(cell, corner):
    """A photo of 4 x 5 plain cells: the middle of the frame has the patch's own grey, and the frame is where it lies."""
    photo = np.repeat(np.kron(np.arange(20).reshape(4, 5) * 12, np.ones((10, 8)))[..., None], 3, 2).astype(np.uint8)
    found = Prototypes(torch.ones(1, 1), torch.zeros(1, 1).long(), torch.tensor([[cell]]), (4, 5))
    page = draw_prototypes(found, [0], ["label"], lambda _: np.ones(1), lambda _: photo, tile_px=98)
    border = (page == (0x0A, 0x8F, 0x5B)).all(2)  # annotated: green
    top, left = (int(where[0]) for where in np.nonzero(border))
    inside = page[top + 4 : top + 94, left + 4 : left + 94]
    assert inside.shape == (90, 90, 3)
    y, x = ((c - s) * 30 for c, s in zip(cell, corner, strict=True))
    assert (inside[y + 15, x + 15] == photo[10 * cell[0] + 5, 8 * cell[1] + 4]).all()
    assert (inside[y, x : x + 30] == 255).all()
    assert (inside[y : y + 30, x] == 255).all()
    assert (inside == 255).all(2).sum() == 4 * 2 * 28  # nothing else is white
