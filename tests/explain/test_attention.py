import copy

import numpy as np
import pytest
import timm
import torch
from factories import build_method

from mlvision.errors import InputError
from mlvision.explain import Subject, attention, explain, select
from mlvision.explain.attention import AttentionRelevance, AttentionRollout
from mlvision.methods.baseline import BaselineConfig
from mlvision.models import Backbone, Classifier, LinearHead, LinearHeadConfig

CLASSES = 4
SIZE = (48, 64)  # 3 x 4 patches
# Options of timm, the rows of the tokens that the head reads, and how many prefix tokens there are
VITS = {
    "class token": ("vit_tiny_patch16_224", {}, [0], 1),
    "distilled": ("deit_tiny_distilled_patch16_224", {}, [0, 1], 2),
    "class token, registers, rope": ("vit_small_patch16_dinov3", {"init_values": 1.0, "global_pool": "token"}, [0], 5),
    "registers, mean": (
        "vit_tiny_patch16_224",
        {"global_pool": "avg", "class_token": False, "reg_tokens": 2, "fc_norm": True},
        range(2, 14),
        2,
    ),
    "mean with the prefix": (
        "vit_tiny_patch16_224",
        {"global_pool": "avg", "pool_include_prefix": True, "fc_norm": False},
        range(13),
        1,
    ),
}


def method_of(name, **options):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, img_size=SIZE, depth=3, **options)
    with torch.no_grad():
        for block in model.blocks:  # sharper than at random, so that no token is like another
            for parameter in block.attn.parameters():
                parameter *= 4
    backbone = Backbone(model, SIZE)
    head = LinearHead(backbone.num_features, CLASSES, LinearHeadConfig())
    torch.nn.init.normal_(head.linear.weight)
    return build_method(BaselineConfig(), Classifier(backbone, head)).eval()


@pytest.fixture(scope="module", params=VITS.values(), ids=VITS.keys())
def case(request):
    name, options, *expected = request.param
    return method_of(name, **options), *expected


@pytest.fixture(scope="module")
def vit():
    return method_of("vit_tiny_patch16_224")


def images(num=2, size=SIZE):
    return torch.rand(num, 3, *size, generator=torch.Generator().manual_seed(1))


def captured(method, x):
    """Logits and attention weights in float64, with a graph through all of them."""
    method = copy.deepcopy(method).double()
    weights = []
    for block in method.classifier.backbone.model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, __, output: weights.append(output))
    return method.predict(x.double().requires_grad_()), weights


def test_rollout_is_the_product_over_the_blocks(case):
    method, read, num_prefix = case
    x = images()
    _, weights = captured(method, x)
    found = explain(method, x, AttentionRollout(), labels=[0, 2])
    assert not found.label_specific
    for image in range(2):
        product = np.eye(num_prefix + 12)
        for block in weights:
            mixed = block[image].detach().numpy().mean(0) + np.eye(num_prefix + 12)
            product = mixed / mixed.sum(1, keepdims=True) @ product
        expected = product[list(read)].mean(0)[num_prefix:].reshape(3, 4)
        for column in range(2):
            np.testing.assert_allclose(found.maps[image, column].numpy(), expected, rtol=1e-4)


def test_the_weights_are_those_of_queries_and_keys(vit):
    x, seen = images(1), []
    handles = [
        block.attn.qkv.register_forward_hook(lambda _, __, output: seen.append(output.double().numpy()[0]))
        for block in vit.classifier.backbone.model.blocks
    ]
    with torch.no_grad():
        vit.predict(x)
    for handle in handles:
        handle.remove()
    row = np.eye(13)[0]
    for qkv in reversed(seen):
        q, k, _ = qkv.reshape(13, 3, 3, 64).transpose(1, 2, 0, 3)
        scores = np.exp(q @ k.transpose(0, 2, 1) / 8)
        row = row @ ((scores / scores.sum(2, keepdims=True)).mean(0) + np.eye(13)) / 2
    found = explain(vit, x, AttentionRollout(), labels=[0]).maps
    np.testing.assert_allclose(found[0, 0].numpy(), row[1:].reshape(3, 4), rtol=1e-4)


def test_rollout_of_uniform_attention_by_hand():
    method = method_of("vit_tiny_patch16_224")
    with torch.no_grad():
        for block in method.classifier.backbone.model.blocks:
            block.attn.qkv.weight[:384] = 0  # queries and keys
            block.attn.qkv.bias[:384] = 0
        maps = AttentionRollout().explain(Subject(method), images(), select([0], torch.zeros(2, CLASSES)))
    # Each of three blocks leaves half where it is and spreads half over 13 tokens.
    torch.testing.assert_close(maps, torch.full((2, 1, 3, 4), 7 / 8 / 13))


def relevance(method, x, scores, read, num_prefix):
    """One score of one image at a time, by the whole matrices of the paper."""
    maps = []
    for image in range(len(x)):
        for score in scores:
            logits, weights = captured(method, x[image : image + 1])
            gradients = torch.autograd.grad(score(logits[0]), weights)
            matrix = np.eye(num_prefix + 12)
            for block, gradient in zip(weights, gradients, strict=True):
                matrix = matrix + (gradient * block)[0].clamp(min=0).mean(0).detach().numpy() @ matrix
            row = matrix[list(read)].mean(0) - np.eye(num_prefix + 12)[list(read)].mean(0)
            maps.append(row[num_prefix:].reshape(3, 4))
    return np.stack(maps).reshape(len(x), len(scores), 3, 4)


def test_relevance_is_that_of_a_loop_over_labels(case):
    method, read, num_prefix = case
    x = images()
    expected = relevance(method, x, [lambda z: z[3], lambda z: z[1] - z[2]], read, num_prefix)
    found = explain(method, x, AttentionRelevance(), labels=[3, (1, 2)]).maps.numpy()
    assert expected.max() > 1e-5
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-4 * expected.max())


def test_different_labels_of_two_images_equal_separate_calls(vit):
    x = images()
    together = explain(vit, x, AttentionRelevance(), labels=[[0, (3, 1)], [2]]).maps
    first = explain(vit, x[:1], AttentionRelevance(), labels=[0, (3, 1)]).maps
    second = explain(vit, x[1:], AttentionRelevance(), labels=[2]).maps
    torch.testing.assert_close(together[0], first[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(together[1, 0], second[0, 0], rtol=1e-4, atol=1e-6)
    assert not bool(together[1, 1].any())


@pytest.mark.parametrize("explainer", [AttentionRollout(), AttentionRelevance()])
def test_parts_make_the_same_maps(explainer, vit, monkeypatch):
    x = images(3)
    whole = explain(vit, x, explainer).maps
    monkeypatch.setattr(attention, "_CHUNK_BYTES", 1)  # one image and one label at a time
    torch.testing.assert_close(explain(vit, x, explainer).maps, whole, rtol=1e-4, atol=1e-6)


def test_an_operation_without_a_batching_rule_is_looped(vit, monkeypatch):
    x, grad = images(1), torch.autograd.grad
    batched = explain(vit, x, AttentionRelevance()).maps

    def unbatched(*arguments, is_grads_batched=False, **options):
        if is_grads_batched:
            raise RuntimeError("Batching rule not implemented")
        return grad(*arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", unbatched)
    torch.testing.assert_close(explain(vit, x, AttentionRelevance()).maps, batched, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("resnet10t", {}, "is no plain ViT"),
        ("swin_tiny_patch4_window7_224", {"img_size": (56, 112), "depths": (1, 1, 1, 1)}, "is no plain ViT"),
        (
            "vit_tiny_patch16_224",
            {"img_size": SIZE, "depth": 1, "global_pool": "map", "class_token": False},
            "by 'map'",
        ),
        ("xcit_nano_12_p16_224", {"depth": 1, "img_size": (64, 96)}, "images, heads, tokens, tokens"),
        ("cait_xxs24_224", {"depth": 1, "img_size": (64, 96)}, "has 0 attention layers"),
    ],
)
@pytest.mark.parametrize("explainer", [AttentionRollout(), AttentionRelevance()])
def test_models_without_such_attention_are_refused(name, options, reason, explainer):
    model = timm.create_model(name, num_classes=CLASSES, **options).eval()
    size = options.get("img_size", SIZE)
    with pytest.raises(InputError, match=reason):
        explain(model, images(1, size), explainer)


def test_networks_that_are_not_from_timm_are_refused():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 48 * 64, 2))
    with pytest.raises(InputError, match="neither a method nor a timm model"):
        explain(network, images(), AttentionRollout())


def record(model):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return (
        [(m.training, getattr(m, "fused_attn", None), *(len(getattr(m, h)) for h in hooks)) for m in model.modules()],
        [(p.requires_grad, None if p.grad is None else float(p.grad.sum())) for p in model.parameters()],
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("explainer", [AttentionRollout(), AttentionRelevance()])
def test_the_model_is_as_before(explainer, fails, monkeypatch):
    model = method_of("vit_tiny_patch16_224").train()
    for number, (parameter, module) in enumerate(zip(model.parameters(), model.modules(), strict=False)):
        parameter.requires_grad_(number % 3 > 0)
        parameter.grad = torch.full_like(parameter, number) if number % 2 else None
        module.training = number % 4 > 0
    blocks = model.classifier.backbone.model.blocks
    blocks[0].attn.fused_attn, blocks[1].attn.fused_attn = True, False
    before, x = record(model), images()
    if fails:
        head = model.classifier.head

        def broken(features):
            if not blocks[0].attn.fused_attn:
                raise RuntimeError("broken")
            return LinearHead.forward(head, features)

        monkeypatch.setattr(head, "forward", broken)
        with pytest.raises(RuntimeError, match="broken"):
            explain(model, x, explainer)
    else:
        explain(model, x, explainer)
    assert record(model) == before
    assert not x.requires_grad
