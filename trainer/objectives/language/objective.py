"""Language models: the next token, or masked ones (BERT). Dense or mixture of experts.

The mathematics is in models/transformer/ and models/moe/.

Legend: B samples, T positions, V vocabulary, G routing groups, E experts.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
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


class Pass(NamedTuple):
    """What a forward pass over a batch gives."""

    inputs_BT: Tensor
    targets_BT: Tensor
    logits_BTV: Tensor
    nll_sum: Tensor
    """Cross-entropy of the targets, summed."""
    router_sum: Tensor | None
    """The router's losses, each group's for its targets; None without experts."""
    sums: Sums


class TextObjective(BaseObjective):
    """The loss is the cross-entropy of the targets, plus the router losses: group means, weighted by the group's number of targets."""

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
            self.model.add_module(
                "routing_watch", self.watch
            )  # its counters are then buffers of the network: saved, loaded and moved with it
        self.networks: dict[str, nn.Module] = {"model": self.model}
        self.tokens_per_sample = config.tokens_per_sample
        self.flops_per_sample = config.data.seq_len * flops_per_token(
            self.config.model, vocab_size, config.data.seq_len
        )
        self.group = config.group

    @abstractmethod
    def _check_tokenizer(self) -> None:
        """Raises ValueError for a tokenizer that lacks a token that is needed."""

    @abstractmethod
    def _inputs_and_targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the network reads (B, T), and the token to predict at each position, IGNORE where none is."""

    @abstractmethod
    def _aligned(self, tokens_BT: Tensor) -> Tensor:
        """Of values for all tokens of a sample, those for the inputs: a sample holds one token more."""

    def stream(self, share: Share, state: RunState | None) -> Stream:
        from data.training_stream import TextStream

        return TextStream(self.config.data, share, seed=self.seed, state=state or None)

    def held_out(self, share: Share) -> Iterable[Batch]:
        from data.text.held_out import held_out

        return held_out(self.config.data, rank=share.rank, world=share.world, micro_batch=share.micro_batch)

    def _targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T); a target that does not count is IGNORE."""
        inputs_BT, targets_BT = self._inputs_and_targets(batch)
        if "mask" in batch:
            targets_BT = targets_BT.where(batch["mask"], IGNORE)
        return inputs_BT, targets_BT

    def _segments(self, batch: Batch) -> Tensor | None:
        """The document (B, T) of each input, where documents are kept apart."""
        segments_BT = batch.get("segments")
        return None if segments_BT is None else self._aligned(segments_BT)

    def weight(self, phase: str, batch: Batch) -> Tensor:
        return (self._targets(batch)[1] != IGNORE).sum().double()

    def loss(self, phase: str, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Sums]:
        done = self._forward(net, batch)
        return self._summed(done.nll_sum, done)

    def _forward(self, net: nn.Module, batch: Batch) -> Pass:
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
        return Pass(inputs_BT, targets_BT, logits_BTV, nll_sum, router_sum, sums)

    def _summed(self, loss: Tensor, done: Pass) -> tuple[Tensor, Sums]:
        """`loss` of the targets with the router's losses, and the metrics."""
        loss = loss if done.router_sum is None else loss + done.router_sum
        return loss, done.sums | {"loss": loss.detach().double()}

    @torch.no_grad()
    def evaluate(self, nets: Mapping[str, nn.Module], batch: Batch) -> Sums:
        done = self._forward(nets["model"], batch)
        _, sums = self._summed(done.nll_sum, done)
        return sums | {"bytes": batch["bytes"].sum()}

    def report(self, sums: Sums) -> dict[str, float]:
        targets = sums["targets"].item()
        cross_entropy = sums["nll"].item() / targets
        figures = {"loss": sums["loss"].item() / targets, "cross_entropy": cross_entropy}
        return figures | self._text_metrics(sums) | routing_figures(sums)

    def _text_metrics(self, sums: Sums) -> dict[str, float]:
        """Metrics that only some of the text objectives have."""
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
        """Any will do."""

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
        prompt = [self.tokenizer.eod, *(self.tokenizer.encode([config.prompt])[0].tolist() if config.prompt else [])]
        prompt_BT = torch.tensor(prompt, device=device).repeat(n, 1)
        tokens_BT = generate(self.model, prompt_BT, config.sample_tokens, config.temperature, generator=generator)
        known = [[token for token in tokens[1:].tolist() if token < self.tokenizer.vocab_size] for tokens in tokens_BT]
        return SampleSet(text={f"sample-{index}": self.tokenizer.decode(tokens) for index, tokens in enumerate(known)})


class MaskedLanguageObjective(TextObjective):
    """Restores masked tokens."""

    config: MaskedLanguageConfig

    def _check_tokenizer(self) -> None:
        if self.tokenizer.mask is None:
            name = self.config.data.tokenizer
            raise ValueError(
                f"run.objective.data.tokenizer: {name} has no mask token, which masked_lm needs; use bytes, or one that has"
            )

    def _inputs_and_targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert self.tokenizer.mask is not None, "a tokenizer without a mask is refused"
        tokens_BT = self._aligned(batch["tokens"])
        return mask_tokens(
            tokens_BT, batch["sample"], self.config.mask_rate, self.tokenizer.mask, self.tokenizer.vocab_size, self.seed
        )

    def _aligned(self, tokens_BT: Tensor) -> Tensor:
        return tokens_BT[:, 1:]


def mask_tokens(
    tokens_BT: Tensor, samples_B: Tensor, rate: float, mask: int, vocab_size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """BERT's corruption: each token is chosen with probability `rate`; a chosen one becomes `mask` (80 %), a random token (10 %) or stays (10 %).

    Returns inputs and targets (B, T); targets that were not chosen are IGNORE. Drawn from (seed, sample number) alone.
    """
    keys_B = sample_keys(seed, samples_B, "masked tokens")
    length = tokens_BT.shape[1:]
    chosen_BT = uniform(derive(keys_B, "chosen"), length) < rate
    kind_BT = uniform(derive(keys_B, "kind"), length)
    random_BT = integers(derive(keys_B, "random token"), vocab_size, length)
    inputs_BT = tokens_BT.where(~(chosen_BT & (kind_BT < 0.8)), mask)
    inputs_BT = inputs_BT.where(~(chosen_BT & (kind_BT >= 0.9)), random_BT)
    return inputs_BT, tokens_BT.where(chosen_BT, IGNORE)
