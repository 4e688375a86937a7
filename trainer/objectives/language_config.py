"""What a job file says of a language model: its network, its text, and what its weights start from."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from data.text import TextConfig
from models.moe import MoEConfig
from models.routing import TopKRouting
from models.transformer import TransformerConfig
from models.upcycle import UpcycleConfig
from trainer.objectives.routing_watch import CollapseConfig

if TYPE_CHECKING:
    from data.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class _TextModel:
    """What all language models have, and what the rest of the trainer asks of their config."""

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

    @property
    def moe(self) -> MoEConfig | None:
        return self.model.moe

    @property
    def group(self) -> int:
        return self.model.moe.group if self.model.moe else 1

    @property
    def tokens_per_sample(self) -> int:
        return self.data.seq_len

    @property
    def lanes(self) -> int | None:
        return self.data.lanes

    @property
    def dataset(self) -> str:
        return self.data.source.name


@dataclass(frozen=True, kw_only=True)
class _CausalModel(_TextModel):
    """What all that predict the next token have beside."""

    sample_tokens: int = 200
    """Length of a generated sample."""
    temperature: float = 0.8
    """Of the generated samples."""
    prompt: str = ""
    """How the samples begin."""

    def __post_init__(self) -> None:
        if not self.model.causal:
            raise ValueError("objective.model.causal: false, but the next token is predicted; use true, or the objective masked_lm")
        object.__setattr__(self, "model", started(self))


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(_CausalModel):
    """A decoder-only transformer that predicts the next token; dense where `model.moe` is null."""

    name: Literal["moe_lm"] = "moe_lm"


@dataclass(frozen=True, kw_only=True)
class DistillConfig(_CausalModel):
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
            raise ValueError(f"objective.init_from: {self.init_from} beside init_from_teacher true; set init_from_teacher: false, or leave init_from out")


@dataclass(frozen=True, kw_only=True)
class MaskedLanguageConfig(_TextModel):
    """A bidirectional transformer that restores masked tokens (Devlin et al. 2019, section 3.1, task 1)."""

    name: Literal["masked_lm"] = "masked_lm"
    mask_rate: float = 0.15
    """Share of the tokens that are to be restored: of them 80 % become the mask, 10 % a random token, 10 % stay."""

    def __post_init__(self) -> None:
        if self.model.causal:
            raise ValueError("objective masked_lm with model.causal true; use false, or the objective moe_lm")
        if not 0 < self.mask_rate < 1:
            raise ValueError(f"mask_rate is {self.mask_rate}; it must be between 0 and 1")
        object.__setattr__(self, "model", started(self))


Causal = LanguageConfig | DistillConfig
"""What predicts the next token, and so can answer, be exported and teach."""

AnyLanguage = Causal | MaskedLanguageConfig


def started(config: _TextModel) -> TransformerConfig:
    """The model that `config` trains: its own, with the mixture of experts that `upcycle` asks for."""
    model, upcycle = config.model, config.upcycle
    if upcycle is None:
        return model
    if config.init_from is None:
        raise ValueError(f"upcycle.experts: {upcycle.experts}, but there is no dense model; set init_from to the folder of one")
    moe = model.moe or MoEConfig(experts=upcycle.experts, ffn=model.ffn, router=TopKRouting(k=2))
    if (moe.experts, moe.ffn) != (upcycle.experts, model.ffn):
        fix = f"use experts {upcycle.experts} and ffn {model.ffn}, as each expert starts as a copy of the dense feed-forward network"
        raise ValueError(f"model.moe: experts {moe.experts} and ffn {moe.ffn} beside upcycle.experts {upcycle.experts} and model.ffn {model.ffn}; {fix}")
    return replace(model, moe=moe)


def vocabulary(config: _TextModel, tokenizer: "Tokenizer") -> int:
    """Rows of the embedding. ValueError if they are fewer than the tokenizer's ids."""
    if config.vocab_size is not None and config.vocab_size < tokenizer.vocab_size:
        fix = f"use {tokenizer.vocab_size} or more, or null"
        raise ValueError(f"run.objective.vocab_size: {config.vocab_size} is less than the {tokenizer.vocab_size} ids of the tokenizer; {fix}")
    return config.vocab_size or tokenizer.vocab_size
