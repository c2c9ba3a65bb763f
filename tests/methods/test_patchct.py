"""PatchCT's loss from its parts, its label maps, and what it refuses."""

import math

import pytest
import torch
from factories import build_method
from torch.nn.functional import normalize

from mlvision.errors import InputError
from mlvision.explain import explain
from mlvision.losses import BceConfig, asymmetric_loss, conditional_transport
from mlvision.methods import PatchCT, PatchCTConfig
from mlvision.methods.patchct import LinearNavigator, MlpNavigator
from mlvision.models import BackboneConfig, LinearHeadConfig, Preprocessing, TextHeadConfig, build_classifier
from mlvision.types import Batch, CropBox

C, SIDE = 5, 64
LABELS = torch.randn(C, 16, generator=torch.Generator().manual_seed(3))
PREPROCESSING = Preprocessing((0.5,) * 3, (0.5,) * 3, "bilinear", 0.9)


def build(backbone="test_vit", **options) -> PatchCT:
    torch.manual_seed(0)
    classifier = build_classifier(
        BackboneConfig(backbone), TextHeadConfig(), C, image_size=SIDE, assets={"label_embeddings": LABELS}
    )
    return build_method(PatchCTConfig(**{"alpha": 0.1, **options}), classifier, PREPROCESSING).eval()


def make_batch() -> Batch:
    noise = torch.Generator().manual_seed(1)
    images = torch.randint(256, (3, 3, SIDE, SIDE), dtype=torch.uint8, generator=noise)
    targets = torch.tensor([[1.0, 0, 0, 1, 0], [0, 1, 0, 0, math.nan], [0, 0, 0, 0, 0]])
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(3, 4)
    return Batch(images, targets, torch.arange(3), CropBox(whole))


@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_the_loss_is_the_classifiers_and_the_transports(backbone):
    method, batch = build(backbone, alpha=0.3, rho=0.2), make_batch()
    features = method.classifier.backbone(method.normalise(batch.images))
    patches = features.map.flatten(2).mT @ method.text.project.weight.T
    cost = conditional_transport(patches, LABELS, batch.targets, tau=0.07, rho=0.2).cost
    assert cost[2] == 0
    expected = asymmetric_loss(method.predict(batch.images), batch.targets) + 0.3 * cost.mean()
    output = method(batch)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.logs["transport"], cost.mean())


@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_levels_are_the_last_blocks_or_stages(backbone):
    method, batch = build(backbone, levels=3), make_batch()
    model = method.classifier.backbone.model
    seen = []
    stages = model.blocks if backbone == "test_vit" else [model.layer2, model.layer3, model.layer4]
    handles = [stage.register_forward_hook(lambda *args: seen.append(args[2])) for stage in list(stages)[-3:-1]]
    loss = method(batch)
    for handle in handles:
        handle.remove()
    prefix = method.classifier.backbone.num_prefix_tokens
    tokens = [level[:, prefix:] if level.ndim == 3 else level.flatten(2).mT for level in seen]
    patches = [level @ project.weight.T for level, project in zip(tokens, method.earlier, strict=True)]
    patches.append(
        method.classifier.backbone(method.normalise(batch.images)).map.flatten(2).mT @ method.text.project.weight.T
    )
    costs = [conditional_transport(p, LABELS, batch.targets).cost.mean() for p in patches]
    torch.testing.assert_close(loss.logs["transport"], torch.stack(costs).mean())


def test_label_maps_are_the_plan_back_for_every_label():
    method, batch = build("test_resnet"), make_batch()
    found = method.label_maps(batch.images)
    assert found.kind == "mass"
    torch.testing.assert_close(found.values, method.classify(batch.images).maps)
    torch.testing.assert_close(found.values.sum((2, 3)), torch.ones(3, C))


def test_label_maps_of_several_levels_are_the_mean_of_their_plans_on_the_finest_grid():
    method, images = build("test_resnet", levels=2), torch.rand(2, 3, 64, 96)
    features, (earlier,) = method.classifier.backbone.with_levels(method.normalise(images), 2)
    assert features.map.shape[2:] == (2, 3)
    assert earlier.shape[2:] == (4, 6)
    near = torch.nn.functional.normalize(LABELS, dim=1)

    def plan(cells, weight):
        patches = torch.nn.functional.normalize(torch.einsum("bkhw,dk->bdhw", cells, weight), dim=1)
        return (torch.einsum("bdhw,cd->bchw", patches, near) / 0.07).flatten(2).softmax(2).unflatten(2, cells.shape[2:])

    coarse = plan(features.map, method.text.project.weight).repeat_interleave(2, 2).repeat_interleave(2, 3) / 4
    expected = (coarse + plan(earlier, method.earlier[0].weight)) / 2
    found = method.label_maps(images)
    assert found.kind == "mass"
    torch.testing.assert_close(found.values, expected)
    torch.testing.assert_close(found.values.sum((2, 3)), torch.ones(2, C))


def test_its_maps_are_an_explainer_and_so_are_its_heads():
    method, batch = build("test_resnet", navigator="linear"), make_batch()
    torch.nn.init.normal_(method.navigator.project.weight)
    own = explain(method, batch.images, "own_maps", labels=[2, 0])
    torch.testing.assert_close(own.maps, method.label_maps(batch.images).values[:, [2, 0]])
    of_head = explain(method, batch.images, "dense_head", labels=[2, 0])
    torch.testing.assert_close(of_head.maps, method.classify(batch.images).maps[:, [2, 0]])
    assert own.kind == of_head.kind == "mass"
    assert not torch.allclose(own.maps, of_head.maps)


def test_the_class_tokens_attention_weighs_the_patches():
    """Against timm's own attention, unfused."""
    method, batch = build(patch_weights="attention"), make_batch()
    attention = method.classifier.backbone.model.blocks[-1].attn
    attention.fused_attn = False
    seen = []
    handle = attention.attn_drop.register_forward_hook(lambda *args: seen.append(args[2]))
    found = method.label_maps(batch.images).values
    handle.remove()
    prefix = method.classifier.backbone.num_prefix_tokens
    whole = seen[0][:, :, 0].mean(1)[:, prefix:]
    features = method.classifier.backbone(method.normalise(batch.images))
    patches = features.map.flatten(2).mT @ method.text.project.weight.T
    ones = torch.ones(3, C)
    # The softmax over the patches alone, of each head, is its softmax over all tokens without the prefix.
    per_head = seen[0][:, :, 0, prefix:]
    weights = (per_head / per_head.sum(-1, keepdim=True)).mean(1)
    assert not torch.allclose(weights, whole / whole.sum(1, keepdim=True), atol=1e-7)
    expected = conditional_transport(patches, LABELS, ones, weights).backward_plan
    torch.testing.assert_close(found.flatten(2).mT, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.0},
        {"navigator": "linear"},
        {"navigator": "mlp"},
        {"plan": "sinkhorn"},
        {"sink": 0.5},
        {"levels": 2, "sink": 0.3},
        {"loss": BceConfig()},
    ],
)
def test_every_trainable_parameter_learns(options):
    method, batch = build("test_vit", **options), make_batch()
    torch.nn.init.normal_(method.text.adapter[2].weight)
    method.train()
    method(batch).loss.backward()
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name


def test_without_transport_it_is_the_classifier_alone():
    method, batch = build(alpha=0.0, levels=3, navigator="mlp", sink=0.5), make_batch()
    torch.testing.assert_close(method(batch).loss, asymmetric_loss(method.predict(batch.images), batch.targets))
    assert not [name for name, _ in method.named_parameters() if name.startswith(("earlier", "navigator", "sink"))]
    assert method.label_maps(batch.images).values.isfinite().all()


def test_a_batch_without_any_label_costs_what_the_classifier_costs():
    method, batch = build(sink=0.5), make_batch()
    batch.targets[:] = torch.tensor([0, 0, 0, 0, math.nan])
    output = method(batch)
    assert output.logs["transport"] == 0
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())


def test_the_loss_is_nearly_the_same_under_autocast():
    method, batch = build("test_resnet"), make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = method(batch)
    torch.testing.assert_close(inside.loss, method(batch).loss, rtol=0.02, atol=0.02)
    assert inside.loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, "method.alpha: expected 0 or more"),
        ({"plan": "exact"}, "method.plan: expected one of ct, sinkhorn"),
        ({"levels": 0}, "method.levels: expected 1 or more"),
        ({"levels": 99}, "levels: test_vit gives no 99 maps"),
        ({"navigator": "dot"}, "method.navigator: expected one of cosine, linear, mlp"),
        ({"patch_weights": "saliency"}, "method.patch_weights: expected uniform or attention"),
        ({"sink": 1.0}, "method.sink: expected at least 0, less than 1"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        build(**options)


def test_a_head_without_text_and_a_network_without_a_class_token_are_refused():
    classifier = build_classifier(BackboneConfig("test_resnet"), LinearHeadConfig(), C, image_size=SIDE)
    with pytest.raises(InputError, match="it needs head.name=text"):
        build_method(PatchCTConfig(), classifier, PREPROCESSING)
    with pytest.raises(InputError, match="patch_weights: test_resnet has no class token"):
        build("test_resnet", patch_weights="attention")


def test_the_linear_navigator_starts_as_the_cosine():
    patches, labels, tau = torch.randn(2, 4, 8), torch.randn(3, 8), torch.tensor(0.3)
    expected = -normalize(patches, dim=-1) @ normalize(labels, dim=-1).T / 0.3
    torch.testing.assert_close(LinearNavigator(8)(patches, labels, tau), expected)


@pytest.mark.parametrize("shared", [True, False])
def test_the_mlp_navigator_reads_squared_differences(shared):
    """Against the table of differences, which it never makes."""
    torch.manual_seed(0)
    navigator = MlpNavigator(8, hidden=5)
    patches, labels = torch.randn(2, 4, 8), torch.randn(*(() if shared else (2,)), 3, 8)
    one, other = normalize(patches, dim=-1), normalize(labels, dim=-1).expand(2, -1, -1)
    differences = (one[:, :, None] - other[:, None]).square()
    expected = navigator.last(torch.nn.functional.leaky_relu(navigator.first(differences))).squeeze(-1) / 0.5
    torch.testing.assert_close(navigator(patches, labels, torch.tensor(0.5)), expected)
