"""Text to token ids and back: raw bytes, or any Hugging Face tokenizer.

A text is an array of its UTF-8 bytes, a view of arrow's memory. So it is already its own encoding
as raw bytes.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, Protocol, TypedDict

import numpy as np
import numpy.typing as npt

from data.sources.arrow import views
from data.text.packing import Tokens

if TYPE_CHECKING:
    import pyarrow as pa

Text = npt.NDArray[np.uint8]

END_OF_TEXT = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<|im_end|>",
    "[EOS]",
    "[SEP]",
    "<end_of_text>",
)
MASK = ("[MASK]", "<mask>", "<|mask|>")


class SpecialTokens(TypedDict):
    """The entries read of a tokenizer_config.json: a token, or an object with its `content`."""

    eos_token: NotRequired[str | dict[str, object] | None]
    mask_token: NotRequired[str | dict[str, object] | None]


class Tokenizer(Protocol):
    """A tokenizer, as the stream uses it."""

    vocab_size: int
    eod: int
    """The token after each document, and before the first."""
    mask: int | None
    """The token that replaces a masked one; None if the vocabulary has none."""
    digest: str
    """Changes whenever the ids of any text would change."""

    def encode(self, texts: Sequence[str] | Sequence[Text]) -> Sequence[Tokens]:
        """The ids of each text, without `eod`; what looks like a special token is text."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens are shown by name."""


class ByteTokenizer:
    """The 256 bytes of UTF-8 as they are, followed by end-of-document and mask."""

    vocab_size = 258
    eod = 256
    mask: int | None = 257
    digest = "bytes-258"

    def encode(self, texts: Sequence[str] | Sequence[Text]) -> Sequence[Tokens]:
        return [_as_bytes(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        names = {self.eod: b"<eod>", self.mask: b"<mask>"}
        pieces = [names[i] if i in names else bytes([i]) for i in map(int, ids)]
        return b"".join(pieces).decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A `tokenizer.json`, with the special tokens of its `tokenizer_config.json`."""

    def __init__(self, file: Path, special: SpecialTokens, label: str) -> None:
        from tokenizers import Tokenizer as Rust

        field = f"run.objective.data.tokenizer: {label!r}"
        try:
            self.rust = Rust.from_file(str(file))
        except Exception as error:  # the library raises plain Exception for a file that it cannot parse
            problem = f"{file.name} is not a tokenizer ({_first_line(error)})"
            raise ValueError(f"{field}: {problem}; use a tokenizer.json of `tokenizers`") from error
        self.digest = hashlib.sha256(self.rust.to_str().encode()).hexdigest()[:16]
        self.rust.encode_special_tokens = True  # "</s>" in a document is four characters, not its end
        self.rust.no_padding()
        self.rust.no_truncation()
        vocabulary = self.rust.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        eod = _special_id(vocabulary, special.get("eos_token"), END_OF_TEXT)
        if eod is None:
            problem = f"no end-of-text token (looked for eos_token of its config, {', '.join(END_OF_TEXT)})"
            raise ValueError(f"{field}: {problem}; name one as eos_token in tokenizer_config.json")
        self.eod = eod
        self.mask = _special_id(vocabulary, special.get("mask_token"), MASK)

    def encode(self, texts: Sequence[str] | Sequence[Text]) -> Sequence[Tokens]:
        strings = [text if isinstance(text, str) else text.tobytes().decode() for text in texts]
        encodings = self.rust.encode_batch_fast(strings, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self.rust.decode([int(i) for i in ids], skip_special_tokens=False))


def load_tokenizer(name: str) -> Tokenizer:
    """`bytes`, a folder with a tokenizer.json, such a file, or the name of a Hub repository.

    Raises ValueError, in one line, if there is no such tokenizer or it has no end-of-text token.
    """
    if name == "bytes":
        return ByteTokenizer()
    file, *config = files_of(name)
    return HuggingFaceTokenizer(file, _special_tokens(config[0]) if config else {}, name)


def files_of(name: str) -> list[Path]:
    """The tokenizer.json that `name` (not `bytes`) means, and its tokenizer_config.json if there is
    one.

    Raises ValueError, in one line, if there is neither.
    """
    field = f"run.objective.data.tokenizer: {name!r}"
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
        if not path.is_file():
            fix = "save it with save_pretrained() of a fast tokenizer"
            raise ValueError(f"{field}: the folder holds no tokenizer.json; {fix}")
    if path.is_file():
        return [file for file in (path, path.with_name("tokenizer_config.json")) if file.is_file()]
    if path.suffix == ".json" or path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise ValueError(f"{field}: no such file or folder; use `bytes`, a path or a Hub repository")
    return _from_hub(name)


def texts_of(array: "pa.Array") -> list[Text]:
    """Each value of an arrow array as UTF-8, as views if they are strings; nulls are empty."""
    import pyarrow as pa

    if not (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
        array = array.cast(pa.large_string())
    return views(array)


def _from_hub(name: str) -> list[Path]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        path = Path(hf_hub_download(name, "tokenizer.json"))
        try:
            return [path, Path(hf_hub_download(name, "tokenizer_config.json"))]
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return [path]
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        problem = f"not `bytes`, no such path, and the Hub gave no tokenizer.json ({_first_line(error)})"
        fix = "check the name, HF_TOKEN and the network"
        raise ValueError(f"run.objective.data.tokenizer: {name!r}: {problem}; {fix}") from error


def _as_bytes(text: str | Text) -> Text:
    return np.frombuffer(text.encode(), np.uint8) if isinstance(text, str) else text


def _special_tokens(file: Path) -> SpecialTokens:
    tokens: SpecialTokens = json.loads(file.read_text(encoding="utf-8"))
    return tokens


def _special_id(vocabulary: dict[str, int], configured: object, usual: Sequence[str]) -> int | None:
    """The id of the token that the tokenizer's config names, else of the first usual one in the
    vocabulary.
    """
    content = configured.get("content") if isinstance(configured, dict) else configured
    names = [content, *usual] if isinstance(content, str) else usual
    return next((vocabulary[name] for name in names if name in vocabulary), None)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
