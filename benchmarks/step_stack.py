"""One stack of benchmarks.step_gpu, in its own process: a trainer, its three heads, and a step's phases."""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.step_tables import PHASES, write

HEADS = ("memhead", "trl", "full")
LENGTHS, TOY_LENGTHS = (1024, 16384, 4096, 32768), (8, 16)  # the shortest warms up, then the most important
PROMPT, TOY_PROMPT = 128, 4
MIB = 2**20
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
TOY_LLAMA = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def sequences(length: int) -> int:
    """Sequences per batch: two up to 4k tokens, then one."""
    return 2 if length <= 4096 else 1


def new_model(toy: bool) -> Any:
    """Random weights by the architecture's own initialisation, made where they stay."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, set_seed

    set_seed(0)
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = LlamaConfig(**(TOY_LLAMA if toy else LLAMA), **tokens, tie_word_embeddings=False)
    with torch.device("cpu" if toy else "cuda"):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32 if toy else torch.bfloat16, attn_implementation="sdpa"
        )


def save_checkpoint(model: Any, folder: Path) -> None:
    """Write the checkpoint that Unsloth loads: the model, and a tokenizer."""
    from recipes.models.tokenizers import character_tokenizer

    model.save_pretrained(folder)
    character_tokenizer("0123456789").save_pretrained(folder)


def load(
    stack: str, toy: bool, checkpoint: Path, longest: int, checkpointing: bool = True
) -> tuple[Any, Any, Any, ModuleType]:
    """Model, tokenizer, adapters that are not attached yet, and the module whose ``install`` installs a head.

    longest: tokens of a prompt and its completion. checkpointing: Unsloth's own; TRL's is set by its trainer.
    """
    from recipes.config.schema import LoraSection, ModelConfig
    from recipes.config.unsloth import import_unsloth

    lora = LoraSection(r=16, alpha=16, target_modules=LAYERS)
    if stack != "trl":
        import_unsloth()
    from memhead.integrations import trl as trl_head
    from memhead.integrations import unsloth as unsloth_head
    from recipes.models.tokenizers import character_tokenizer

    tokenizer = character_tokenizer("0123456789")
    if stack == "trl":
        return new_model(toy), tokenizer, lora.peft_config(), trl_head
    if toy:
        return _unsloths_trainer_on_cpu(lora), tokenizer, None, unsloth_head
    from recipes.models import unsloth as unsloth_loader

    config = ModelConfig(
        loader="unsloth",
        name=str(checkpoint),
        dtype="bfloat16",
        load_in_4bit=stack == "unsloth4",
        max_seq_length=longest,
        gradient_checkpointing=checkpointing,
    )
    return *unsloth_loader.load(config, lora, seed=0), None, unsloth_head


def _unsloths_trainer_on_cpu(lora: Any) -> Any:
    """Put the trainer that Unsloth writes for a GPU in TRL's place; returns a model like Unsloth's own."""
    import functools

    from peft import get_peft_model
    from unsloth.models import rl
    from unsloth.models.vision import FastBaseModel

    os.environ["UNSLOTH_ALLOW_CPU"] = "0"
    rl._patch_trl_rl_trainers_impl("grpo_trainer")
    os.environ["UNSLOTH_ALLOW_CPU"] = "1"
    model = get_peft_model(new_model(toy=True), lora.peft_config())
    model.for_training = functools.partial(FastBaseModel.for_training, model)
    model.for_inference = functools.partial(FastBaseModel.for_inference, model)
    model._unsloth_user_float32 = True
    return model


def make_trainer(
    stack: str,
    toy: bool,
    checkpoint: Path,
    scratch: Path,
    *,
    size: int = 2,
    prompt: int = PROMPT,
    completion: int | None = None,
    checkpointing: bool = True,
) -> tuple[Any, Any, ModuleType]:
    """A trainer as ``train()`` leaves it before the first step, its prepared model, and the head's module.

    size: completions of a prompt, and of a batch. prompt, completion: tokens of the longest. checkpointing: whether
    activations are computed again in the backward pass.
    """
    completion = completion or (TOY_LENGTHS if toy else LENGTHS)[-1]
    model, tokenizer, peft_config, integration = load(
        stack, toy, checkpoint, prompt + completion, checkpointing
    )
    import trl
    from datasets import Dataset

    from recipes.config.grpo import defaults
    from recipes.config.unsloth import is_unsloths, trl_meaning

    options: dict[str, Any] = {
        "per_device_train_batch_size": size,
        "num_generations": size,
        "max_completion_length": completion,
        "epsilon": 0.99,  # wide enough that no token's gradient is clipped away
        "epsilon_high": 1e4,
    }
    if is_unsloths(trl.GRPOConfig):
        options = trl_meaning({**defaults(trl.GRPOConfig), **options})
    options |= {
        "output_dir": str(scratch),
        "report_to": "none",
        "bf16": not toy,
        "use_cpu": toy,
        "gradient_checkpointing": checkpointing,
    }
    arguments = trl.GRPOConfig(**options)
    trainer = trl.GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "1"}] * 2 * size),
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        peft_config=peft_config,
    )
    if stack == "trl":
        if checkpointing:
            trainer.model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
        trainer.model.train()
    else:
        kind = checkpointing and getattr(trainer.model, "_unsloth_gradient_checkpointing", True)
        trainer.model.for_training(use_gradient_checkpointing=kind)
    trainer.create_optimizer()
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0  # every head meets the same weights
    model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1
    return trainer, model, integration


def make_inputs(length: int, vocab_size: int, prompt: int, device: Any) -> dict[str, Any]:
    """What the trainer's generation would return: random tokens, none of them a special one."""
    import torch

    generator = torch.Generator().manual_seed(length)
    size = sequences(length)
    ids = torch.randint(3, vocab_size, (size, prompt + length), generator=generator).to(device)
    mask = torch.ones_like(ids)
    return {
        "prompt_ids": ids[:, :prompt],
        "prompt_mask": mask[:, :prompt],
        "completion_ids": ids[:, prompt:],
        "completion_mask": mask[:, prompt:],
        "advantages": torch.tensor([1.0, -0.5][:size], device=device),
        "num_items_in_batch": mask[:, prompt:].sum(),
        # Those of a uniform policy, so that the loss shows what the head computed.
        "old_per_token_logps": torch.full((size, length), -math.log(vocab_size), device=device),
    }


class Meter:
    """Seconds and peak memory of the phases of one step."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peak_mib: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Synchronised at both ends."""
        import torch

        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        yield
        if on_gpu:
            torch.cuda.synchronize()
            self.peak_mib[name] = torch.cuda.max_memory_allocated() / MIB
        self.seconds[name] = time.perf_counter() - began


def step(trainer: Any, model: Any, inputs: dict[str, Any]) -> tuple[float, Meter]:
    """Scoring without gradient and one training step: the loss, and what the phases took."""
    import torch

    meter = Meter(inputs["prompt_ids"].device)
    ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    with meter.phase("scoring"), torch.no_grad():
        trainer._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].shape[1])
    with meter.phase("forward"):
        loss = trainer.compute_loss(model, inputs)
    with meter.phase("backward"):
        trainer.accelerator.backward(loss)
    with meter.phase("optimizer"):
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
    return loss.item(), meter


class Row:
    """One head at one length: its timed steps, or what kept it from being measured."""

    def __init__(self, stack: str, head: str, length: int) -> None:
        self.entry: dict[str, Any] = {"stack": stack, "head": head, "length": length}
        self.entry |= {"sequences": sequences(length), "error": "not begun: time limit"}
        self.meters: list[Meter] = []

    @property
    def failed(self) -> bool:
        """Whether another round is pointless."""
        return "said" in self.entry

    def reason(self, length: int) -> dict[str, Any]:
        """What this failure implies for another length: the same, if there are as many tokens."""
        tokens = sequences(self.entry["length"]) * self.entry["length"]
        more = sequences(length) * length >= tokens
        return {name: self.entry[name] for name in ("said", "error")} if more else {}

    def measure(
        self, trainer: Any, model: Any, install: Callable[[str], Any], inputs: dict[str, Any]
    ) -> None:
        """An untimed step, so that memory and kernels exist, and a timed one."""
        import torch

        try:
            with install(self.entry["head"]) as handle:
                step(trainer, model, inputs)
                on_gpu = trainer.accelerator.device.type == "cuda"
                loaded = torch.cuda.memory_allocated() / MIB if on_gpu else 0.0
                loss, meter = step(trainer, model, inputs)
                handle.expect_calls("the step")
        except Exception as error:  # a failing head is one cell of the table
            said = f"{type(error).__name__}: {error}"[:300]
            full = isinstance(error, torch.OutOfMemoryError) or "out of memory" in said
            if not full:
                traceback.print_exc()
            self.entry |= {"said": said, "error": "out of memory" if full else said}
            return
        self.meters.append(meter)
        self.entry.pop("error", None)
        self.entry |= {"loss": loss, "loaded_mib": loaded, "steps": [m.seconds for m in self.meters]}
        fastest = min(self.meters, key=lambda meter: sum(meter.seconds.values()))
        self.entry["seconds"] = fastest.seconds | {"step": sum(fastest.seconds[name] for name in PHASES)}
        self.entry["peak_mib"] = {
            name: max(m.peak_mib.get(name, 0.0) for m in self.meters) for name in PHASES
        }

    def __str__(self) -> str:
        head, length = self.entry["head"], self.entry["length"]
        if "error" in self.entry:
            return f"{head} {length}: {self.entry['error']}"
        seconds = " ".join(f"{sum(steps.values()):.2f}" for steps in self.entry["steps"])
        peak = max(self.entry["peak_mib"].values())
        return f"{head} {length}: {seconds} s, {peak:.0f} MiB, loss {self.entry['loss']}"


def _clear(trainer: Any) -> None:
    import torch

    trainer.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_stack(stack: str, toy: bool, path: Path, checkpoint: Path, until: float) -> None:
    """All rows of one stack, none begun after ``until``; stored after each. A failure is not tried with more tokens."""
    import torch

    from benchmarks.measure import machine, versions

    began = time.time()
    results = json.loads(path.read_text())
    results["machine"] = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    packages = ("torch", "triton", "transformers", "trl", "peft", "unsloth", "unsloth_zoo", "bitsandbytes")
    results["versions"] = versions(*packages)
    trainer, model, integration = make_trainer(stack, toy, checkpoint, checkpoint.parent / "trainer")
    results["setup_s"][stack] = time.time() - began
    gc.collect()
    gc.freeze()  # what stays to the end is not looked through between rows

    def store(entries: list[dict[str, Any]]) -> None:
        results["rows"] = entries
        path.write_text(json.dumps(results, indent=1) + "\n")
        write(path)

    done: list[dict[str, Any]] = results["rows"]
    failed: dict[str, Row] = {}
    lengths, prompt = (TOY_LENGTHS, TOY_PROMPT) if toy else (LENGTHS, PROMPT)
    for length in lengths:
        rows = [Row(stack, head, length) for head in HEADS]
        inputs = make_inputs(length, trainer.model.config.vocab_size, prompt, trainer.accelerator.device)
        for row in rows:
            row.entry |= failed[row.entry["head"]].reason(length) if row.entry["head"] in failed else {}
        # Forwards and backwards, so that no head always comes first.
        for order in [rows] if length == lengths[-1] else [rows, rows[::-1]]:
            for row in order:
                if row.failed or time.time() > until:
                    continue
                _clear(trainer)
                row.measure(trainer, model, integration.install, inputs)
                _clear(trainer)
                if row.failed:
                    failed.setdefault(row.entry["head"], row)
                store([*done, *(row.entry for row in rows)])
                print(f"{time.time() - began:4.0f} s  {stack} {row}", flush=True)
        done = [*done, *(row.entry for row in rows)]
        store(done)


def main() -> None:
    """The process's command line: ``checkpoint`` writes what Unsloth loads; a stack adds its rows to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stack")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    if options.stack == "checkpoint":
        save_checkpoint(new_model(toy=False), options.checkpoint)
    else:
        run_stack(options.stack, options.toy, options.results, options.checkpoint, options.until)


if __name__ == "__main__":
    main()
