"""The part of a run's configuration that decides its memory, as one object of numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from recipes.config.load import RunConfig
from recipes.plan.formulas import DTYPE_BYTES, Batch, Group, Precision
from recipes.plan.shapes import ModelShape, Trained, model_config, sizes
from recipes.processes import spread

PROMPT = 256  # tokens, where the config gives no total length to take it from


@dataclass(frozen=True)
class Setting:
    """The sizes of a run that decide its memory."""

    shape: ModelShape
    trained: Trained
    precision: Precision
    lora_rank: int  # 0: every weight is trained
    optim: str
    sequences: int  # of one forward pass
    sampled: int  # sequences generated at a time
    prompt: int
    completion: int
    generations: int  # completions of a prompt
    checkpointing: bool
    offloaded: bool  # layer inputs in host memory
    reference: bool  # a second copy of the weights: beta above 0 without an adapter to switch off
    head: str
    chunk_rows: int | tuple[int, int] | None
    device_type: str
    kept_cache: bool = False  # the static cache of sampling, which stays between rollouts
    # One that grows, under autocast: rotated keys of float32 weights stay float32, and it keeps values in their dtype.
    wide_cache: bool = False
    asleep: bool = False  # Unsloth's vLLM, while the model trains
    compiled: bool = False  # the layers, by torch.compile
    bin_tokens: int | None = None  # of the packed step's bins; None: padded batches

    @property
    def length(self) -> int:
        """Prompt and completion, in tokens."""
        return self.prompt + self.completion

    @property
    def slots(self) -> int:
        """Of one padded micro-batch."""
        return self.sequences * self.length

    @property
    def packed(self) -> int:
        """Tokens of the same, prompts counted once a group."""
        groups, rest = divmod(self.sequences, self.generations)
        return groups * self.group.tokens + (self.prompt + rest * (self.completion - 1) if rest else 0)

    @property
    def rollout(self) -> int:
        """Tokens of what is sampled at a time, prompts counted once a group: no bin has more."""
        return max(1, self.sampled // self.generations) * self.group.tokens

    @property
    def batch(self) -> Batch:
        """One forward pass with a gradient."""
        if self.bin_tokens is None:
            return Batch.padded(self.sequences, self.prompt, self.completion)
        return (self.group.varlen if self.varlen else self.group.dense)(self.bin_tokens)

    @property
    def group(self) -> Group:
        """A prompt and its completions, as long as they may be."""
        return Group(self.prompt, self.completion, self.generations)

    @property
    def varlen(self) -> bool:
        """Whether the packed step lays its groups in one row."""
        return self.device_type == "cuda"

    @property
    def complete(self) -> bool:
        """Whether formulas cover all of it; if not, what they give is a lower bound."""
        return self.shape.layer is not None and self.shape.cache is not None

    @classmethod
    def of(cls, config: RunConfig, *, device: bool) -> Setting:
        """Of a run, on a GPU where `device` says so or the model asks for one, unless grpo.use_cpu keeps off it.

        Raises ConfigError if the model's sizes are not at hand, or its adapters do not fit it.
        """
        model, grpo, lora = config.model, config.grpo, config.lora
        shape, trained = sizes(model_config(config), None if lora is None else lora.peft_config())
        if model.attn_implementation == "eager":  # keeps its scores, which no formula counts
            shape = replace(shape, layer=None)
        cuda = (device or model.loader != "scratch") and not grpo["use_cpu"]
        completion = config.completion_length
        if model.max_seq_length is not None:
            prompt = model.max_seq_length - completion
        elif config.longest_prompt is not None:
            prompt = config.longest_prompt
        else:
            prompt = max(1, min(PROMPT, shape.positions - completion))
        batch, generations = grpo["per_device_train_batch_size"], grpo["num_generations"]
        steps = grpo["steps_per_generation"] or grpo["gradient_accumulation_steps"]
        if model.loader == "unsloth":
            batch = max(batch, generations)
        precision = _precision(config, shape, cuda)
        generates = not grpo["use_vllm"] and model.loader != "unsloth"
        static = grpo["cache_implementation"] == "static"
        narrow = (
            not precision.autocast or precision.weights < 4 or spread() == "DeepSpeed"
        )  # whose are bfloat16
        return cls(
            shape=shape,
            trained=trained,
            precision=precision,
            lora_rank=0 if lora is None else lora.r,
            optim=str(grpo["optim"]),
            sequences=batch,
            sampled=(grpo["generation_batch_size"] or 0) // config.processes or batch * steps,
            prompt=prompt,
            completion=completion,
            generations=generations,
            checkpointing=model.gradient_checkpointing,
            offloaded=model.loader == "unsloth" and model.gradient_checkpointing and cuda,
            reference=bool(grpo["beta"]) and lora is None,
            head=config.head.impl,
            chunk_rows=config.head.chunk,
            device_type="cuda" if cuda else "cpu",
            asleep=bool(model.fast_inference and model.vllm_standby),
            compiled=config.compiles_layers(cuda=cuda),
            kept_cache=generates and static,
            wide_cache=generates and not static and not narrow,
        )


def notes(config: RunConfig, setting: Setting) -> list[str]:
    """What the plan assumes, and what it leaves out, a sentence each."""
    model, grpo, shape = config.model, config.grpo, setting.shape
    found = []
    if shape.layer is None:
        eager = " with eager attention" if model.attn_implementation == "eager" else ""
        found.append(
            f"NOT counted: what the layers of {shape.kind}{eager} keep for the backward pass, beside their inputs: no "
            "formula covers them"
        )
    if shape.cache is None:
        found.append(f"NOT counted: the KV cache of {shape.kind}, which does not run on the meta device")
    if setting.lora_rank and shape.layer is not None and setting.trained.adapted != shape.linear:
        found.append("activations are counted as if every linear of the layers were adapted, no other weight")
    if model.max_seq_length is None:
        found.append(
            f"prompts of {setting.prompt} tokens are assumed; model.max_seq_length would say it"
            if config.longest_prompt is None
            else f"the longest of this task's prompts has {setting.prompt} tokens"
        )
    if model.loader == "unsloth":
        found.append(
            "Unsloth raises the batch to one group and keeps checkpointed layer inputs in host memory; that it scores "
            "a few sequences at a time where memory is short is not counted"
        )
    if model.fast_inference or grpo["use_vllm"]:
        share = _vllm_reserves(config)
        sleeps = _vllm_sleeps(config)
        meanwhile = "it frees the cache" if sleeps else "it keeps both: training must fit beside them"
        found.append(
            f"vLLM takes up to {share:.0%} of the device for weights and KV cache, under Unsloth the weights that are "
            f"trained on; while the model trains {meanwhile}. Counted here is the cache that one batch needs"
        )
    if config.head.impl == "trl":
        found.append("head.impl: trl is counted as memhead; both hold one chunk of logits")
    return found


def vllm_share(config: RunConfig) -> float:
    """What vLLM holds of the device while the model trains, 0 to 1: nothing if it sleeps or is a server elsewhere."""
    return _vllm_reserves(config) if config.own_vllm and not _vllm_sleeps(config) else 0.0


def _vllm_reserves(config: RunConfig) -> float:
    return config.model.gpu_memory_utilization or config.grpo["vllm_gpu_memory_utilization"] or 0.3


def _vllm_sleeps(config: RunConfig) -> bool:
    return bool(config.model.vllm_standby or config.grpo["vllm_enable_sleep_mode"])


def _precision(config: RunConfig, shape: ModelShape, cuda: bool) -> Precision:
    model = config.model
    trained = "float32" if config.lora is None and model.loader != "unsloth" else shape.dtype
    dtype = trained if model.dtype == "auto" else model.dtype
    weights = DTYPE_BYTES.get(dtype, 4)
    four = "4bit-double" if model.loader == "unsloth" else "4bit"
    asked = four if model.load_in_4bit else "8bit" if model.load_in_8bit else ""
    quantised = shape.quantised or asked
    return Precision(
        weights=2 if quantised else weights,
        e=2 if cuda else weights,
        # TRL makes the adapters of quantised weights bfloat16
        adapter=2 if quantised and model.loader == "transformers" else 4,
        quantised=quantised,
        autocast=cuda,
    )
