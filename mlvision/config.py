"""The options of a training run, and how a run's saved options are read again."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from mlvision.data import CocoConfig
from mlvision.data.loader import LoaderConfig
from mlvision.data.readers.base import DataConfig
from mlvision.data.views import ViewConfig
from mlvision.engine.checkpoint import CheckpointConfig
from mlvision.engine.distributed import DdpConfig
from mlvision.engine.log import LogConfig
from mlvision.engine.optim import EmaConfig, OptimConfig
from mlvision.engine.precision import MOST_THREADS
from mlvision.errors import check_fields
from mlvision.evaluators import EvaluatorConfig, MultilabelConfig, check_each_once
from mlvision.files import is_file_name
from mlvision.methods import BaselineConfig, MethodConfig
from mlvision.models import BackboneConfig, HeadConfig, LinearHeadConfig
from mlvision.options import EVALUATION, INERT, build_options, flatten, parse_options, read_yaml
from mlvision.versions import CONFIG_VERSION, upgrade

_T = TypeVar("_T")


@dataclass(frozen=True)
class Config:
    """All options of a training run."""

    config_version: Annotated[int, "version of the options' names, for those that are saved"] = CONFIG_VERSION
    name: Annotated[str, "name of the configuration; empty: the YAML's file name", INERT] = ""
    out: Annotated[str, "run folder; empty: runs/<name>-<date>, or with resume=auto the newest equal run", INERT] = ""
    resume: Annotated[str, "auto: go on from the last checkpoint where there is one; empty: a new run", INERT] = ""
    seed: Annotated[int, "seed of weights, order and views"] = 0
    device: Annotated[
        str,
        "auto (GPU where there is one), cpu, cuda or cuda:<number>; under torchrun each process has its own GPU",
        EVALUATION,
    ] = "auto"
    precision: Annotated[str, "auto (fp32 on a CPU, bf16 or fp16 on a GPU), fp32, bf16 or fp16", EVALUATION] = "auto"
    threads: Annotated[int, "CPU threads of torch; 0: torch's own choice", EVALUATION] = 0
    deterministic: Annotated[
        bool, "torch's deterministic algorithms alone: slower on a GPU, and an error where an operation has none"
    ] = False
    compile: Annotated[str, "backend of torch.compile for the backbone in training, such as inductor; empty: none"] = ""
    label_maps: Annotated[str, "store of the training images' label maps, made by tools/make_label_maps.py", INERT] = ""
    data: Annotated[DataConfig, EVALUATION] = field(default_factory=CocoConfig)
    view: ViewConfig = field(default_factory=ViewConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    model: Annotated[BackboneConfig, EVALUATION] = field(default_factory=BackboneConfig)
    head: Annotated[HeadConfig, EVALUATION] = field(default_factory=LinearHeadConfig)
    method: Annotated[MethodConfig, EVALUATION] = field(default_factory=BaselineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    ddp: DdpConfig = field(default_factory=DdpConfig)
    evaluators: Annotated[list[EvaluatorConfig], "what is measured after each epoch"] = field(
        default_factory=lambda: [MultilabelConfig()]
    )
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: Annotated[LogConfig, INERT] = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        version = f"{CONFIG_VERSION}, whose names the options here must have"
        rules = (
            ("config_version", self.config_version == CONFIG_VERSION, version),
            ("name", is_file_name(self.name), "a name for a folder, without / and other than . and .."),
            ("resume", self.resume in ("", "auto"), "auto or nothing; out= names the folder"),
            ("seed", self.seed >= 0, "0 or more"),
            ("threads", 0 <= self.threads <= MOST_THREADS, f"0 (torch's own choice) to {MOST_THREADS}"),
        )
        check_fields(self, "", rules)
        check_each_once(self.evaluators)


def parse_run_options(cls: type[_T], argv: Sequence[str], *, prog: str, description: str | None) -> _T:
    """As `parse_options`, of a script that takes a run's YAML: of a Config's options, those that `cls` does not have are
    passed over, and a saved config of an older version is upgraded.

    Raises:
        InputError: as `parse_options`, or a saved config of a newer version.
    """
    own, of_runs = ({option.name for option in dataclasses.fields(c)} for c in (cls, Config))  # pyright: ignore[reportArgumentType]

    def read(path: Path) -> dict[Any, Any]:
        values = read_yaml(path)
        if "config_version" in values:
            values = upgrade(values, str(path))
        return {key: value for key, value in values.items() if key in own or key not in of_runs}

    return parse_options(cls, argv, prog=prog, description=description, read=read)


def load_config(path: Path) -> Config:
    """The options that a run saved, of this or an older version.

    Raises:
        InputError: the file is missing, malformed, of a newer version, or cannot be upgraded.
    """
    return saved_config(read_yaml(path), str(path))


def saved_config(values: Any, source: str) -> Config:
    """A run's options from what `source`, a config.yaml or a record, holds of them; errors as `load_config`."""
    return build_options(Config, upgrade(values, source), source=source)


def config_difference(saved: Config, asked: Config) -> str:
    """The first option in which two configs compute something else, or nothing."""
    before, now = (flatten(config, without=INERT) for config in (saved, asked))
    for values in (before, now):
        values["device"] = values["device"].partition(":")[0]
    for key in before | now:
        if before.get(key) != now.get(key):
            return f"{key} is {before.get(key)!r} there, {now.get(key)!r} was asked for"
    return ""
