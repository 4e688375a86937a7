"""Configs of the language objectives: the network, the text, and the weights to start from."""

from dataclasses import dataclass, replace
from typing import Literal, Self

from data.config import TextConfig
from models.moe.layer import MoEConfig
from models.moe.policies import TopKRouting
from models.moe.watch import CollapseConfig
from models.transformer.model import TransformerConfig
from models.transformer.upcycle import UpcycleConfig
from trainer.objectives.config import ExportFormat, ObjectiveConfig, Start, resolved_data
from trainer.objectives.language.start import InitFrom
from trainer.objectives.language.teacher import Student
from trainer.storage import absolute


@dataclass(frozen=True, kw_only=True)
class TextModelConfig(ObjectiveConfig):
    """Base of all language models' configs."""

    model: TransformerConfig
    """The network; `causal` is false for masked_lm alone."""
    data: TextConfig
    """The text, its tokenizer, and the held-out part."""
    init_from: str | None = None
    """Folder of the weights that a new run starts from; a resumed run ignores it. It holds a run of
    Switchwork, or a model that transformers saved (safetensors; Qwen3, Qwen3-MoE, Qwen2-MoE without
    biases, Llama, Mixtral). null: random weights."""
    upcycle: UpcycleConfig | None = None
    """Turns the dense model in `init_from` into a mixture of experts; null: leaves it as it is."""
    vocab_size: int | None = None
    """Rows of the embedding, at least as many as the tokenizer has ids; null: exactly as many."""
    collapse: CollapseConfig = CollapseConfig()
    """The signs of a collapse of the routing, and the reaction to it; a dense model ignores it."""

    def __post_init__(self) -> None:
        _upcycled(self)  # raises ValueError for an impossible model

    @property
    def trained_model(self) -> TransformerConfig:
        """The network to train: `model`, with the mixture of experts that `upcycle` asks for."""
        return _upcycled(self)

    @property
    def moe(self) -> MoEConfig | None:
        return self.trained_model.moe

    @property
    def group(self) -> int:
        return self.moe.group if self.moe else 1

    @property
    def tokens_per_sample(self) -> int:
        return self.data.seq_len

    @property
    def stored_data(self) -> TextConfig:
        return self.data

    @property
    def dataset(self) -> str:
        return self.data.source.name

    @property
    def masks_documents(self) -> bool:
        return self.data.document_mask

    @property
    def builds_on_meta(self) -> bool:
        return True  # a transformer may exceed the memory of one machine

    @property
    def export_format(self) -> ExportFormat | None:
        return "transformers"

    @property
    def start(self) -> Start | None:
        return self._init_from

    @property
    def _init_from(self) -> InitFrom | None:
        if self.init_from is None:
            return None
        return InitFrom(
            folder=self.init_from,
            model=self.trained_model,
            upcycle=self.upcycle,
            tokenizer=self.data.tokenizer,
            vocab_size=self.vocab_size,
        )

    def resolved(self, workers: int, resume: bool) -> Self:
        folder = None if self.init_from is None else absolute(self.init_from)
        config = replace(self, data=resolved_data(self.data, workers), model=self.trained_model, init_from=folder)
        if config._init_from is not None and not resume:
            config._init_from.check()
        return config


@dataclass(frozen=True, kw_only=True)
class CausalConfig(TextModelConfig):
    """Fields shared by all next-token objectives, whose models generate text and teach others."""

    sample_tokens: int = 200
    """Number of tokens of a generated sample."""
    temperature: float = 0.8
    """Sampling temperature of generated samples."""
    prompt: str = ""
    """Text that every generated sample begins with."""

    def __post_init__(self) -> None:
        if not self.model.causal:
            raise ValueError(
                "objective.model.causal: false does not suit an objective that predicts the next token; "
                "use true, or the objective masked_lm"
            )
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(CausalConfig):
    """A decoder-only transformer that predicts the next token; dense if `model.moe` is null."""

    name: Literal["moe_lm"] = "moe_lm"


@dataclass(frozen=True, kw_only=True)
class DistillConfig(CausalConfig):
    """A decoder-only transformer that learns from the text and from another model, the teacher. The
    loss is (1 - alpha) cross-entropy + alpha T^2 KL(teacher || student), with the logits of both
    divided by T (Hinton et al. 2015, section 2). Starting from the teacher's weights follows Fedus
    et al. 2021, section 4.1."""

    name: Literal["distill"] = "distill"
    teacher: str
    """Folder of a causal language model with the same tokenizer: a run of Switchwork, or a model
    that transformers saved, as for `init_from`. Every rank holds the whole teacher, frozen,
    dropless and in fp32."""
    alpha: float = 0.25
    """Weight of the teacher's loss; the loss on the text has the weight 1 - alpha."""
    kl_temperature: float = 1.0
    """Temperature T that divides the logits of teacher and student. It differs from `temperature`,
    which generates samples."""
    init_from_teacher: bool = True
    """Starts a new run with those of the teacher's weights whose name and shape the student shares,
    except experts and routers. A resumed run ignores it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"objective.alpha: {self.alpha} is outside 0 to 1; use a share such as 0.25")
        if not self.kl_temperature > 0:
            raise ValueError(f"objective.kl_temperature: {self.kl_temperature} is not above 0; use 1 or 2, for example")
        if self.init_from is not None and self.init_from_teacher:
            raise ValueError(
                f"objective.init_from: {self.init_from} conflicts with init_from_teacher true; "
                "set init_from_teacher: false, or leave init_from out"
            )

    @property
    def start(self) -> Start | None:
        return self._student if self.init_from_teacher else super().start

    @property
    def _student(self) -> Student:
        return Student(
            teacher=self.teacher,
            model=self.trained_model,
            tokenizer=self.data.tokenizer,
            vocab_size=self.vocab_size,
            starts_alike=self.init_from_teacher,
        )

    def resolved(self, workers: int, resume: bool) -> Self:
        config = super().resolved(workers, resume)
        self._student.check()  # a resumed run reads the teacher as well
        return replace(config, teacher=absolute(self.teacher))


@dataclass(frozen=True, kw_only=True)
class MaskedLanguageConfig(TextModelConfig):
    """A bidirectional transformer that restores masked tokens (Devlin et al. 2019, section 3.1,
    task 1)."""

    name: Literal["masked_lm"] = "masked_lm"
    mask_rate: float = 0.15
    """Share of the tokens to restore. Of these, 80 % become the mask token, 10 % become a random
    token, and 10 % stay."""

    def __post_init__(self) -> None:
        if self.model.causal:
            raise ValueError(
                "objective.model.causal: true does not suit masked_lm, which reads both ways; "
                "use false, or the objective moe_lm"
            )
        if not 0 < self.mask_rate < 1:
            raise ValueError(f"objective.mask_rate: {self.mask_rate} is not between 0 and 1; use 0.15, for example")
        super().__post_init__()


def _upcycled(config: TextModelConfig) -> TransformerConfig:
    model = config.model
    upcycle = config.upcycle
    if upcycle is None:
        return model
    if config.init_from is None:
        raise ValueError(
            f"objective.upcycle.experts: {upcycle.experts} experts need a dense model to start from; "
            "set init_from to the folder of one"
        )
    moe = model.moe or MoEConfig(experts=upcycle.experts, ffn=model.ffn, router=TopKRouting(k=2))
    if (moe.experts, moe.ffn) != (upcycle.experts, model.ffn):
        raise ValueError(
            f"objective.model.moe: experts {moe.experts} and ffn {moe.ffn} differ from "
            f"upcycle.experts {upcycle.experts} and model.ffn {model.ffn}; "
            f"use experts {upcycle.experts} and ffn {model.ffn}, "
            "because every expert starts as a copy of the dense feed-forward network"
        )
    return replace(model, moe=moe)
