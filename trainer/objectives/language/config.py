"""What a job file says of a language model: its network, its text, and what its weights start from."""

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
    """The base of all language models."""

    model: TransformerConfig
    """The network; `causal` is false for masked_lm alone."""
    data: TextConfig
    """The text, how it becomes tokens, and what is held out."""
    init_from: str | None = None
    """Folder whose weights training starts from, unless it resumes: a run of ours, or one that transformers saved (safetensors; Qwen3,
    Qwen3-MoE, Qwen2-MoE without biases, Llama, Mixtral)."""
    upcycle: UpcycleConfig | None = None
    """Make a mixture of experts from the dense model in `init_from`."""
    vocab_size: int | None = None
    """Rows of the embedding, where they are to be more than the tokenizer has ids; null: as many."""
    collapse: CollapseConfig = CollapseConfig()
    """When routing has collapsed, and what is done then; without effect on a dense model."""

    def __post_init__(self) -> None:
        _upcycled(self)  # raises ValueError for a model that cannot be made

    @property
    def trained_model(self) -> TransformerConfig:
        """The network that is trained: `model`, with the mixture of experts that `upcycle` asks for."""
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
        return True  # a transformer may be larger than any memory

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
    """The base of the language models that predict the next token, and so can answer, be exported and teach."""

    sample_tokens: int = 200
    """Length of a generated sample."""
    temperature: float = 0.8
    """Of the generated samples."""
    prompt: str = ""
    """How the samples begin."""

    def __post_init__(self) -> None:
        if not self.model.causal:
            raise ValueError(
                "objective.model.causal: false, but the next token is predicted; use true, or the objective masked_lm"
            )
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(CausalConfig):
    """A decoder-only transformer that predicts the next token; dense where `model.moe` is null."""

    name: Literal["moe_lm"] = "moe_lm"


@dataclass(frozen=True, kw_only=True)
class DistillConfig(CausalConfig):
    """A decoder-only transformer that learns from the text and from another model: (1 - alpha) cross-entropy + alpha T^2 KL(teacher || student), the
    logits of both divided by T (Hinton et al. 2015, section 2; with weights to start from, Fedus et al. 2021, section 4.1)."""

    name: Literal["distill"] = "distill"
    teacher: str
    """Folder of a causal language model that reads by the same tokenizer: a run of ours, or one that transformers saved, as for init_from.
    Each rank holds it whole, frozen, dropless and in fp32."""
    alpha: float = 0.25
    """Share of the teacher's loss; the rest is that of the data."""
    kl_temperature: float = 1.0
    """T; `temperature` is that of the generated samples."""
    init_from_teacher: bool = True
    """Start, unless the run resumes, with the weights that teacher and student have alike in name and shape, outside experts and routers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"objective.alpha: {self.alpha} is no share; use 0 to 1, such as 0.25")
        if not self.kl_temperature > 0:
            raise ValueError(f"objective.kl_temperature: {self.kl_temperature} must be above 0, such as 1 or 2")
        if self.init_from is not None and self.init_from_teacher:
            raise ValueError(
                f"objective.init_from: {self.init_from} beside init_from_teacher true; set init_from_teacher: false, or leave init_from out"
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
        self._student.check()  # the teacher is read by a resumed run as well
        return replace(config, teacher=absolute(self.teacher))


@dataclass(frozen=True, kw_only=True)
class MaskedLanguageConfig(TextModelConfig):
    """A bidirectional transformer that restores masked tokens (Devlin et al. 2019, section 3.1, task 1)."""

    name: Literal["masked_lm"] = "masked_lm"
    mask_rate: float = 0.15
    """Share of the tokens that are to be restored: of them 80 % become the mask, 10 % a random token, 10 % stay."""

    def __post_init__(self) -> None:
        if self.model.causal:
            raise ValueError("objective masked_lm with model.causal true; use false, or the objective moe_lm")
        if not 0 < self.mask_rate < 1:
            raise ValueError(f"mask_rate is {self.mask_rate}; it must be between 0 and 1")
        super().__post_init__()


def _upcycled(config: TextModelConfig) -> TransformerConfig:
    model = config.model
    upcycle = config.upcycle
    if upcycle is None:
        return model
    if config.init_from is None:
        raise ValueError(
            f"upcycle.experts: {upcycle.experts}, but there is no dense model; set init_from to the folder of one"
        )
    moe = model.moe or MoEConfig(experts=upcycle.experts, ffn=model.ffn, router=TopKRouting(k=2))
    if (moe.experts, moe.ffn) != (upcycle.experts, model.ffn):
        here = f"experts {moe.experts} and ffn {moe.ffn} beside upcycle.experts {upcycle.experts} and model.ffn {model.ffn}"
        fix = f"use experts {upcycle.experts} and ffn {model.ffn}, as each expert starts as a copy of the dense feed-forward network"
        raise ValueError(f"model.moe: {here}; {fix}")
    return replace(model, moe=moe)
