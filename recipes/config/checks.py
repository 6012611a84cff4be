"""Problems that show only when several keys of a configuration are looked at together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from recipes.config.schema import LoraSection, ModelConfig, RunSection, ScratchConfig
from recipes.config.unsloth import MAX_SEQ_LENGTH
from recipes.problems import Problem, one_of

_NOT_OF_THE_ENGINE = {
    "enable_lora",
    "logprobs_mode",
    "model",
    "quantization",
    "revision",
    "trust_remote_code",
}


def check_across(sections: Mapping[str, Any]) -> Iterator[Problem]:
    """Every such problem. Each section is parsed and valid by itself; `grpo` is complete."""
    model, lora, run, grpo = (sections[name] for name in ("model", "lora", "run", "grpo"))
    if model.loader == "scratch":
        yield from _check_scratch(model, lora, run, grpo)
    elif model.name is None:
        yield Problem("model.name", "is missing", remedy="set it to a hub id or a local path")
    elif model.scratch is not None:
        remedy = "remove it, or set model.loader: scratch"
        yield Problem("model.scratch", f"means nothing to the loader {model.loader}", remedy=remedy)
    if model.loader == "unsloth":
        yield from _check_unsloth(model, lora, run, grpo)
    else:
        yield from _unsloths(model)
    if model.tokenizer == "bpe" and model.loader != "scratch":
        remedy = "remove it: a checkpoint has its own, or set model.loader: scratch"
        yield Problem("model.tokenizer", "is trained for a new model alone", "bpe", remedy)
    head = sections["head"]
    if head.parallel is not None and (head.impl != "memhead" or model.loader == "unsloth"):
        message = "is memhead's, in TRL's trainer"
        remedy = "remove it, or set head.impl: memhead and another model.loader than unsloth"
        yield Problem("head.parallel", message, head.parallel, remedy)
    yield from _check_quantised(model, lora)
    if lora is not None and grpo["sync_ref_model"]:
        message = "the reference of adapters is the model without them, which stays as it is"
        yield Problem("grpo.sync_ref_model", message, True, "set it to false, or set lora: null")
    if lora is not None and isinstance(lora.target_modules, list) and "lm_head" in lora.target_modules:
        remedy = "remove 'lm_head' from it: TRL does not train an adapter there"
        yield Problem("lora.target_modules", "adapts the head", lora.target_modules, remedy)
    if run.name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", run.name):
        remedy = "use at most 200 letters, digits, '.', '_' and '-'"
        yield Problem("run.name", "is no folder name", run.name, remedy)
    if grpo["warmup_steps"] and grpo["lr_scheduler_type"] == "constant":
        remedy = "set grpo.lr_scheduler_type: constant_with_warmup"
        yield Problem("grpo.warmup_steps", "the schedule constant has none", grpo["warmup_steps"], remedy)
    start = run.warm_start
    if start is not None and start.check_every is None and start.target_accuracy is not None:
        target, remedy = start.target_accuracy, "set it to null, or run.warm_start.check_every"
        yield Problem("run.warm_start.target_accuracy", "is never looked for", target, remedy)
    yield from _check_engine(model, lora, grpo)
    if sections["step"].ahead:
        yield from _check_ahead(model, grpo)
    if sections["head"].impl == "memhead" and model.loader != "unsloth":
        yield from _check_truncation(grpo)
    step = sections["step"]
    if model.loader == "unsloth" and step.impl == "packed" and "impl" in step.model_fields_set:
        yield from _check_packed_by_unsloth(model, lora, grpo)
    yield from _check_steps(grpo)
    yield from _check_lengths(model, grpo)
    yield from _check_task_fits(sections)


def _check_scratch(
    model: ModelConfig, lora: LoraSection | None, run: RunSection, grpo: Mapping[str, Any]
) -> Iterator[Problem]:
    shape = model.scratch or ScratchConfig()
    if lora is None and run.warm_start is None and grpo["beta"]:
        # TRL loads the reference model from where the model came from.
        remedy = "add run.warm_start, or set it to 0"
        yield Problem(
            "grpo.beta", "a new model cannot be loaded again as its reference", grpo["beta"], remedy
        )
    if lora is not None and run.warm_start is None:  # which saves the model that the adapters belong to
        remedy = "add run.warm_start, or set lora: null"
        yield Problem("lora", "a new model's adapters would be all that is kept of it", remedy=remedy)
    for key in ("name", "revision"):
        if (value := getattr(model, key)) is not None:
            remedy = "remove it, or set model.loader: transformers"
            yield Problem(f"model.{key}", "means nothing to the loader scratch", value, remedy)
    if shape.hidden_size % (2 * shape.heads):
        unit = 2 * shape.heads
        below = shape.hidden_size // unit * unit
        near = one_of(size for size in (below, below + unit) if size)
        message = f"not a multiple of 2 × heads {shape.heads}"  # rotary positions turn pairs within a head
        yield Problem("model.scratch.hidden_size", message, shape.hidden_size, f"set it to {near}")
    if shape.kv_heads is not None and shape.heads % shape.kv_heads:
        message = f"does not divide heads {shape.heads}"
        yield Problem("model.scratch.kv_heads", message, shape.kv_heads, "set it to a divisor, or null")
    for key in ("load_in_4bit", "load_in_8bit"):
        if getattr(model, key):
            remedy = "remove it: a new model is trained in full"
            yield Problem(f"model.{key}", "means nothing to the loader scratch", True, remedy)


def _check_quantised(model: ModelConfig, lora: LoraSection | None) -> Iterator[Problem]:
    if model.load_in_4bit and model.load_in_8bit:
        yield Problem("model.load_in_8bit", "set together with load_in_4bit", True, "keep one of the two")
    for key in ("load_in_4bit", "load_in_8bit"):
        if getattr(model, key) and lora is None:
            yield Problem(f"model.{key}", "quantised weights cannot be trained", True, "add a lora section")


def _unsloths(model: ModelConfig) -> Iterator[Problem]:
    """Keys that only the loader unsloth knows."""
    remedy = "remove it, or set model.loader: unsloth"
    for key in ("fast_inference", "gpu_memory_utilization", "vllm_standby"):
        if getattr(model, key):
            yield Problem(f"model.{key}", "is Unsloth's", getattr(model, key), remedy)


def _check_unsloth(
    model: ModelConfig, lora: LoraSection | None, run: RunSection, grpo: Mapping[str, Any]
) -> Iterator[Problem]:
    """What Unsloth ignores silently, or refuses only after the weights are loaded."""
    if model.attn_implementation is not None:
        chosen = model.attn_implementation
        yield Problem("model.attn_implementation", "is Unsloth's to choose", chosen, "remove it")
    if model.compile_layers:
        yield Problem("model.compile_layers", "Unsloth compiles its own", True, "remove it")
    if lora is not None and run.warm_start is not None and grpo["beta"]:
        remedy = "set grpo.beta: 0.0, or model.loader: transformers"
        yield Problem("run.warm_start", "Unsloth's KL is to the model before it", remedy=remedy)
    if model.fast_inference:
        yield from _check_shared_weights(model, lora)
        return
    for key in ("gpu_memory_utilization", "vllm_standby"):
        if getattr(model, key):
            remedy = "set model.fast_inference: true, or remove it"
            yield Problem(f"model.{key}", "is vLLM's", getattr(model, key), remedy)
    if grpo["use_vllm"]:
        yield Problem("grpo.use_vllm", "is model.fast_inference here", True, "set that in its place")


def _check_packed_by_unsloth(
    model: ModelConfig, lora: LoraSection | None, grpo: Mapping[str, Any]
) -> Iterator[Problem]:
    """What rules the packed step out on a model that Unsloth loads, as far as the keys show it."""
    remedy = "remove it: Unsloth's trainer has a step of its own"
    layers = "in layers of transformers, which know no packed rows of its kind"
    if lora is None:
        yield Problem("step.impl", f"Unsloth trains every weight {layers}", "packed", remedy)
    if model.load_in_8bit:
        yield Problem("step.impl", f"Unsloth keeps 8-bit weights {layers}", "packed", remedy)
    truncates = grpo["top_k"] or grpo["top_p"] < 1.0 or grpo["min_p"]
    message = "vLLM's log-probabilities are over what top_k, top_p and min_p leave, the trainer's over all"
    for key, off in (("vllm_importance_sampling_correction", "false"), ("off_policy_mask_threshold", "null")):
        if truncates and model.fast_inference and not (grpo[key] is None or grpo[key] is False):
            remedy = f"set it to {off}, or remove step.impl: packed"
            yield Problem(f"grpo.{key}", message, grpo[key], remedy)


def _check_shared_weights(model: ModelConfig, lora: LoraSection | None) -> Iterator[Problem]:
    """What Unsloth's vLLM, which trains and generates with one copy of the weights, cannot do."""
    if lora is None:
        remedy = "add a lora section, or set model.fast_inference: false"
        yield Problem("lora", "vLLM shares frozen weights alone", None, remedy)
    remedy = "remove it, or set model.fast_inference: false"
    if lora is not None and lora.modules_to_save is not None:
        yield Problem("lora.modules_to_save", "vLLM takes adapters alone", lora.modules_to_save, remedy)
    if model.load_in_8bit:
        yield Problem("model.load_in_8bit", "vLLM has no such weights", True, remedy)
    if model.revision:
        yield Problem("model.revision", "vLLM loads the main branch", model.revision, remedy)


def _check_engine(model: ModelConfig, lora: LoraSection | None, grpo: Mapping[str, Any]) -> Iterator[Problem]:
    """vLLM in this process, beside TRL's trainer: its options, and what it takes of an adapter."""
    here = grpo["use_vllm"] and grpo["vllm_mode"] == "colocate" and model.loader != "unsloth"
    if model.vllm_engine is not None and not here:
        remedy = "remove it, or set grpo.use_vllm: true and grpo.vllm_mode: colocate"
        yield Problem("model.vllm_engine", "is for vLLM beside TRL's trainer", model.vllm_engine, remedy)
    given = model.vllm_engine or {}
    for name in sorted(set(given) & _NOT_OF_THE_ENGINE):
        yield Problem(f"model.vllm_engine.{name}", "is not set here", given[name], "remove it")
    if here and lora is not None and lora.modules_to_save is not None:
        remedy = "remove it, or set grpo.use_vllm: false"
        yield Problem("lora.modules_to_save", "vLLM takes adapters alone", lora.modules_to_save, remedy)


def _check_truncation(grpo: Mapping[str, Any]) -> Iterator[Problem]:
    """Ratios over the sampler's support: what they are not combined with."""
    if not (grpo["top_k"] or grpo["top_p"] < 1.0 or grpo["min_p"]):
        return
    if grpo["beta"]:
        remedy = "set it to 0, take out grpo.top_k, top_p and min_p, or set head.impl: full"
        yield Problem(
            "grpo.beta", "the reference is not scored over a truncated support", grpo["beta"], remedy
        )
    if grpo["use_vllm"] and grpo["min_p"] and (grpo["top_p"] < 1.0 or grpo["top_k"]):
        remedy = "keep one of the two"
        yield Problem(
            "grpo.min_p", "vLLM applies it before top_p and top_k, transformers after", grpo["min_p"], remedy
        )


def _check_ahead(model: ModelConfig, grpo: Mapping[str, Any]) -> Iterator[Problem]:
    """Where the next rollout cannot be sampled while this one trains, or nothing would correct that."""
    if model.loader == "unsloth":
        yield Problem("step.ahead", "Unsloth samples where it trains", True, "set it to false")
    elif not grpo["use_vllm"] or grpo["vllm_mode"] != "server":
        remedy = "set grpo.use_vllm: true and grpo.vllm_mode: server, or set it to false"
        yield Problem("step.ahead", "what samples on this card cannot do so while it trains", True, remedy)
    elif not grpo["vllm_importance_sampling_correction"]:
        remedy = "set it to true, or step.ahead: false"
        key = "grpo.vllm_importance_sampling_correction"
        yield Problem(key, "step.ahead samples from weights of before", False, remedy)
    elif grpo["top_k"] or grpo["top_p"] < 1.0 or grpo["min_p"]:
        message = (
            "under grpo.top_k, top_p or min_p the sampler's weights have another support than the trainer's"
        )
        yield Problem("step.ahead", message, True, "set it to false, or take those out")
    steps, window = grpo["steps_per_generation"], grpo["gradient_accumulation_steps"]
    if steps is not None and steps * grpo["num_iterations"] % window:
        remedy = f"set it to a multiple of grpo.gradient_accumulation_steps {window}, or step.ahead: false"
        yield Problem(
            "grpo.steps_per_generation", "step.ahead begins a rollout with an update", steps, remedy
        )


def _check_steps(grpo: Mapping[str, Any]) -> Iterator[Problem]:
    """transformers takes 0 and everything below it for -1."""
    if (steps := grpo["max_steps"]) < 1 and steps != -1:
        remedy = "set it to 1 or more, or to -1 for grpo.num_train_epochs"
        yield Problem("grpo.max_steps", "is no number of steps", steps, remedy)


def _check_lengths(model: ModelConfig, grpo: Mapping[str, Any]) -> Iterator[Problem]:
    """A completion follows a prompt of at least one token."""
    limits = {"model.max_seq_length": model.max_seq_length}
    if model.loader == "scratch":
        limits["model.scratch.max_positions"] = (model.scratch or ScratchConfig()).max_positions
    elif model.loader == "unsloth":
        limits["model.max_seq_length"] = model.max_seq_length or MAX_SEQ_LENGTH
    length = grpo["max_completion_length"]
    for key, limit in limits.items():
        if limit is not None and length >= limit:
            yield Problem(
                "grpo.max_completion_length",
                f"leaves no room for a prompt within {key} {limit}",
                length,
                f"set it below {limit}, or raise {key}",
            )


def _check_task_fits(sections: Mapping[str, Any]) -> Iterator[Problem]:
    """Whether the task fits the other sections."""
    from recipes.rewards.contract import problems
    from recipes.tasks import get_task

    task = get_task(sections["task"].name)(sections["task"].options, sections["run"].seed)
    yield from problems(task.reward_weights, task.rewards)
    model = sections["model"]
    if model.loader == "scratch" and model.tokenizer is None and not task.characters:
        message = f"the task {task.name} has no list of characters to make one of"
        yield Problem("model.tokenizer", message, None, "set it to bpe, or name a tokenizer")
