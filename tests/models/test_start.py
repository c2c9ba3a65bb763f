"""Where classifiers start: each class at its share of the images, in every head, unless trained weights say otherwise."""

import math

import numpy as np
import pytest
import torch
from factories import build_method
from torch import nn

from mlvision.data.manifest import Manifest, Record
from mlvision.engine.optim import OptimConfig, parameter_groups
from mlvision.losses import AslConfig, SoftmaxConfig
from mlvision.methods import METHODS, BaselineConfig
from mlvision.methods.base import starting_logits
from mlvision.models import HEADS, Preprocessing, build_classifier
from mlvision.models.backbone import BackboneConfig
from mlvision.parts import LabelStatistics
from mlvision.space import LabelSpace
from mlvision.types import Features

# Of eight images: the first class in two, the second in none, the third in one of the four in which it is known, the fourth
# in all, and of the fifth nothing is known.
MANIFEST = Manifest(
    ("two", "none", "quarter", "all", "unknown"),
    tuple(
        Record(
            f"{i}.png",
            f"{i}.png",
            labels=tuple(c for c, present in enumerate((i < 2, False, i == 5, True)) if present),
            unknown=(2, 4) if i < 4 else (4,),
        )
        for i in range(8)
    ),
    "train",
)
SHARES = [2 / 8, 1 / 16, 1 / 4, 15 / 16]
SHARES.append(sum(SHARES) / 4)
STATISTICS = MANIFEST.statistics()
PREPROCESSING = Preprocessing((0.5,) * 3, (0.5,) * 3, "bilinear", 0.9)


def logit(share):
    return math.log(share / (1 - share))


def test_the_counts_are_those_of_the_table():
    present, known = MANIFEST.label_counts()
    assert present.tolist() == np.nansum(MANIFEST.targets, axis=0).tolist() == [2, 0, 1, 8, 0]
    assert (list(STATISTICS.positives), list(STATISTICS.known)) == (present.tolist(), known.tolist())
    assert STATISTICS.num_images == 8
    assert known.tolist() == np.isfinite(MANIFEST.targets).sum(0).tolist() == [8, 8, 4, 8, 0]


def test_shares_by_hand():
    torch.testing.assert_close(
        starting_logits(STATISTICS, LabelSpace.of(None, 5)), torch.tensor([logit(s) for s in SHARES])
    )
    priors = torch.tensor(SHARES) / sum(SHARES)
    torch.testing.assert_close(starting_logits(STATISTICS, LabelSpace.of(None, 5).with_softmax()), priors.log())


@pytest.mark.parametrize("unknown", [(), (0,)])
def test_no_split_is_too_poor(unknown):
    one = Manifest(("only",), (Record("a.png", "a.png", labels=(), unknown=unknown),), "train")
    space = LabelSpace.of(None, 1)
    assert starting_logits(one.statistics(), space).tolist() == [0.0]
    assert starting_logits(one.statistics(), space.with_softmax()).tolist() == [0.0]


@pytest.mark.parametrize("name", HEADS)
def test_every_head_calls_a_class_as_probable_as_its_share_where_it_sees_nothing(name):
    """Cells without features have the share in the maps of logits too; maps of attention hold no logits."""
    torch.manual_seed(0)
    options = {"width": 16, "feedforward": 16, "num_heads": 2} if name in ("ml_decoder", "query2label") else {}
    head = HEADS[name](**options).build(8, 5, assets={"label_embeddings": torch.randn(5, 12)}).eval()
    logits = starting_logits(STATISTICS, LabelSpace.of(None, 5))
    head.start_at(logits)
    nothing = Features(torch.zeros(2, 8, 3, 4), torch.zeros(2, 8))
    with torch.no_grad():
        output = head(nothing)
        if name in ("ml_decoder", "query2label"):  # what a query brings itself is read out too
            head.read_out.weight.zero_()
            output = head(nothing)
    torch.testing.assert_close(output.logits, logits.expand(2, -1))
    if head.map_kind == "logit":
        torch.testing.assert_close(output.maps, logits[:, None, None].expand(2, -1, 3, 4))


def build(method="baseline", head="linear", checkpoint="", **options):
    torch.manual_seed(0)
    sizes = {"width": 16, "feedforward": 16, "num_heads": 2} if head in ("ml_decoder", "query2label") else {}
    model = BackboneConfig("test_resnet", checkpoint=checkpoint)
    assets = {"label_embeddings": torch.randn(5, 12)} if head == "text" else {}
    classifier = build_classifier(model, HEADS[head](**sizes), 5, image_size=32, assets=assets)
    return build_method(METHODS[method](**options), classifier, PREPROCESSING)


@pytest.mark.parametrize(
    ("method", "options", "activation"),
    [
        ("baseline", {}, "sigmoid"),
        ("baseline", {"loss": AslConfig()}, "sigmoid"),
        ("baseline", {"loss": SoftmaxConfig()}, "softmax"),
        ("relabel", {}, "sigmoid"),
        ("relabel", {"target": "softmax"}, "softmax"),
        ("token_labeling", {"target": "multilabel"}, "sigmoid"),
        ("token_labeling", {"target": "softmax"}, "softmax"),
    ],
)
def test_every_method_prepares_its_head(method, options, activation):
    built = build(method, **options)
    built.prepare(STATISTICS)
    space = LabelSpace.of(None, 5)
    expected = starting_logits(STATISTICS, space.with_softmax() if activation == "softmax" else space)
    torch.testing.assert_close(built.classifier.head.linear.bias, expected)
    if method == "token_labeling":
        torch.testing.assert_close(built.tokens.bias, expected)


@pytest.mark.parametrize("head", HEADS)
def test_biases_have_no_weight_decay(head):
    built = build("patchct" if head == "text" else "baseline", head)
    groups = parameter_groups(built.parameter_groups(), OptimConfig(weight_decay=0.3))
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    biases = {name: p for name, p in built.named_parameters() if name.endswith("bias")}
    assert any(name.startswith("classifier.head.") for name in biases)
    assert {decays[id(p)] for p in biases.values()} == {0.0}


def test_a_classifier_that_came_with_the_weights_keeps_its_bias(tmp_path):
    trained = build()
    nn.init.normal_(trained.classifier.head.linear.bias)
    torch.save(trained.state_dict(), tmp_path / "run.pt")
    again = build(checkpoint=str(tmp_path / "run.pt"))
    again.prepare(STATISTICS)
    assert torch.equal(again.classifier.head.linear.bias, trained.classifier.head.linear.bias)


def test_a_head_that_replaces_another_classifier_starts_at_the_shares(tmp_path):
    """The file's classifier is of other classes, so it is left out and the new one is not trained."""
    other = build_classifier(BackboneConfig("test_resnet"), HEADS["linear"](), 9, image_size=32)
    torch.save(build_method(BaselineConfig(), other, PREPROCESSING).state_dict(), tmp_path / "run.pt")
    built = build(checkpoint=str(tmp_path / "run.pt"))
    built.prepare(STATISTICS)
    torch.testing.assert_close(built.classifier.head.linear.bias, starting_logits(STATISTICS, LabelSpace.of(None, 5)))


def test_the_labels_of_a_group_share_its_softmax():
    """Shares of 0.2, 0.6 and 0.4 of ten images: a class for itself, and a group of two."""
    statistics = LabelStatistics((2, 6, 4), (10, 10, 10), 10)
    found = starting_logits(statistics, LabelSpace(("a", "b", "c"), groups=(1, 2)))
    torch.testing.assert_close(found.exp(), torch.tensor([0.25, 0.6, 0.4]))
