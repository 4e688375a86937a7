"""Distillation: a language model learns from its text and from a teacher's next-token distribution.

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
from trainer.objectives.language.config import DistillConfig
from trainer.objectives.language.objective import IGNORE, ForwardPass, LanguageObjective
from trainer.objectives.language.teacher import describe_teacher, load_teacher, teacher_identity


class DistillObjective(LanguageObjective):
    """Predicts the next token and follows a teacher.

    The loss is (1 - alpha) cross-entropy + alpha T^2 KL(teacher || student), plus the router's
    losses. The factor T^2 keeps the KL's share of the gradient (Hinton et al. 2015, section 2).
    Held-out data are measured without the teacher, so that runs can be compared and a finished run
    does not need its teacher's folder.
    """

    config: DistillConfig

    @cached_property
    def teacher(self) -> Transformer:
        """The teacher's network, loaded at the first training batch."""
        return load_teacher(self.config.teacher).to(next(self.model.parameters()).device)

    @cached_property
    def _teacher_sizes(self) -> tuple[TransformerConfig, int]:
        """The teacher's config and vocabulary size."""
        return describe_teacher(self.config.teacher)

    @property
    def frozen_bytes(self) -> int:
        return 4 * parameters(*self._teacher_sizes).total

    @property
    def frozen_flops_per_sample(self) -> float:
        seq_len = self.config.data.seq_len
        return seq_len * forward_flops_per_token(*self._teacher_sizes, seq_len)

    def loss(self, phase: str, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Sums]:
        forward = self._forward(net, batch)
        kl_sum, agreed = self._compare_with_teacher(forward, batch)
        alpha = self.config.alpha
        target_loss = (1 - alpha) * forward.nll_sum + alpha * self.config.kl_temperature**2 * kl_sum
        loss, sums = self._with_router_losses(target_loss, forward)
        return loss, sums | {"teacher_kl": kl_sum.detach().double(), "teacher_agreed": agreed.double()}

    def _compare_with_teacher(self, forward: ForwardPass, batch: Batch) -> tuple[Tensor, Tensor]:
        """KL(teacher || student) at temperature T, in nats, and the number of agreements.

        Both are sums over the targets. The models agree where the same token is likeliest for both.
        """
        with torch.no_grad():
            teacher_BTV, _ = self.teacher(forward.inputs_BT, batch["sample"], self._segments(batch), self.seed)
        student_BTV = forward.logits_BTV
        dtype = torch.promote_types(student_BTV.dtype, torch.float32)
        log_p_BTV = (teacher_BTV.to(dtype) / self.config.kl_temperature).log_softmax(-1)
        log_q_BTV = (student_BTV.to(dtype) / self.config.kl_temperature).log_softmax(-1)
        counts_BT = forward.targets_BT != IGNORE
        agrees_BT = (teacher_BTV.argmax(-1) == student_BTV.argmax(-1)) & counts_BT
        return categorical_kl(log_p_BTV, log_q_BTV).where(counts_BT, 0).sum(), agrees_BT.sum()

    def report(self, sums: Sums) -> dict[str, float]:
        """The language model's metrics; in training also the KL and the agreement with the teacher.

        The KL is in nats per token. The agreement is the share of targets whose likeliest token is
        the teacher's.
        """
        metrics = super().report(sums)
        with_teacher = "teacher_kl" in sums  # evaluation does without the teacher
        if with_teacher:
            targets = sums["targets"].item()
            metrics["teacher_kl"] = sums["teacher_kl"].item() / targets
            metrics["teacher_agreement"] = sums["teacher_agreed"].item() / targets
        return metrics

    def manifest(self) -> Mapping[str, object]:
        """The data and the teacher's identity: a resumed run must find the same ones."""
        return {**super().manifest(), "teacher": teacher_identity(self.config.teacher)}
