import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from data.text.tokenizers import ByteTokenizer, load_tokenizer, texts_of

TEXTS = ["the cat sat on the mat", "", "naïve café ☕ — 日本語", "a" * 500, "the </s> is text"]


Bpe = Callable[..., Path]
"""(special tokens, tokenizer_config.json) -> the folder of a tokenizer."""


@pytest.fixture
def bpe(tmp_path: Path) -> Bpe:
    """A byte-level BPE of 300 tokens, trained here, in a folder as save_pretrained() leaves it."""

    def save(special: Sequence[str] = ("</s>",), config: dict[str, object] | None = None) -> Path:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=list(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        tokenizer.train_from_iterator(["the cat sat on the mat and the dog sat on the cat"] * 20, trainer)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        if config is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return save


@pytest.mark.parametrize("texts", [TEXTS, texts_of(pa.array(TEXTS))], ids=["str", "arrow"])
def test_bytes_are_the_utf8_of_the_text(texts: Sequence[str]) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(texts)
    assert [bytes(document.tolist()) for document in ids] == [text.encode() for text in TEXTS]
    assert [tokenizer.decode(document) for document in ids] == TEXTS
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.mask) == (258, 256, 257)
    assert tokenizer.decode([104, 105, 256, 257]) == "hi<eod><mask>"


@pytest.mark.parametrize(
    "array",
    [
        pa.array(TEXTS),
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS, pa.string_view()),
        pa.array(["x", *TEXTS, "y"]).slice(1, len(TEXTS)),
        pa.array([None if text == "" else text for text in TEXTS]),
    ],
    ids=["string", "large", "view", "slice", "nulls"],
)
def test_texts_of_any_arrow_column(array: pa.Array) -> None:
    assert [text.tobytes().decode() for text in texts_of(array)] == TEXTS
    assert texts_of(array.slice(0, 0)) == []


def test_bytes_are_not_copied_from_arrow() -> None:
    array = pa.array(TEXTS)
    memory = np.frombuffer(array.buffers()[2], np.uint8)
    assert all(
        np.shares_memory(document, memory) for document in ByteTokenizer().encode(texts_of(array)) if len(document)
    )


def test_a_hugging_face_tokenizer_agrees_with_its_library(bpe: Bpe) -> None:
    folder = bpe()
    tokenizer = load_tokenizer(str(folder))
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.encode_special_tokens = True
    expected = [library.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert [document.tolist() for document in tokenizer.encode(TEXTS)] == expected
    assert [document.tolist() for document in tokenizer.encode(texts_of(pa.array(TEXTS)))] == expected
    assert tokenizer.vocab_size == library.get_vocab_size()
    assert tokenizer.eod == library.token_to_id("</s>")
    assert tokenizer.mask is None


def test_text_that_looks_like_a_special_token_is_text(bpe: Bpe) -> None:
    tokenizer = load_tokenizer(str(bpe() / "tokenizer.json"))
    assert tokenizer.eod not in tokenizer.encode(["the </s> is text"])[0]


def test_the_config_names_the_special_tokens(bpe: Bpe) -> None:
    folder = bpe(
        special=("</s>", "<stop>", "<hole>"), config={"eos_token": {"content": "<stop>"}, "mask_token": "<hole>"}
    )
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.eod, tokenizer.mask) == (1, 2)


def test_the_digest_follows_the_content(bpe: Bpe) -> None:
    before = load_tokenizer(str(bpe())).digest
    assert load_tokenizer(str(bpe())).digest == before
    assert load_tokenizer(str(bpe(special=("</s>", "<pad>")))).digest != before


def test_no_end_of_text_token_is_said_in_one_line(bpe: Bpe) -> None:
    with pytest.raises(
        ValueError,
        match=r"^run.objective.data.tokenizer: .*: no end-of-text token .*; name one as eos_token in ",
    ):
        load_tokenizer(str(bpe(special=("<pad>",))))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/place", "no such file or folder"),
        ("missing.json", "no such file or folder"),
        ("{tmp}", "holds no tokenizer.json"),
    ],
)
def test_missing_tokenizers_are_one_line(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^run.objective.data.tokenizer: .*{message}.*; (use|save) ") as raised:
        load_tokenizer(name.format(tmp=tmp_path))
    assert "\n" not in str(raised.value)


def test_a_file_that_is_no_tokenizer_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"some": "thing"}')
    with pytest.raises(
        ValueError, match=r"^run.objective.data.tokenizer: .* is not a tokenizer .*use a tokenizer.json"
    ):
        load_tokenizer(str(tmp_path))
