"""Captions of images that have labels: a template and the name of the class, as bytes.

M samples, K classes, S templates, T bytes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.random import integers, sample_keys


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """How the class of an image is put into words."""

    names: tuple[str, ...] = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    """Of the classes, in the order of their numbers."""
    templates: tuple[str, ...] = (
        "a picture of the digit {}",
        "the number {}, written by hand",
        "{}",
        "somebody wrote {} here",
    )
    """Sentences with {} for the name; a training sample gets one by (seed, sample number), held-out ones the first."""

    def __post_init__(self) -> None:
        if not self.templates or any(each.count("{}") != 1 for each in self.templates):
            raise ValueError(
                f"captions.templates: {list(self.templates)}; give one or more, each with {{}} once, where the class's name goes"
            )


class Captions:
    """All captions there are, as tokens."""

    def __init__(self, config: CaptionConfig, seed: int):
        from data.text.tokenizers import ByteTokenizer

        self.config, self.seed, tokenizer = config, seed, ByteTokenizer()
        self.vocab_size = tokenizer.vocab_size
        texts = [template.replace("{}", name) for name in config.names for template in config.templates]
        encoded = [torch.tensor([*text.encode(), tokenizer.eod]) for text in texts]
        longest = max(len(each) for each in encoded)
        self.tokens_NT = torch.stack(
            [torch.nn.functional.pad(each, (0, longest - len(each)), value=tokenizer.eod) for each in encoded]
        )
        self.end_N = torch.tensor([len(each) - 1 for each in encoded])

    def of(self, label_M: Tensor, template_M: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (M, T) of the captions, and where each ends (M,)."""
        place_M = (label_M * len(self.config.templates) + template_M).cpu()
        return self.tokens_NT[place_M].to(label_M.device), self.end_N[place_M].to(label_M.device)

    def drawn(self, label_M: Tensor, number_M: Tensor) -> tuple[Tensor, Tensor]:
        """The same, with the template that falls to each training sample."""
        return self.of(label_M, integers(sample_keys(self.seed, number_M, "caption"), len(self.config.templates)))
