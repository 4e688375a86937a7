"""Distillation: a language model that learns from its text and from a teacher's distribution over the next token.

Legend: B samples, T positions, V vocabulary.
"""

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from data.share import Batch
from models.losses import categorical_kl
from models.transformer.cost import forward_flops_per_token, parameters
from models.transformer.model import Transformer, TransformerConfig
from trainer.core.protocols import Sums
from trainer.objectives.language import teacher as teachers
from trainer.objectives.language.config import DistillConfig
from trainer.objectives.language.objective import IGNORE, LanguageObjective, Pass


class DistillObjective(LanguageObjective):
    """The loss is (1 - alpha) cross-entropy + alpha T^2 KL(teacher || student), and the router's losses; T^2 keeps the share of its gradient (Hinton et al.
    2015, section 2). Held-out data are measured without the teacher, so that runs compare, and a finished run does without its teacher's folder.
    """

    config: DistillConfig

    @cached_property
    def teacher(self) -> Transformer:
        """Read when the first batch is learned from."""
        return teachers.load(self.config.teacher).to(next(self.model.parameters()).device)

    @cached_property
    def _teacher_sizes(self) -> tuple[TransformerConfig, int]:
        """The teacher's model and vocabulary: from its description, without weights."""
        return teachers.describe(self.config.teacher)

    @property
    def frozen_bytes(self) -> int:
        return 4 * parameters(*self._teacher_sizes).total

    @property
    def frozen_flops_per_sample(self) -> float:
        seq_len = self.config.data.seq_len
        return seq_len * forward_flops_per_token(*self._teacher_sizes, seq_len)

    def loss(self, phase: str, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Sums]:
        done = self._forward(net, batch)
        kl_sum, agreed = self._taught(done, batch)
        alpha = self.config.alpha
        loss, sums = self._summed((1 - alpha) * done.nll_sum + alpha * self.config.kl_temperature**2 * kl_sum, done)
        return loss, sums | {"teacher_kl": kl_sum.detach().double(), "teacher_agreed": agreed.double()}

    def _taught(self, done: Pass, batch: Batch) -> tuple[Tensor, Tensor]:
        """KL(teacher || student) at the temperature, in nats, and at how many places both have the same likeliest token, summed over the targets."""
        with torch.no_grad():
            taught_BTV, _ = self.teacher(done.inputs_BT, batch["sample"], self._segments(batch), self.seed)
        dtype = torch.promote_types(done.logits_BTV.dtype, torch.float32)
        log_p_BTV, log_q_BTV = (
            (logits.to(dtype) / self.config.kl_temperature).log_softmax(-1) for logits in (taught_BTV, done.logits_BTV)
        )
        counts_BT = done.targets_BT != IGNORE
        agrees_BT = (taught_BTV.argmax(-1) == done.logits_BTV.argmax(-1)) & counts_BT
        return categorical_kl(log_p_BTV, log_q_BTV).where(counts_BT, 0).sum(), agrees_BT.sum()

    def report(self, sums: Sums) -> dict[str, float]:
        """In training also the KL in nats per token, and the share of tokens whose likeliest one is the teacher's."""
        figures = super().report(sums)
        taught = "teacher_kl" in sums  # evaluation does without the teacher
        if taught:
            targets = sums["targets"].item()
            figures["teacher_kl"] = sums["teacher_kl"].item() / targets
            figures["teacher_agreement"] = sums["teacher_agreed"].item() / targets
        return figures

    def manifest(self) -> Mapping[str, object]:
        """The teacher is read as the data are: a resumed run must find the same one."""
        return {**super().manifest(), "teacher": teachers.identity(self.config.teacher)}
