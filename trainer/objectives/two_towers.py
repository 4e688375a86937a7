"""Images and their captions on one sphere: CLIP's symmetric InfoNCE, or SigLIP's pairwise sigmoid.

The steps are those of contrastive.py. Networks and mathematics are in models/contrastive/.
Legend: M samples, N images, K classes, P width of an embedding, S images that are shown.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from data.config import ImageConfig
from data.share import Batch
from models.contrastive.augment import augment
from models.contrastive.losses import Embedded, PairLoss, clamped, sigmoid_pairs, symmetric_info_nce
from models.contrastive.towers import ConvEncoderConfig, TwoTowers
from models.quality.probes import recall_at
from models.random import sample_keys
from models.transformer.model import TransformerConfig
from trainer.core.protocols import GatherRows, SampleSet
from trainer.objectives.contrastive import ContrastiveConfig, ContrastiveObjective
from trainer.objectives.images.captions import CaptionConfig, Captions
from trainer.objectives.images.data import grid_of
from trainer.objectives.images.feature_quality import Parts, ProbeConfig, pair_figures

_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class TwoTowersConfig(ContrastiveConfig):
    """CLIP and SigLIP.

    An image becomes similar to its caption, and unlike the captions of all other images of the
    global batch.
    """

    name: Literal["clip", "siglip"] = "clip"
    """clip: softmax over the captions and over the images (Radford et al. 2021).
    siglip: a sigmoid per pair (Zhai et al. 2023)."""
    data: ImageConfig = field(default_factory=ImageConfig)
    """The images to train on, with labels."""
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    """Captions made from the labels."""
    image: ConvEncoderConfig = field(default_factory=ConvEncoderConfig)
    """The tower of the images."""
    text: TransformerConfig = field(default_factory=lambda: TransformerConfig(layers=2, d_model=64, heads=4, ffn=128))
    """The tower of the captions' bytes; causal and dense."""
    width: int = 64
    """Width of the embeddings."""
    temperature: float = 0.07
    """Initial temperature, which is learned. 0.1 is usual with siglip."""
    least_temperature: float = 0.01
    """Lower bound of the learned temperature; its upper bound is 1."""
    bias: float = -10.0
    """Initial bias of siglip's logits, which is learned."""
    quality: ProbeConfig | None = field(default_factory=ProbeConfig)
    """How retrieval in both directions and the image features are measured. null: they are not."""

    def __post_init__(self) -> None:
        if self.data.classes != len(self.captions.names):
            count = len(self.captions.names)
            raise ValueError(f"captions.names: {count} names for data.classes {self.data.classes}; give each class one")
        if self.text.moe is not None or not self.text.causal:
            raise ValueError("text: a tower is causal and dense; leave out moe, and causal: false")
        if not 0 < self.least_temperature <= self.temperature <= 1:
            raise ValueError(
                f"temperature is {self.temperature} and least_temperature {self.least_temperature}; "
                "set 0 < least_temperature <= temperature <= 1"
            )
        if min(self.chunk, self.width) < 1:
            raise ValueError(f"chunk is {self.chunk} and width {self.width}; both must be at least 1")


class TwoTowersObjective(ContrastiveObjective):
    """The loss is in nats per pair."""

    config: TwoTowersConfig
    model: TwoTowers

    def __init__(self, config: TwoTowersConfig, seed: int):
        self.captions = Captions(config.captions, seed)
        self.least_temperature = config.least_temperature
        super().__init__(config, seed)

    def _network(self) -> TwoTowers:
        config = self.config
        bias = config.bias if config.name == "siglip" else None
        return TwoTowers(
            config.image,
            config.text,
            self.images.shape,
            self.captions.vocab_size,
            config.width,
            config.temperature,
            bias,
        )

    def _embed(self, net: nn.Module, batch: Batch, purpose: str) -> Embedded:
        x = self.images.values(batch)
        label_M = batch["label"]
        if purpose == "views":
            views = augment(self.config.augment, x, sample_keys(self.seed, batch["sample"], purpose))
            embedded: Embedded = net(views, *self.captions.for_training_images(label_M, batch["sample"]))
        else:
            embedded = net(x, *self.captions.for_images(label_M, torch.zeros_like(label_M)))
        return embedded

    def _pair_loss(self, z: Embedded, number_M: Tensor, rows: GatherRows) -> PairLoss:
        scale = clamped(z.log_scale, self.least_temperature)
        pair_loss = symmetric_info_nce if self.config.name == "clip" else sigmoid_pairs
        return pair_loss(z, number_M, scale, self.config.chunk, rows)

    def _pair_figures(self, config: ProbeConfig, held_out: Parts) -> dict[str, float]:
        image_MP, label_M = held_out["a"], held_out["label"]
        classes = torch.arange(len(self.config.captions.names))
        tokens_KT, end_K = self.captions.for_images(classes, torch.zeros_like(classes))
        texts_KP = self.model.read(tokens_KT.to(self.device), end_K.to(self.device)).cpu()
        metrics = {"zero_shot_accuracy": recall_at(image_MP, texts_KP, label_M, classes, 1)}
        for k in config.recall:
            metrics[f"image_recall_at_{k}"] = recall_at(texts_KP, image_MP, classes, label_M, k)
        metrics["temperature"] = self._temperature()
        return metrics | pair_figures(config, image_MP, held_out["b"], label_M, "text")

    def _temperature(self) -> float:
        return 1 / clamped(self.model.temperature()[0].detach(), self.least_temperature).item()

    def sample(self, nets: Mapping[str, nn.Module], n: int, generator: torch.Generator) -> SampleSet:
        """Rows of the held-out images most similar to the caption of a class, best first."""
        from data.images.held_out import image_set

        image_NCHW, _ = image_set(self.images.config, self._evaluation_split, 10_000)
        classes = torch.arange(len(self.config.captions.names), device=self.device)
        texts_KP = self.model.read(*self.captions.for_images(classes, torch.zeros_like(classes)))
        z_NP = nn.functional.normalize(self.model.image_head(self._features(image_NCHW)), dim=1)
        nearest_KS = (texts_KP @ z_NP.T).topk(min(_SHOWN, len(image_NCHW)), dim=1).indices.cpu()
        retrieved = image_NCHW[nearest_KS.flatten()].float() / 127.5 - 1
        return SampleSet(images={"retrieved": grid_of(retrieved, columns=nearest_KS.shape[1])})
