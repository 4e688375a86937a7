"""Objectives of language models, dense or mixture of experts: the next token, or masked tokens.

The mathematics is in models/transformer/ and models/moe/.

Legend: B samples, T positions, V vocabulary, G routing groups, L MoE layers, E experts.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.share import Batch, RunState, Share
from models.losses import cross_entropy_sum
from models.moe.figures import routing_figures, routing_sums
from models.moe.layer import router_loss
from models.moe.watch import build_watch
from models.random import derive, integers, sample_keys, uniform
from models.transformer.cost import flops_per_token
from models.transformer.generate import generate
from models.transformer.model import Transformer
from trainer.core.protocols import SampleSet, Stream, Sums
from trainer.objectives.base import BaseObjective
from trainer.objectives.language.config import CausalConfig, MaskedLanguageConfig, TextModelConfig
from trainer.objectives.language.vocabulary import embedding_rows

IGNORE = -100
"""The target at positions that do not count."""


class ForwardPass(NamedTuple):
    """Results of a forward pass over a batch."""

    inputs_BT: Tensor
    """The tokens that the network read."""
    targets_BT: Tensor
    """The tokens to predict; IGNORE where none counts."""
    logits_BTV: Tensor
    """The network's outputs."""
    nll_sum: Tensor
    """Cross-entropy, summed over the targets."""
    router_sum: Tensor | None
    """The router's losses, weighted by each group's number of targets; None without experts."""
    sums: Sums
    """The metrics' sums, without the loss."""


class TextObjective(BaseObjective):
    """Base of the language objectives: cross-entropy of the targets, plus the router's losses.

    The router's losses are group means, weighted by the group's number of targets.
    """

    config: TextModelConfig

    def __init__(self, config: TextModelConfig, seed: int):
        from data.text.tokenizers import load_tokenizer

        self.config = replace(config, model=config.trained_model)
        self.seed = seed
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        self._check_tokenizer()
        vocab_size = embedding_rows(config.vocab_size, self.tokenizer)
        self.model = Transformer(self.config.model, vocab_size)
        self.watch = build_watch(config.collapse, config.moe, len(self.model.moe_layers))
        if self.watch is not None:
            # As buffers of the network, the counters are saved, loaded and moved with it.
            self.model.add_module("routing_watch", self.watch)
        self.networks: dict[str, nn.Module] = {"model": self.model}
        self.tokens_per_sample = config.tokens_per_sample
        seq_len = config.data.seq_len
        self.flops_per_sample = seq_len * flops_per_token(self.config.model, vocab_size, seq_len)
        self.group = config.group

    @abstractmethod
    def _check_tokenizer(self) -> None:
        """Raises ValueError if the tokenizer lacks a token that the objective needs."""

    @abstractmethod
    def _inputs_and_targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The inputs (B, T), and the token to predict or IGNORE at every position (B, T)."""

    @abstractmethod
    def _aligned(self, tokens_BT: Tensor) -> Tensor:
        """Selects the inputs' values (B, T) from those of all T + 1 tokens of the samples."""

    def stream(self, share: Share, state: RunState | None) -> Stream:
        from data.training_stream import TextStream

        return TextStream(self.config.data, share, seed=self.seed, state=state or None)

    def held_out(self, share: Share) -> Iterable[Batch]:
        from data.text.held_out import held_out

        return held_out(self.config.data, rank=share.rank, world=share.world, micro_batch=share.micro_batch)

    def _targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T); targets that do not count are IGNORE."""
        inputs_BT, targets_BT = self._inputs_and_targets(batch)
        if "mask" in batch:
            targets_BT = targets_BT.where(batch["mask"], IGNORE)
        return inputs_BT, targets_BT

    def _segments(self, batch: Batch) -> Tensor | None:
        """Each input's document (B, T); None if attention crosses documents."""
        segments_BT = batch.get("segments")
        return None if segments_BT is None else self._aligned(segments_BT)

    def weight(self, phase: str, batch: Batch) -> Tensor:
        return (self._targets(batch)[1] != IGNORE).sum().double()

    def loss(self, phase: str, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Sums]:
        forward = self._forward(net, batch)
        return self._with_router_losses(forward.nll_sum, forward)

    def _forward(self, net: nn.Module, batch: Batch) -> ForwardPass:
        inputs_BT, targets_BT = self._targets(batch)
        logits_BTV, stats = net(inputs_BT, batch["sample"], self._segments(batch), self.seed)
        nll_sum = cross_entropy_sum(logits_BTV, targets_BT, IGNORE)
        targets_B = (targets_BT != IGNORE).sum(1)
        sums = {"nll": nll_sum.detach().double(), "targets": targets_B.sum().double()}
        router_sum = None
        if stats:
            assert self.config.model.moe is not None
            targets_G = targets_B.view(len(stats[0].balance_G), -1).sum(1)
            raised_L = None if self.watch is None else self.watch.raised_L
            router_sum = (router_loss(self.config.model.moe, stats, raised_L) * targets_G).sum()
            sums |= routing_sums(stats, targets_G)
        return ForwardPass(inputs_BT, targets_BT, logits_BTV, nll_sum, router_sum, sums)

    def _with_router_losses(self, loss: Tensor, forward: ForwardPass) -> tuple[Tensor, Sums]:
        """`loss` of the targets plus the router's losses, and the metrics' sums."""
        if forward.router_sum is not None:
            loss = loss + forward.router_sum
        return loss, forward.sums | {"loss": loss.detach().double()}

    @torch.no_grad()
    def evaluate(self, nets: Mapping[str, nn.Module], batch: Batch) -> Sums:
        forward = self._forward(nets["model"], batch)
        _, sums = self._with_router_losses(forward.nll_sum, forward)
        return sums | {"bytes": batch["bytes"].sum()}

    def report(self, sums: Sums) -> dict[str, float]:
        targets = sums["targets"].item()
        cross_entropy = sums["nll"].item() / targets
        losses = {"loss": sums["loss"].item() / targets, "cross_entropy": cross_entropy}
        return losses | self._text_metrics(sums) | routing_figures(sums)

    def _text_metrics(self, sums: Sums) -> dict[str, float]:
        """Metrics that only some of the language objectives have."""
        return {}

    def after_step(self, sums: Sums, add_over_ranks: Callable[[Tensor], Tensor]) -> None:
        moe = self.config.model.moe
        if moe is None or self.watch is None:
            return
        load_LE = add_over_ranks(sums["load_LE"].clone())
        self.watch.count(load_LE)
        for layer, load_E in zip(self.model.moe_layers, load_LE, strict=True):
            layer.after_step(load_E)

    def baselines(self) -> dict[str, float]:
        from data.text.held_out import held_out_documents, xz_bits_per_byte

        together, one_by_one = xz_bits_per_byte(held_out_documents(self.config.data))
        return {"xz_bits_per_byte_together": together, "xz_bits_per_byte_one_by_one": one_by_one}

    def manifest(self) -> Mapping[str, object]:
        from data.manifest import manifest

        return dict(manifest(self.config.data, seed=self.seed, lanes=self.config.data.lanes))


class LanguageObjective(TextObjective):
    """Predicts the next token."""

    config: CausalConfig

    def _check_tokenizer(self) -> None:
        """Accepts every tokenizer."""

    def _inputs_and_targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        tokens_BT = batch["tokens"]
        return tokens_BT[:, :-1], tokens_BT[:, 1:]

    def _aligned(self, tokens_BT: Tensor) -> Tensor:
        return tokens_BT[:, :-1]

    def _text_metrics(self, sums: Sums) -> dict[str, float]:
        evaluated = "bytes" in sums  # training does not count them
        if not evaluated:
            return {}
        length = sums["bytes"].item()
        return {
            "bits_per_byte": sums["nll"].item() / math.log(2) / length,
            "bytes_per_token": length / sums["targets"].item(),
        }

    def sample(self, nets: Mapping[str, nn.Module], n: int, generator: torch.Generator) -> SampleSet:
        config = self.config
        device = next(self.model.parameters()).device
        prompt = self.tokenizer.encode([config.prompt])[0].tolist() if config.prompt else []
        prompt_BT = torch.tensor([self.tokenizer.eod, *prompt], device=device).repeat(n, 1)
        tokens_BT = generate(self.model, prompt_BT, config.sample_tokens, config.temperature, generator=generator)
        texts = [self._decode(tokens_T[1:].tolist()) for tokens_T in tokens_BT]
        return SampleSet(text={f"sample-{index}": text for index, text in enumerate(texts)})

    def _decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, without those that only the embedding has."""
        return self.tokenizer.decode([token for token in tokens if token < self.tokenizer.vocab_size])


class MaskedLanguageObjective(TextObjective):
    """Restores masked tokens."""

    config: MaskedLanguageConfig

    def _check_tokenizer(self) -> None:
        if self.tokenizer.mask is None:
            name = self.config.data.tokenizer
            raise ValueError(
                f"run.objective.data.tokenizer: {name} has no mask token, which masked_lm needs; "
                "use bytes, or a tokenizer that has one"
            )

    def _inputs_and_targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert self.tokenizer.mask is not None, "_check_tokenizer refuses a tokenizer without a mask"
        tokens_BT = self._aligned(batch["tokens"])
        return mask_tokens(
            tokens_BT, batch["sample"], self.config.mask_rate, self.tokenizer.mask, self.tokenizer.vocab_size, self.seed
        )

    def _aligned(self, tokens_BT: Tensor) -> Tensor:
        return tokens_BT[:, 1:]


def mask_tokens(
    tokens_BT: Tensor, samples_B: Tensor, rate: float, mask: int, vocab_size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Corrupts tokens as BERT does; returns inputs and targets (B, T).

    A token is chosen with probability `rate`; 80 % of the chosen tokens become `mask`, 10 % become
    a random token, and 10 % stay. Targets that were not chosen are IGNORE. The draws depend on
    (seed, sample number) alone.
    """
    keys_B = sample_keys(seed, samples_B, "masked tokens")
    length = tokens_BT.shape[1:]
    chosen_BT = uniform(derive(keys_B, "chosen"), length) < rate
    kind_BT = uniform(derive(keys_B, "kind"), length)
    random_BT = integers(derive(keys_B, "random token"), vocab_size, length)
    inputs_BT = tokens_BT.where(~(chosen_BT & (kind_BT < 0.8)), mask)
    inputs_BT = inputs_BT.where(~(chosen_BT & (kind_BT >= 0.9)), random_BT)
    return inputs_BT, tokens_BT.where(chosen_BT, IGNORE)
