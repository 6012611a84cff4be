"""An adapter handed to a real vLLM: the base stays to the bit, and how long a sync takes.

    python -m benchmarks.adapter_sync_gpu --model FOLDER --output DIR              SmolLM2, 1,000 syncs
    python -m benchmarks.adapter_sync_gpu --shape llama-8b --syncs 20 --output DIR  random weights, an 8B adapter

One process, one GPU. The trainer is TRL's with colocated vLLM, as a run makes it; between two syncs the adapters are
changed as a step would change them. Written: sha256 of every base tensor, of the trainer and of vLLM, before and after;
seconds of a sync (median and longest of those after the first); the difference of vLLM's log-probabilities from the
trainer's with the last adapter; and what one cycle of TRL's own merge does to the base.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

SHAPES = {  # of random weights, the architectures' own
    "llama-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    },
}  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the CPU is for the test, with a stand-in of vLLM
CONFIG = Path(__file__).parents[1] / "configs" / "llama3.2_1b_gsm8k.yaml"
WORDS = [f"{number} plus {number + 1} is" for number in range(64)]


def made_up(shape: str, place: Path) -> Path:
    """A folder of a Llama with random weights in bfloat16 and a tokenizer of the words above."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from recipes.models.tokenizers import bpe_tokenizer

    tokenizer = bpe_tokenizer(WORDS, 512)
    config = LlamaConfig(
        **SHAPES[shape], pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def trainer_of(folder: str, rank: int, memory: float) -> Any:
    """TRL's trainer with LoRA on every linear layer and vLLM beside it, by the run's own way."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from recipes.config.load import load_config
    from recipes.training.vllm_engine import engine

    overrides = [f"model.name={folder}", f"lora.r={rank}", "grpo.use_vllm=true", "grpo.vllm_mode=colocate"]
    # Its graphs take minutes, and are not timed here.
    overrides.append("model.vllm_engine={enforce_eager: true}")
    config = load_config(CONFIG, overrides)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=DEVICE)
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=8, num_generations=8, max_completion_length=64,
        use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=memory, vllm_max_model_length=256,
        bf16=DEVICE == "cuda", use_cpu=DEVICE == "cpu",
        report_to="none",
    )  # fmt: skip
    with engine(config):
        return GRPOTrainer(
            model=model, args=arguments, reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
            train_dataset=Dataset.from_dict({"prompt": WORDS}), processing_class=tokenizer,
            peft_config=config.lora.peft_config() if config.lora else None,
        )  # fmt: skip


def sums(parameters: Any) -> dict[str, str]:
    """sha256 of every tensor that is none of an adapter's, several at a time: 8B parameters take one core minutes."""
    tensors = [(name, p) for name, p in parameters if "lora_" not in name]
    with ThreadPoolExecutor() as pool:
        return dict(zip((name for name, _ in tensors), pool.map(_sum, (p for _, p in tensors)), strict=True))


def _sum(parameter: torch.Tensor) -> str:
    data = parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(memoryview(data)).hexdigest()


def sums_of_vllm(trainer: Any) -> dict[str, str]:
    """The same of vLLM's own base, in its own fused layout."""
    runner = trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner
    return sums(runner.model.named_parameters())


def change(model: Any, step: int) -> None:
    """Other adapters, as large as trained ones: steps that added up would end in a model that computes noise."""
    generator = torch.Generator(DEVICE).manual_seed(step)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.normal_(std=0.03, generator=generator)


@torch.no_grad()
def difference(trainer: Any) -> dict[str, float]:
    """Of vLLM's log-probabilities from the trainer's, nats a token, with the adapter as it is now.

    `mean_without`: from those that the trainer has without its adapter, which shows that vLLM used it.
    """
    prompts = [trainer.processing_class(text)["input_ids"] for text in WORDS[:8]]
    _, completions, logprobs, _ = trainer.vllm_generation.generate(prompts, None, 1)
    theirs = torch.tensor([token[0] for sampled in logprobs for token in sampled], device=DEVICE)
    every = (_logprobs(trainer.model, prompts, completions) - theirs).abs()
    with trainer.model.disable_adapter():
        without = (_logprobs(trainer.model, prompts, completions) - theirs).abs()
    return {
        "mean": every.mean().item(),
        "max": every.max().item(),
        "mean_without": without.mean().item(),
        "tokens": every.numel(),
    }


def _logprobs(model: Any, prompts: list[list[int]], completions: list[list[int]]) -> torch.Tensor:
    """Of all completion tokens, one completion after another. (tokens,)"""
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([[*prompt, *completion]], device=DEVICE)
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
        found.append(logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0])
    return torch.cat(found)


def merge_drift(model: Any) -> float:
    """The largest change of a base weight by one cycle of merging and unmerging."""
    before = {n: p.detach().cpu().clone() for n, p in model.named_parameters() if "base_layer" in n}
    model.merge_adapter()
    model.unmerge_adapter()
    named = dict(model.named_parameters())
    return max((named[n].detach().cpu() - p).abs().max().item() for n, p in before.items())


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write adapter_sync.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a model's folder")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead")
    parser.add_argument("--syncs", type=int, default=1000)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--memory", type=float, default=0.45, help="vLLM's share of the card")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    if (options.model is None) == (options.shape is None):
        parser.error("give --model or --shape")
    folder = options.model or str(made_up(options.shape, Path(tempfile.mkdtemp())))
    from memhead.integrations import trl as memhead_trl

    options.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "command": "python -m benchmarks.adapter_sync_gpu",
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE,
        "model": options.shape or Path(folder).name,
        "rank": options.rank,
        "syncs": options.syncs,
    }
    with memhead_trl.install():
        for part in measured(trainer_of(folder, options.rank, options.memory), options.syncs):
            found |= part
            (options.output / "adapter_sync.json").write_text(json.dumps(found, indent=1) + "\n")
            print(time.strftime("%X"), json.dumps(part), flush=True)


def measured(trainer: Any, syncs: int) -> Iterator[dict[str, Any]]:
    """What is found, part by part."""
    model, generation = trainer.model, trainer.vllm_generation
    before = sums(model.named_parameters())
    adapters = [p.numel() for name, p in model.named_parameters() if "lora_" in name]
    yield {"tensors": len(before), "adapter_parameters": sum(adapters)}
    seconds, vllm_before = [], {}
    for step in range(syncs):
        change(model, step)
        _wait()
        began = time.perf_counter()
        generation.sync_weights()
        _wait()
        seconds.append(time.perf_counter() - began)
        vllm_before = vllm_before or sums_of_vllm(trainer)
    later = seconds[1:] or seconds
    yield {
        "seconds_first": seconds[0],
        "seconds_median": statistics.median(later),
        "seconds_longest": max(later),
    }
    yield {
        "trainer_base_unchanged": sums(model.named_parameters()) == before,
        "vllm_base_unchanged": sums_of_vllm(trainer) == vllm_before,
    }
    yield {"difference": difference(trainer)}
    yield {"merge_cycle_changes_the_base_by": merge_drift(model)}


if __name__ == "__main__":
    main()
