"""Dense teachers against timm's own answers, read cell by cell on non-square maps."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from mlvision.errors import InputError
from mlvision.models import (
    AveragedTeacher,
    Backbone,
    BackboneConfig,
    Classifier,
    CsraHead,
    CsraHeadConfig,
    DenseTeacher,
    LinearHead,
    LinearHeadConfig,
    build_teacher,
    check_identity,
    dense,
)

TINY_SWIN = {"embed_dim": 4, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
TINY_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
TINY_CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}

# Name, architecture options that make it small, image size: heads that average the map and classify linearly ...
EXACT = [
    ("resnet50", {}, (64, 96)),
    ("tf_efficientnet_lite0", {}, (64, 96)),
    ("densenet121", {}, (64, 96)),
    ("swin_tiny_patch4_window7_224", TINY_SWIN, (64, 96)),
    ("regnety_002", {}, (64, 96)),
    ("repvgg_a0", {}, (64, 96)),
    ("dla46x_c", {}, (64, 96)),  # its classifier is a 1x1 convolution
    ("test_resnet", {}, (64, 96)),
    ("test_efficientnet", {}, (64, 96)),
    ("test_byobnet", {}, (64, 96)),
    ("test_nfnet", {}, (64, 96)),
    *([("test_maxvit", {}, (64, 96))] if timm.is_model("test_maxvit") else []),  # the oldest timm has none
]
# ... and heads that do something else.
APPROXIMATE = [
    ("convnext_atto", {}, (64, 96)),  # normalises after pooling
    ("test_convnext", {}, (64, 96)),
    ("mobilenetv3_small_050", {}, (64, 96)),  # further layers after pooling
    ("mobilenetv4_conv_small", {}, (64, 96)),
    ("vit_tiny_patch16_224", TINY_VIT, (48, 80)),  # class token
    ("deit_tiny_patch16_224", TINY_VIT, (48, 80)),
    ("test_vit2", {}, (48, 80)),  # mean pooling, then a norm
    ("test_vit3", {}, (48, 80)),  # attention pooling
]


def timm_classifier(name: str, options: dict, size: tuple[int, int], num_classes: int = 10) -> nn.Module:
    """timm's model with every norm, scale and bias off its initial value, and logits of a trained network's size."""
    torch.manual_seed(0)
    if timm.get_pretrained_cfg(name).fixed_input_size:
        options = options | {"img_size": size}
    model = timm.create_model(name, num_classes=num_classes, **options).eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim <= 1:
            tensor.uniform_(0.5, 1.5)
    with torch.no_grad():
        model.get_classifier().weight *= 10 / model(torch.randn(2, 3, *size)).abs().max()
    return model


def pictures(size: tuple[int, int], count: int = 2) -> torch.Tensor:
    """Noisy patches of random colours, no two alike: a map of nearly equal cells would hide what a head does to them."""
    torch.manual_seed(1)
    patches = F.interpolate(torch.rand(count, 3, 3, 5), size)
    return 0.8 * patches + 0.2 * torch.rand(count, 3, *size)


def normalised(teacher: DenseTeacher, images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(getattr(teacher.preprocessing, key)).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (images - mean) / std


@pytest.mark.parametrize(("name", "options", "size"), EXACT, ids=[case[0] for case in EXACT])
def test_mean_of_the_maps_is_timms_answer(name, options, size):
    model = timm_classifier(name, options, size)
    teacher = build_teacher(model, image_size=size)
    images = pictures(size)
    with torch.no_grad():
        output, expected = teacher(images), model(normalised(teacher, images))
    assert output.maps.shape == (2, 10, *teacher.grid)
    assert teacher.grid[0] < teacher.grid[1]
    assert output.maps.std((2, 3)).mean() > 1e-3  # not the answer repeated
    torch.testing.assert_close(output.maps.mean((2, 3)), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(teacher.logits(images), output.logits)
    torch.testing.assert_close(teacher.maps(images), output.maps)
    assert check_identity(teacher, images, strict=True) is None


@pytest.mark.parametrize(("name", "options", "size"), APPROXIMATE, ids=[case[0] for case in APPROXIMATE])
def test_other_heads_are_read_cell_by_cell_and_marked(name, options, size):
    """Each cell gets timm's own answer for a map, or tokens, that are all equal to it."""
    model = timm_classifier(name, options, size)
    teacher = build_teacher(model, image_size=size)
    images = pictures(size)
    with torch.no_grad():
        output, features = teacher(images), model.forward_features(normalised(teacher, images))
        torch.testing.assert_close(output.logits, model.forward_head(features))
        (height, width), prefix = teacher.grid, getattr(model, "num_prefix_tokens", 0)
        for row in range(height):
            for column in range(width):
                if features.ndim == 4:
                    uniform = features[:, :, row, column, None, None].expand_as(features)
                else:
                    uniform = features[:, prefix + row * width + column, None].expand_as(features)
                torch.testing.assert_close(
                    output.maps[:, :, row, column], model.forward_head(uniform), rtol=1e-4, atol=1e-4
                )
    gap = check_identity(teacher, images)
    assert gap == pytest.approx(float((output.maps.mean((2, 3)) - output.logits).abs().max()), rel=1e-3)
    assert gap > 1e-4
    with pytest.raises(InputError, match=f"differs from its logits by {gap:.3g}, strict allows 0.0001"):
        check_identity(teacher, images, strict=True)
    assert check_identity(teacher, images, strict=True, tolerance=2 * gap) is None


def test_class_token_models_classify_the_normalised_patch_tokens():
    model = timm_classifier("vit_tiny_patch16_224", TINY_VIT, (48, 80))
    teacher = build_teacher(model, image_size=(48, 80))
    images = pictures((48, 80))
    with torch.no_grad():
        tokens = model.forward_features(normalised(teacher, images))[:, 1:]
        expected = model.head(tokens).transpose(1, 2).unflatten(2, (3, 5))
        torch.testing.assert_close(teacher.maps(images), expected)


def test_distilled_deit_of_ours_classifies_its_patch_tokens():
    """Ours has one classifier, on the mean of both tokens; timm's own has two, which no map of one can equal."""
    options = TINY_VIT | {"img_size": (48, 80)}
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_distilled_patch16_224", **options, num_classes=0)
    head = LinearHead(32, 10, LinearHeadConfig())
    teacher = DenseTeacher(Classifier(Backbone(model, (48, 80)), head))
    images = pictures((48, 80))
    with torch.no_grad():
        tokens = model.forward_features(normalised(teacher, images))
        expected = head.linear(tokens[:, 2:]).transpose(1, 2).unflatten(2, (3, 5))
        torch.testing.assert_close(teacher.maps(images), expected)
        torch.testing.assert_close(teacher.logits(images), head.linear(tokens[:, :2].mean(1)))
    assert check_identity(teacher, images) > 1e-4
    with pytest.raises(InputError, match="its classifier is of type tuple, not one linear layer"):
        build_teacher(timm.create_model("deit_tiny_distilled_patch16_224", **options), image_size=(48, 80))


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("test_resnet", {}, (64, 96)),
        ("swin_tiny_patch4_window7_224", TINY_SWIN, (16, 24)),
        ("convnext_atto", TINY_CONVNEXT, (64, 96)),
        ("vit_tiny_patch16_224", TINY_VIT, (32, 48)),
    ],
)
def test_a_feature_in_one_cell_moves_that_cell_alone(name, options, size, monkeypatch):
    model = timm_classifier(name, options, size)
    teacher = build_teacher(model, image_size=size)
    features = torch.randn_like(model.forward_features(torch.randn(1, 3, *size)))
    hot = features.clone()
    height, width = teacher.grid
    row, column = height - 2, width - 1
    if features.ndim == 3:
        hot[:, 1 + row * width + column] += torch.randn(features.shape[2])
    elif features.shape[1:3] == teacher.grid:  # channels last
        hot[:, row, column] += torch.randn(features.shape[3])
    else:
        hot[:, :, row, column] += torch.randn(features.shape[1])
    maps = []
    for given in (features, hot):
        monkeypatch.setattr(model, "forward_features", lambda _, given=given: given)
        maps.append(teacher.maps(torch.rand(1, 3, *size)))
    moved = (maps[1] - maps[0]).abs().amax((0, 1))
    assert moved[row, column] > 1e-2
    moved[row, column] = 0
    assert moved.max() < 1e-5


def test_cells_pass_a_head_of_several_layers_in_parts(monkeypatch):
    teacher = build_teacher(timm_classifier("test_convnext", {}, (64, 96)), image_size=(64, 96))
    images = pictures((64, 96), 3)  # 18 cells
    whole = teacher.maps(images)
    monkeypatch.setattr(dense, "_CELLS", 4)
    torch.testing.assert_close(teacher.maps(images), whole)


def test_maps_and_logits_take_one_pass_of_the_backbone(monkeypatch):
    model = timm_classifier("test_resnet", {}, (64, 96))
    teacher = build_teacher(model, image_size=(64, 96))
    calls, forward = [], model.forward_features
    monkeypatch.setattr(model, "forward_features", lambda images: calls.append(1) or forward(images))
    teacher(pictures((64, 96)))
    assert len(calls) == 1


def test_a_method_keeps_its_own_normalisation_and_takes_bytes():
    size = (64, 96)
    classifier = build_teacher(timm_classifier("test_resnet", {}, size), image_size=size).classifier
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(1, 3, 1, 1)
    teacher = build_teacher(SimpleNamespace(classifier=classifier, mean=mean, std=std))
    images = torch.randint(256, (2, 3, *size), dtype=torch.uint8)
    expected = classifier((images / 255 - mean) / std).logits
    torch.testing.assert_close(teacher.logits(images), expected)
    torch.testing.assert_close(teacher.maps(images).mean((2, 3)), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(teacher.maps(images / 255), teacher.maps(images))


def test_a_teacher_does_not_train():
    model = timm_classifier("test_resnet", {}, (64, 96)).train()
    teacher = build_teacher(model, image_size=(64, 96))
    images = pictures((64, 96))
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    alone = teacher.maps(images[:1])
    AveragedTeacher([teacher.train()]).train()
    torch.testing.assert_close(teacher.maps(images)[:1], alone)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_under_autocast_maps_are_float32_and_the_identity_is_measured_outside():
    teacher = build_teacher(timm_classifier("test_resnet", {}, (64, 96)), image_size=(64, 96))
    average = AveragedTeacher([teacher], scales=(1.0, 1.5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert teacher.maps(pictures((64, 96))).dtype == torch.float32
        assert average.maps(pictures((64, 96))).dtype == torch.float32
        assert average.identity_gap(pictures((64, 96))) < 1e-4


def test_values_that_are_not_finite_are_refused():
    model = timm_classifier("test_resnet", {}, (64, 96))
    with torch.no_grad():
        model.get_classifier().bias[3] = math.nan
    with pytest.raises(InputError, match="not finite"):
        check_identity(build_teacher(model, image_size=(64, 96)), pictures((64, 96)))


def small_teacher(name: str = "test_resnet", size: tuple[int, int] = (64, 96), num_classes: int = 10) -> DenseTeacher:
    return build_teacher(timm_classifier(name, {}, size, num_classes), image_size=size)


def on_grid(maps: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Each cell's mean over the finest grid that both share: slow and exact."""
    values = maps.double().numpy()
    for axis, count in zip((2, 3), grid, strict=True):
        fine = math.lcm(values.shape[axis], count)
        values = np.repeat(values, fine // values.shape[axis], axis)
        shape = (*values.shape[:axis], count, fine // count, *values.shape[axis + 1 :])
        values = values.reshape(shape).mean(axis + 1)
    return torch.from_numpy(values).float()


def test_average_over_scales_and_flip_by_hand():
    """A map of 2 x 3 cells from maps of 2 x 3, 3 x 4 (1.5 x 4.5, to even) and 1 x 2 cells and their mirror images."""
    teacher = small_teacher()
    assert teacher.preprocessing.interpolation == "bilinear"
    average = AveragedTeacher([teacher], scales=(1.0, 1.5, 0.5), flip=True)
    assert (average.image_size, average.grid) == ((96, 128), (2, 3))
    images = pictures((96, 128))
    with torch.no_grad():
        output = average(images)
        maps, logits = [], []
        for size in ((64, 96), (96, 128), (32, 64)):
            view = F.interpolate(images, size, mode="bilinear", antialias=True)
            maps += [teacher.maps(view), teacher.maps(view.flip(3)).flip(3)]
            logits += [teacher.logits(view), teacher.logits(view.flip(3))]
    expected = torch.stack([on_grid(m, (2, 3)) for m in maps]).mean(0)
    torch.testing.assert_close(output.maps, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.logits, torch.stack(logits).mean(0), rtol=1e-4, atol=1e-5)


def test_mirrored_images_give_mirrored_averages():
    average = AveragedTeacher([small_teacher(), small_teacher("test_efficientnet")], scales=(1.0, 2.0), flip=True)
    images = pictures(average.image_size)
    output, mirrored = average(images), average(images.flip(3))
    torch.testing.assert_close(mirrored.maps, output.maps.flip(3), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mirrored.logits, output.logits, rtol=1e-4, atol=1e-4)
    assert (output.maps - output.maps.flip(3)).abs().max() > 1e-2


def test_a_bright_spot_stays_in_its_cell_at_every_scale():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    size = (128, 192)
    teacher = build_teacher(model, image_size=size)
    images = torch.full((2, 3, *size), 0.3)
    images[1, :, 40:56, 136:152] = 1  # the middle of row 1, column 4 of 4 x 6
    for scale in (1.0, 2.0, 3.0):
        average = AveragedTeacher([teacher], scales=(1.0, scale), flip=True)
        with torch.no_grad():
            plain, changed = average.maps(images)
        assert divmod(int((changed - plain).norm(dim=0).argmax()), 6) == (1, 4)


def test_an_ensemble_averages_logits_and_keeps_the_identity():
    first, second = small_teacher(), small_teacher("test_efficientnet")
    images = pictures((64, 96))
    ensemble = AveragedTeacher([first, second])
    assert check_identity(ensemble, images, strict=True) is None
    torch.testing.assert_close(ensemble.maps(images), (first.maps(images) + second.maps(images)) / 2)
    torch.testing.assert_close(ensemble.logits(images), (first.logits(images) + second.logits(images)) / 2)


def test_the_identity_holds_on_unequal_grids_and_fails_with_one_member():
    first, finer = small_teacher(), small_teacher("test_efficientnet", (96, 160))
    ensemble = AveragedTeacher([first, finer], scales=(1.0, 0.6, 1.4), flip=True)
    assert (ensemble.grid, ensemble.image_size) == ((2, 3), (128, 224))
    images = pictures(ensemble.image_size)
    assert ensemble.maps(images).shape == (2, 10, 2, 3)
    assert check_identity(ensemble, images, strict=True) is None
    assert check_identity(AveragedTeacher([first, small_teacher("test_convnext")]), images) > 1e-4


def softmax_and_sigmoids(logits):
    return torch.cat([logits[:, :6].softmax(1), logits[:, 6:].sigmoid()], 1)


@pytest.mark.parametrize(
    ("groups", "probability"),
    [((10,), lambda logits: logits.softmax(1)), ((), torch.sigmoid), ((6, 1, 1, 1, 1), softmax_and_sigmoids)],
    ids=["softmax", "sigmoid", "both"],
)
def test_mean_of_probabilities_by_hand(groups, probability):
    """Probabilities of the averaged logits are the averaged probabilities, down to the smallest."""
    first, second = small_teacher(), small_teacher("test_efficientnet", (96, 128))
    for member in (first, second):
        member.classifier.head.linear.weight.data *= 5  # logits of 50
    ensemble = AveragedTeacher([first, second], combination="mean_probability", groups=groups)
    images = pictures((96, 128))
    with torch.no_grad():
        output = ensemble(images)
        view = F.interpolate(images, (64, 96), mode="bilinear", antialias=True)
        members = first(view), second(images)
        maps = (probability(members[0].maps) + on_grid(probability(members[1].maps), (2, 3))) / 2
        logits = (probability(members[0].logits) + probability(members[1].logits)) / 2
    torch.testing.assert_close(probability(output.maps), maps, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(probability(output.logits), logits, rtol=1e-4, atol=1e-6)
    assert output.maps.isfinite().all()
    assert check_identity(ensemble, images) > 1e-4


def test_sigmoid_ensembles_keep_labels_that_are_all_but_certain():
    """1 - p is 0 in float32 from a logit of 17 on."""
    model = timm_classifier("test_resnet", {}, (64, 96))
    with torch.no_grad():
        model.get_classifier().weight.zero_()
        model.get_classifier().bias.copy_(torch.linspace(-45, 45, 10))
    teacher = build_teacher(model, image_size=(64, 96))
    average = AveragedTeacher([teacher, teacher], combination="mean_probability")
    images = pictures((64, 96))
    torch.testing.assert_close(average.maps(images), teacher.maps(images), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_averaged_is_named():
    first = small_teacher()
    with pytest.raises(InputError, match="resnet has 10 classes and takes 3 channels, test_efficientnet has 7"):
        AveragedTeacher([first, small_teacher("test_efficientnet", num_classes=7)])
    with pytest.raises(InputError, match="got 0 and"):
        AveragedTeacher([])
    with pytest.raises(InputError, match=r"got 1 and \[1.0, 0.0\]"):
        AveragedTeacher([first], scales=(1.0, 0.0))
    with pytest.raises(InputError, match="mean_logit, mean_probability, got 'median'"):
        AveragedTeacher([first], combination="median")
    tokens = build_teacher(timm_classifier("vit_tiny_patch16_224", TINY_VIT, (48, 80)), image_size=(48, 80))
    with pytest.raises(InputError, match="built for images of 48x80 and takes none of 96x160"):
        AveragedTeacher([tokens], scales=(1.0, 2.0))


@pytest.mark.parametrize("from_run", [False, True])
def test_a_file_of_weights_tells_its_own_classes(from_run, tmp_path):
    model = timm_classifier("test_resnet", {}, (64, 96), num_classes=7)
    state = model.state_dict()
    if from_run:  # as the engine saves them
        linear = {key: state.pop(f"fc.{key}") for key in ("weight", "bias")}
        state = {f"classifier.backbone.model.{key}": value for key, value in state.items()}
        state |= {f"classifier.head.linear.{key}": value for key, value in linear.items()}
    torch.save({"method": state} if from_run else state, tmp_path / "weights.pth")
    config = BackboneConfig("test_resnet", checkpoint=str(tmp_path / "weights.pth"))
    teacher = build_teacher(config, image_size=(64, 96))
    assert teacher.num_classes == 7
    images = pictures((64, 96))
    with torch.no_grad():
        expected = model(normalised(teacher, images))
    torch.testing.assert_close(teacher.maps(images).mean((2, 3)), expected, rtol=0, atol=1e-4)


def test_a_file_in_older_names_takes_the_number_of_classes(tmp_path):
    """timm's converter knows ConvNeXt's original names, the file's own do not tell the classifier."""
    model = timm_classifier("convnext_atto", {}, (64, 96), num_classes=7)
    names = {
        "stem.0": "downsample_layers.0.0",
        "stem.1": "downsample_layers.0.1",
        "head.norm": "norm",
        "head.fc": "head",
    }
    state = {}
    for key, value in model.state_dict().items():
        old = next((old + key.removeprefix(new) for new, old in names.items() if key.startswith(f"{new}.")), key)
        for number in range(4):
            old = old.replace(f"stages.{number}.downsample.", f"downsample_layers.{number}.")
            old = old.replace(f"stages.{number}.blocks.", f"stages.{number}.")
        old = old.replace("conv_dw", "dwconv").replace("mlp.fc1", "pwconv1").replace("mlp.fc2", "pwconv2")
        state[old] = value
    torch.save({"model": state}, tmp_path / "original.pth")
    config = BackboneConfig("convnext_atto", checkpoint=str(tmp_path / "original.pth"))
    with pytest.raises(InputError, match="it has 7 classes, the head has 1000"):
        build_teacher(config, image_size=(64, 96))
    teacher = build_teacher(config, image_size=(64, 96), num_classes=7)
    images = pictures((64, 96))
    with torch.no_grad():
        torch.testing.assert_close(teacher.logits(images), model(normalised(teacher, images)), rtol=1e-4, atol=1e-4)


def test_random_weights_are_refused_unless_allowed(tmp_path):
    with pytest.raises(InputError) as caught:
        build_teacher("resnet18.a1_in1k", image_size=64)
    assert "resnet18.a1_in1k has random weights" in str(caught.value)
    assert "model.safetensors of the hub repository timm/resnet18.a1_in1k" in str(caught.value)
    assert build_teacher("test_resnet", image_size=(64, 96), allow_random=True).num_classes == 1000

    state = timm_classifier("test_resnet", {}, (64, 96)).state_dict()
    path = tmp_path / "weights.pth"
    config = BackboneConfig("test_resnet", checkpoint=str(path))
    torch.save({key: value for key, value in state.items() if not key.startswith("fc.")}, path)
    with pytest.raises(InputError, match="lacks a classifier"):
        build_teacher(config)
    torch.save({key: value for key, value in state.items() if not key.startswith("layer4.")}, path)
    with pytest.raises(InputError, match="lacks weights .* missing: layer4"):
        build_teacher(config)
    assert build_teacher(config, allow_random=True).num_classes == 10


def test_what_has_no_dense_reading_is_refused():
    backbone = Backbone(timm.create_model("test_resnet", num_classes=0), (64, 96))
    head = CsraHead(backbone.num_features, 3, CsraHeadConfig())
    with pytest.raises(InputError, match="expected a linear head on test_resnet, got CsraHead"):
        DenseTeacher(Classifier(backbone, head))
    with pytest.raises(InputError, match="got dict"):
        build_teacher({})

    flattened = Backbone(
        timm.create_model("test_resnet", num_classes=0, global_pool=""), (64, 96)
    )  # classifies 2 x 3 x D
    classifier = Classifier(flattened, LinearHead(flattened.num_features, 3, LinearHeadConfig()))
    with pytest.raises(
        InputError, match=r"no dense reading: its head cannot take a single cell \(96 features of one, 576"
    ):
        DenseTeacher(classifier)


def test_images_are_resized_by_the_filter_of_the_weights():
    teacher = small_teacher("tf_efficientnet_lite0")
    assert teacher.preprocessing.interpolation == "bicubic"
    images = pictures((96, 128)).round()  # black and white: bicubic overshoots
    view = F.interpolate(images, (64, 96), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        average = AveragedTeacher([teacher])
        torch.testing.assert_close(average.maps(images), teacher.maps(view))
        torch.testing.assert_close(average.logits((images * 255).byte()), teacher.logits(view), rtol=0, atol=0.2)
