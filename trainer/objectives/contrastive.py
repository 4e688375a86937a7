"""Contrastive objectives: pairs that attract, with negatives from the whole global batch; SimCLR.

The loss of a pair depends on all other pairs of the step. So `prepare` embeds all micro-batches
without gradients, computes the loss and its gradient with respect to each embedding once, across
all ranks, and gives each micro-batch its part. `loss` embeds the micro-batch again; its gradient is
that of <cached gradient, embedding> (GradCache, Gao et al. 2021). Summed over micro-batches and
ranks this is exactly the gradient of the loss of the whole batch.

Networks and mathematics are in models/contrastive/.
Legend: M samples, N images, F features, P width of an embedding.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from data.config import ImageConfig
from data.share import Batch, Share
from models.contrastive.augment import AugmentConfig, augment
from models.contrastive.losses import Embedded, PairLoss, clamped, leads_out, nt_xent
from models.contrastive.towers import ConvEncoderConfig, TwoTowers, TwoViews
from models.init import initialise
from models.random import derive, sample_keys
from trainer.core.protocols import Gather, GatherRows, SampleSet, Sums
from trainer.objectives.images.base import ImageObjective
from trainer.objectives.images.data import ImageData, ImageModelConfig, grid_of
from trainer.objectives.images.feature_quality import (
    Parts,
    ProbeConfig,
    class_figures,
    compute_over_split,
    once,
    pair_figures,
)

_NEIGHBOURS_SHOWN = 9


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig(ImageModelConfig):
    """The base of the objectives that compare pairs."""

    data: ImageConfig = field(default_factory=ImageConfig)
    """The images to train on; their labels serve evaluation alone."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes of the training images."""
    chunk: int = 4096
    """Number of candidates whose logits are in memory at a time, per pair of this rank."""
    quality: ProbeConfig | None = field(default_factory=ProbeConfig)
    """How the features are measured. null: they are not."""


class ContrastiveObjective(ImageObjective):
    """Base of the contrastive objectives.

    A subclass defines a pair, and how its loss depends on all other pairs.
    """

    config: ContrastiveConfig
    model: TwoViews | TwoTowers
    least_temperature: float

    def __init__(self, config: ContrastiveConfig, seed: int):
        super().__init__(config.data, config.group, seed)
        assert isinstance(self.data, ImageData)
        self.config = config
        self.images = self.data
        self.model = self._network()
        self.networks: dict[str, nn.Module] = {"model": self.model}
        self.references: dict[str, float] = {}
        """Metrics of the network as it started and of the pixels, computed once."""

    @abstractmethod
    def _network(self) -> TwoViews | TwoTowers:
        """A new network."""

    @abstractmethod
    def _embed(self, net: nn.Module, batch: Batch, purpose: str) -> Embedded:
        """Embed both sides of each pair with `net`.

        `purpose` is "views" in training and "held-out views" otherwise.
        """

    @abstractmethod
    def _pair_loss(self, z: Embedded, number_M: Tensor, rows: GatherRows) -> PairLoss:
        """The loss of each pair among the pairs of all ranks, and its gradients."""

    @abstractmethod
    def _pair_figures(self, config: ProbeConfig, held_out: Parts) -> dict[str, float]:
        """Metrics of the embeddings "a" and "b" of held-out pairs."""

    @torch.no_grad()
    def prepare(self, phase: str, net: nn.Module, batches: Sequence[Batch], rows: GatherRows) -> Sequence[Batch]:
        parts = [self._embed(net, batch, "views") for batch in batches]
        a_MP = torch.cat([part.a_MP for part in parts])
        b_MP = torch.cat([part.b_MP for part in parts])
        embedded = Embedded(a_MP, b_MP, parts[0].log_scale, parts[0].bias)
        cached = self._pair_loss(embedded, torch.cat([batch["sample"] for batch in batches]), rows)
        scale_gradient = rows(cached.log_scale_M.sum(0, keepdim=True)).sum()
        outward = leads_out(embedded.log_scale, scale_gradient, self.least_temperature)
        cached = cached._replace(log_scale_M=cached.log_scale_M * ~outward)
        sizes = [len(batch["sample"]) for batch in batches]
        split = zip(*(tensor.split(sizes) for tensor in cached), strict=True)
        return [batch | _keyed(part) for batch, part in zip(batches, split, strict=True)]

    def loss(self, phase: str, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Sums]:
        z = self._embed(net, batch, "views")
        cached = PairLoss(*(batch[f"cached/{name}"] for name in PairLoss._fields))
        inner = (
            (cached.a_MP * z.a_MP).sum()
            + (cached.b_MP * z.b_MP).sum()
            + cached.log_scale_M.sum() * z.log_scale.sum()
            + cached.bias_M.sum() * z.bias.sum()
        )
        loss_sum = cached.loss_M.sum()
        with torch.no_grad():
            rest = loss_sum - inner
        # The value is the loss; the gradient is that of the inner product.
        return inner + rest, {"loss": loss_sum.double()} | _count(loss_sum, len(cached.loss_M))

    @torch.no_grad()
    def evaluate(self, nets: Mapping[str, nn.Module], batch: Batch) -> Sums:
        """The same loss, with negatives from this batch alone."""
        counts_M = batch["mask"]
        z = self._embed(nets["model"], batch, "held-out views")
        z = z._replace(a_MP=z.a_MP[counts_M], b_MP=z.b_MP[counts_M])
        if not len(z.a_MP):
            return {"loss": z.bias.sum().double()} | _count(z.bias, 0)
        loss = self._pair_loss(z, batch["sample"][counts_M], lambda tensor: tensor).loss_M.sum()
        return {"loss": loss.double()} | _count(loss, len(z.a_MP))

    def report(self, sums: Sums) -> dict[str, float]:
        return {"loss": sums["loss"].item() / sums["samples"].item()}

    def quality(self, nets: Mapping[str, nn.Module], share: Share, gather: Gather) -> dict[str, float]:
        if self.config.quality is None:
            return {}
        config = self.config.quality
        compares = not self.references and bool(self.images.classes)
        start = self._network()
        initialise(start, self.seed)
        start.to(self.device).eval()

        def features(x: Tensor, number_M: Tensor, label_M: Tensor) -> Parts:
            parts: Parts = {"features": self.model.features(x.to(self.device))}
            if compares:
                parts |= {"random": start.features(x.to(self.device)), "pixels": x.flatten(1)}
            return parts

        def features_and_pairs(x: Tensor, number_M: Tensor, label_M: Tensor) -> Parts:
            images = {"image": (x + 1) * 127.5, "label": label_M, "sample": number_M}
            batch = {name: value.to(self.device) for name, value in images.items()}
            z = self._embed(nets["model"], batch, "held-out views")
            return features(x, number_M, label_M) | {"a": z.a_MP, "b": z.b_MP}

        train = compute_over_split(self.images, "train", config.samples, features, share, gather)
        split = self._evaluation_split
        held_out = compute_over_split(self.images, split, config.samples, features_and_pairs, share, gather)

        def metrics() -> dict[str, float]:
            pairs = self._pair_figures(config, held_out)
            if not self.images.classes:
                return pairs
            names = [name for name in ("features", "random", "pixels") if name in train]
            return class_figures(config, names, train, held_out) | pairs

        measured = once(metrics, share, gather)
        self.references |= {name: value for name, value in measured.items() if "/" in name}
        return measured | self.references

    @property
    def _evaluation_split(self) -> Literal["train", "held_out"]:
        """The held-out images; the training images where none are held out."""
        return "held_out" if self.images.config.eval_source or self.images.config.held_out else "train"

    def _features(self, image_NCHW: Tensor) -> Tensor:
        """Features (N, F) of uint8 images."""
        parts = []
        for part in image_NCHW.split(256):
            parts.append(self.model.features((part.float() / 127.5 - 1).to(self.device)))
        return torch.cat(parts)


@dataclass(frozen=True, kw_only=True)
class SimCLRConfig(ContrastiveConfig):
    """SimCLR (Chen et al. 2020).

    Two random views of an image become similar, and unlike the views of all other images of the
    global batch.
    """

    name: Literal["simclr"] = "simclr"
    """Selects this objective."""
    encoder: ConvEncoderConfig = field(default_factory=ConvEncoderConfig)
    """The encoder, whose features are kept after training."""
    projection: tuple[int, ...] = (128, 64)
    """Widths of the layers of the projection head; the last one is the width of the embeddings."""
    temperature: float = 0.5
    """Temperature of the softmax over the candidates."""

    def __post_init__(self) -> None:
        if not 0.01 <= self.temperature <= 1:
            raise ValueError(
                f"temperature is {self.temperature}; it must be between 0.01 and 1, "
                "such as 0.5, or 0.1 with large batches"
            )
        if self.chunk < 1 or not self.projection:
            raise ValueError(
                f"chunk is {self.chunk} and projection {list(self.projection)}; "
                "chunk must be at least 1, and projection must have at least one layer"
            )


class SimCLRObjective(ContrastiveObjective):
    """The loss is NT-Xent in nats, the mean over the two views of a sample."""

    config: SimCLRConfig
    model: TwoViews
    least_temperature = 0.01

    def _network(self) -> TwoViews:
        return TwoViews(self.config.encoder, self.images.shape, self.config.projection, self.config.temperature)

    def _embed(self, net: nn.Module, batch: Batch, purpose: str) -> Embedded:
        x = self.images.values(batch)
        keys_M = sample_keys(self.seed, batch["sample"], purpose)
        views = [augment(self.config.augment, x, derive(keys_M, "view", number)) for number in range(2)]
        embedded: Embedded = net(*views)
        return embedded

    def _pair_loss(self, z: Embedded, number_M: Tensor, rows: GatherRows) -> PairLoss:
        return nt_xent(z, number_M, clamped(z.log_scale, self.least_temperature), self.config.chunk, rows)

    def _pair_figures(self, config: ProbeConfig, held_out: Parts) -> dict[str, float]:
        return pair_figures(config, held_out["a"], held_out["b"], held_out["number"], "view")

    def sample(self, nets: Mapping[str, nn.Module], n: int, generator: torch.Generator) -> SampleSet:
        """Rows of a held-out image, followed by the training images with the nearest features."""
        from data.images.held_out import image_set

        queries, _ = image_set(self.images.config, self._evaluation_split, min(n, 16))
        candidates, _ = image_set(self.images.config, "train", 10_000)
        query_MF = nn.functional.normalize(self._features(queries), dim=1)
        candidate_NF = nn.functional.normalize(self._features(candidates), dim=1)
        nearest = (query_MF @ candidate_NF.T).topk(min(_NEIGHBOURS_SHOWN, len(candidates)), dim=1).indices
        rows = torch.cat([queries[:, None], candidates[nearest.cpu()]], dim=1).flatten(0, 1).float() / 127.5 - 1
        return SampleSet(images={"neighbours": grid_of(rows, columns=1 + nearest.shape[1])})


def _keyed(part: tuple[Tensor, ...]) -> Batch:
    """The fields of a PairLoss as parts of a batch."""
    return {f"cached/{name}": value for name, value in zip(PairLoss._fields, part, strict=True)}


def _count(like: Tensor, samples: int) -> Sums:
    return {"samples": torch.tensor(samples, dtype=torch.float64, device=like.device)}
