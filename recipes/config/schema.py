"""The sections of a run's YAML that are ours: every key, its type, default, range and one line about it.

`grpo` is TRL's (grpo.py) and the rest of `task` is the task's own (`recipes.tasks`). The reference
docs/configuration.md is generated from the descriptions here.
"""

from __future__ import annotations

from os.path import expanduser
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, field_validator

from recipes.rewards.contract import RewardOptions

if TYPE_CHECKING:
    from peft import LoraConfig

Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values are not converted, nothing changes later."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, frozen=True, protected_namespaces=()
    )


class ScratchConfig(Section):
    """A Llama made from nothing. Its vocabulary is the tokenizer's; the defaults give 0.8 M parameters."""

    hidden_size: Positive = Field(128, description="width of the residual stream; a multiple of 2 × `heads`")
    layers: Positive = Field(3, description="transformer layers")
    heads: Positive = Field(4, description="attention heads")
    kv_heads: Positive | None = Field(
        None, description="key/value heads, a divisor of `heads`; null: as many as heads"
    )
    intermediate_size: Positive = Field(512, description="width of the gated MLP")
    max_positions: Positive = Field(1024, description="longest prompt plus completion, in tokens")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary position embedding")
    tie_embeddings: bool = Field(False, description="share the input embedding with the head")
    vocabulary: int = Field(
        2048,
        ge=512,
        description="tokens of the tokenizer that `model.tokenizer: bpe` trains; elsewhere unused",
    )


class ModelConfig(Section):
    """Where the model comes from and in what form."""

    loader: Literal["scratch", "transformers", "unsloth"] = Field(
        description="scratch: new random weights; transformers: any causal LM; unsloth: by FastLanguageModel"
    )
    name: str | None = Field(None, min_length=1, description="hub id or local path; required unless scratch")
    revision: str | None = Field(
        None, description="branch, tag or commit of `name` on the hub; null: its main branch"
    )
    tokenizer: str | None = Field(
        None,
        description="hub id or path; bpe: trained on the task's text (scratch only); null: the model's, or for scratch "
        "one token a character of the task",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="dtype of the weights; auto: float32 where they are trained, where frozen the checkpoint's",
    )
    load_in_4bit: bool = Field(
        False, description="quantise the frozen weights to 4 bits; needs `lora` and a GPU"
    )
    load_in_8bit: bool = Field(
        False, description="quantise the frozen weights to 8 bits; needs `lora` and a GPU"
    )
    attn_implementation: str | None = Field(
        None, description="eager, sdpa, flash_attention_2, …; null: what transformers chooses"
    )
    max_seq_length: Positive | None = Field(
        None,
        description="longest prompt plus completion, in tokens; unsloth allocates for it; null: 2048 there, elsewhere "
        "the plan looks at the prompts",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="recompute activations in the backward: less memory, more time; unsloth: its own kind",
    )
    compile_layers: bool | None = Field(
        None,
        description="torch.compile the layers for warm start, scoring and loss: a fifth to a third less time and, "
        "without checkpointing, less memory, after up to a minute and a half of compiling; on one GPU, by one "
        "process, and not under unsloth; null: for a pretrained model in 200 steps or more, but not in 8 bits, nor in "
        "4 with vLLM in the same process",
    )
    fast_inference: bool = Field(False, description="unsloth only: generate with vLLM, sharing its weights")
    gpu_memory_utilization: float | None = Field(
        None,
        gt=0,
        le=1,
        description="unsloth only: the share of the GPU vLLM may take; null: Unsloth's default",
    )
    vllm_standby: bool = Field(
        False,
        description="unsloth only, with fast_inference: vLLM frees its memory while the model trains",
    )
    vllm_engine: dict[str, Any] | None = Field(
        None,
        description="arguments of vLLM's LLM beside those that TRL gives, where grpo.use_vllm runs it in this process: "
        "{hf_overrides: {head_dtype: float32}} for a head like the trainer's",
    )
    scratch: ScratchConfig | None = Field(None, description="shape of the new model; scratch only")

    @property
    def quantised(self) -> bool:
        """Whether the frozen weights are quantised while they are loaded."""
        return self.load_in_4bit or self.load_in_8bit

    def revision_of(self, name: str | None) -> str | None:
        """`revision` is the model's own: a tokenizer of another name comes from its main branch."""
        return self.revision if name == self.name else None

    @field_validator("name", "tokenizer")
    @classmethod
    def _from_home(cls, name: str | None) -> str | None:
        """As a shell would read it; transformers does not."""
        return name and expanduser(name)


class HeadConfig(Section):
    """What computes the log-probabilities from the hidden states."""

    impl: Literal["memhead", "trl", "full"] = Field(
        "memhead",
        description="memhead: ours, chunked; trl: TRL's own; full: plain full logits, as a baseline",
    )
    chunk: Positive | None = Field(
        None, description="rows of logits held at a time (memhead only); null: chosen from a memory budget"
    )
    backend: Literal["torch", "triton"] | None = Field(
        None, description="memhead's backend; null: triton where it runs, else torch"
    )
    parallel: Literal["vocabulary"] | None = Field(
        None,
        description="with several processes (memhead only): vocabulary: each computes its part of the vocabulary for "
        "the rows of all; null: each its own rows",
    )


class StepConfig(Section):
    """How a batch is cut and run through the model. The loss is TRL's either way, and so are the gradients."""

    impl: Literal["packed", "trl"] = Field(
        "packed",
        description="packed: one row of tokens a group, no padding, no rows without a gradient, no repeated pass; "
        "trl: TRL's own padded micro-batches, as a baseline. Where the packed step fails its start-up check, trl "
        "takes its place, unless packed is written out: then the run ends. Under unsloth, packed has to be written "
        "out: its trainer has a step of its own",
    )
    token_budget: Positive | None = Field(
        None,
        description="tokens of one forward and backward pass, prompts counted once (packed only): lower needs less "
        "memory, down to a micro-batch (grpo.per_device_train_batch_size), which is never divided; null: as many as "
        "keep the device at work, within the memory at hand",
    )
    ahead: bool = Field(
        False,
        description="let a vLLM server (grpo.vllm_mode: server) sample the next rollout while this one trains: every "
        "rollout but the first comes from the weights of one rollout before, which the importance ratio corrects",
    )


class TaskConfig(Section):
    """The task and its options. In the YAML the options stand beside `name`."""

    name: str = Field(description="the task; one of those in recipes/tasks")
    options: SerializeAsAny[RewardOptions] = Field(
        description="the task's own options, checked by its Options class"
    )


class LoraSection(Section):
    """Train low-rank adapters and leave the model frozen; `lora: null` trains every weight."""

    r: Positive = Field(16, description="rank of the adapters")
    alpha: float = Field(32, gt=0, description="scale: the update is multiplied by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapters' input")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="names of the layers to adapt; all-linear: every linear layer but the head",
    )
    modules_to_save: list[str] | None = Field(None, description="modules trained in full beside the adapters")
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(r) instead")

    def peft_config(self) -> LoraConfig:
        """The same as a peft.LoraConfig for a causal language model."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # PEFT annotates int and divides: a float is fine
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            modules_to_save=self.modules_to_save,
            use_rslora=self.use_rslora,
            bias="none",
            task_type="CAUSAL_LM",
        )


class TrackingConfig(Section):
    """What is recorded. The run folder's own files are always written; `report_to` is beside them."""

    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = Field(
        "none",
        description="a tracker beside the run folder's own files; tensorboard writes into runs/<name>/tensorboard",
    )
    logging_every: Positive = Field(1, description="optimizer steps between two lines of metrics.jsonl")
    completions_sample: int = Field(
        4, ge=0, description="completions kept with their rewards at each logged step"
    )
    print_completions: int = Field(
        0, ge=0, description="completions shown in the terminal at each logged step"
    )
    mismatch_every: Positive | None = Field(
        50,
        description="steps between two rollouts whose difference from vLLM is taken apart, the first one always: how "
        "much comes from rounding the head's logits; null: never",
    )
    memory: bool = Field(True, description="measure memory by phase")
    memory_every: Positive | None = Field(
        None,
        description="steps between two metered ones after the first two; null: every step on a GPU, every 10th on CPU",
    )


class WarmStartConfig(Section):
    """Supervised training before GRPO, for a model that knows nothing of the task yet."""

    steps: Positive = Field(150, description="at most so many optimizer steps")
    target_accuracy: float | None = Field(
        0.45,
        gt=0,
        le=1,
        description="stop at this greedy accuracy, to leave GRPO something; null: run every step",
    )
    check_every: Positive | None = Field(
        25,
        description="steps between two looks at the accuracy; null: none, since the run looks at it before GRPO anyway",
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    batch_size: Positive = Field(128, description="examples a step")
    weight_decay: float = Field(0.01, ge=0, description="weight decay of AdamW")
    adam_beta2: float = Field(0.99, ge=0, lt=1, description="decay of AdamW's second moment")
    warmup_steps: int = Field(20, ge=0, description="steps in which the learning rate rises to its peak")
    schedule: Literal["linear", "cosine"] = Field(
        "linear", description="how the learning rate falls from its peak until the last of `steps`"
    )
    final_rate: float = Field(
        0.05, ge=0, le=1, description="the share of the peak below which the learning rate does not fall"
    )


class EvaluationConfig(Section):
    """Accuracy on the task's held-out problems, always before and after the training."""

    every: Positive | None = Field(
        None, description="also every so many optimizer steps; null: before and after only"
    )
    size: Positive = Field(512, description="held-out problems")
    batch_size: Positive = Field(128, description="completions generated at a time")
    samples: int = Field(
        0, ge=0, description="completions sampled a problem for pass@k and maj@k; 0: greedy only"
    )


class RunSection(Section):
    """The run itself: its name, seed, place and what surrounds the training."""

    name: str = Field("", description="name of the run's folder; left out: the configuration file's name")
    seed: int = Field(0, ge=0, lt=2**32, description="seeds weights, data and sampling")
    output_root: str = Field("runs", min_length=1, description="folder that holds the run folders")
    save_every: Positive | None = Field(
        None,
        description="steps between two checkpoints, and one at the end; null: none but where Ctrl-C or SIGTERM stops "
        "the run",
    )
    checks: bool = Field(
        True,
        description="before the first step: the head against full logits, and a step of the longest prompt and "
        "completions without an update, to see that it fits; false skips both",
    )
    max_bad_steps: Positive = Field(
        3,
        description="steps in a row whose loss or gradient is not finite, each skipped, after which the run stops",
    )
    warm_start: WarmStartConfig | None = Field(None, description="supervised training first; null: none")
    evaluation: EvaluationConfig = Field(
        default_factory=lambda: EvaluationConfig(), description="accuracy on held-out problems"
    )

    @field_validator("output_root")
    @classmethod
    def _from_home(cls, place: str) -> str:
        return expanduser(place)


SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "head": HeadConfig,
    "step": StepConfig,
    "task": TaskConfig,
    "lora": LoraSection,
    "tracking": TrackingConfig,
    "run": RunSection,
}
# Of the resolved YAML and of the reference.
ORDER = ("model", "head", "step", "task", "grpo", "lora", "tracking", "run")


def schema_keys() -> list[str]:
    """Every dotted key of the sections that are ours, without the task's options."""
    keys = ["task.name", "grpo", "base"]
    for name, section in SECTIONS.items():
        keys.append(name)
        keys += [] if name == "task" else [f"{name}.{key}" for key in leaves(section)]
    return keys


def leaves(section: type[BaseModel]) -> list[str]:
    """The dotted keys inside a section, those of its sections too."""
    found: list[str] = []
    for name, field in section.model_fields.items():
        found.append(name)
        nested = nested_section(field.annotation)
        found += [f"{name}.{key}" for key in leaves(nested)] if nested else []
    return found


def nested_section(annotation: Any) -> type[BaseModel] | None:
    """The model class in `X` or `X | None`, if there is one."""
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
