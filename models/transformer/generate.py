"""Generates text from a causal transformer, one token at a time, with cached keys and values.

Legend: B samples, T positions, V vocabulary.
"""

import torch
from torch import Tensor

from models.transformer.attention import KVCache
from models.transformer.model import Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    prompt_BT: Tensor,
    n: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    stop: int | None = None,
) -> Tensor:
    """Append `n` generated tokens to `prompt_BT` (at least one token): (B, T) -> (B, T + n), int64.

    Stops early once every sample has generated the token `stop`. Temperature 0 selects the most
    probable token; `top_k` samples from the k most probable tokens only. Experts are dropless, as
    in evaluation. Raises ValueError for a bidirectional model or an empty prompt.
    """
    if not model.config.causal:
        raise ValueError(
            "generate: the model is bidirectional (causal: false) and cannot write text from left to right"
        )
    if prompt_BT.shape[1] == 0:
        raise ValueError("generate: the prompt has 0 tokens; give it at least 1")
    training = model.training
    model.eval()
    caches = [KVCache() for _ in model.blocks]
    tokens_BT = prompt_BT
    new_BT = prompt_BT
    for _ in range(n):
        logits_BV = model(new_BT, caches=caches)[0][:, -1].float()
        new_BT = choose(logits_BV, temperature, top_k, generator)
        tokens_BT = torch.cat((tokens_BT, new_BT), dim=1)
        if stop is not None and bool((tokens_BT[:, prompt_BT.shape[1] :] == stop).any(1).all()):
            break
    model.train(training)
    return tokens_BT


def choose(logits_BV: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Sample one token per sample from logits (B, V): (B, 1)."""
    if temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    if top_k is not None:
        smallest_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, -torch.inf)
    return torch.multinomial((logits_BV / temperature).softmax(-1), 1, generator=generator)
