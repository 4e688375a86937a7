"""The files from which transformers' AutoTokenizer makes the same tokenizer."""

import json

from data.text.tokenizers import ByteTokenizer, files_of, load_tokenizer

EOD = "<eod>"
MASK = "<mask>"


def tokenizer_files(name: str) -> dict[str, bytes]:
    """Contents of tokenizer.json and tokenizer_config.json, for a job's `data.tokenizer`."""
    if name == "bytes":
        return _byte_files()
    tokenizer = load_tokenizer(name)
    files = {file.name: file.read_bytes() for file in files_of(name)}
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    config["eos_token"] = config.get("eos_token") or tokenizer.decode([tokenizer.eod])
    return files | {"tokenizer_config.json": json.dumps(config, indent=2).encode()}


def token_ids(tokenizer_json: bytes) -> dict[str, int]:
    """The id of each token of a tokenizer.json, including the special ones."""
    from tokenizers import Tokenizer

    return dict(Tokenizer.from_str(tokenizer_json.decode()).get_vocab(with_added_tokens=True))


def _byte_files() -> dict[str, bytes]:
    """A byte-pair encoding without pairs: exactly the ids of `ByteTokenizer`.

    With special tokens, a text begins with `<eod>`, as each document did in training; without them
    its ids are its bytes. The text `<eod>` itself is five characters, as in training
    (`split_special_tokens`).
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.processors import TemplateProcessing

    rust = Tokenizer(BPE({character: byte for byte, character in enumerate(_characters())}, []))
    rust.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = ByteDecoder()
    rust.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (EOD, MASK)])
    assert (rust.token_to_id(EOD), rust.token_to_id(MASK)) == (ByteTokenizer.eod, ByteTokenizer.mask)
    rust.post_processor = TemplateProcessing(
        single=f"{EOD} $A", pair=f"{EOD} $A {EOD} $B", special_tokens=[(EOD, ByteTokenizer.eod)]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOD,
        "eos_token": EOD,
        "pad_token": EOD,
        "mask_token": MASK,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return {
        "tokenizer.json": rust.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
    }


def _characters() -> list[str]:
    """The printable character that byte-level tokenizers (Radford et al. 2019) write for a byte.

    It is the byte's own character, or one from 256 on.
    """
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]
