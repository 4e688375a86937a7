"""Captions of labelled images, as bytes: a template filled with the name of the class.

Legend: M samples, N captions (classes times templates), T bytes.
"""

from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from models.random import integers, sample_keys


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """The words for the class of an image."""

    names: tuple[str, ...] = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    """Names of the classes, in the order of their numbers."""
    templates: tuple[str, ...] = (
        "a picture of the digit {}",
        "the number {}, written by hand",
        "{}",
        "somebody wrote {} here",
    )
    """Sentences with {} for the class's name. A training sample's template is drawn from (seed,
    sample number); held-out samples use the first one."""

    def __post_init__(self) -> None:
        if not self.templates or any(template.count("{}") != 1 for template in self.templates):
            raise ValueError(
                f"captions.templates: {list(self.templates)} is not a list of sentences with one {{}} each; "
                "write one or more templates, each with {} once, where the class's name goes"
            )


class Captions:
    """The captions of all classes in all templates, as tokens."""

    def __init__(self, config: CaptionConfig, seed: int):
        from data.text.tokenizers import ByteTokenizer

        self.config = config
        self.seed = seed
        tokenizer = ByteTokenizer()
        self.vocab_size = tokenizer.vocab_size
        texts = [template.replace("{}", name) for name, template in product(config.names, config.templates)]
        captions = [torch.tensor([*text.encode(), tokenizer.eod]) for text in texts]
        length = max(len(tokens) for tokens in captions)
        padded = [F.pad(tokens, (0, length - len(tokens)), value=tokenizer.eod) for tokens in captions]
        self.tokens_NT = torch.stack(padded)
        self.end_N = torch.tensor([len(tokens) - 1 for tokens in captions])

    def for_images(self, label_M: Tensor, template_M: Tensor) -> tuple[Tensor, Tensor]:
        """The captions' tokens (M, T) and the position of each caption's last token (M,)."""
        caption_M = (label_M * len(self.config.templates) + template_M).cpu()
        return self.tokens_NT[caption_M].to(label_M.device), self.end_N[caption_M].to(label_M.device)

    def for_training_images(self, label_M: Tensor, number_M: Tensor) -> tuple[Tensor, Tensor]:
        """`for_images`, with a template drawn for each sample number."""
        template_M = integers(sample_keys(self.seed, number_M, "caption"), len(self.config.templates))
        return self.for_images(label_M, template_M)
