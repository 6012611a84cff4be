"""The quickstart's loss step on a CPU: TRL's padded way and the packed step, side by side on the same rollouts.

    python -m benchmarks.step                     # a minute on two cores
    python -m benchmarks.step --threads 1 --rounds 5

Llama of 0.8 M parameters, 64 prompts of 7 tokens × 8 completions of 6, full fine-tuning, float32. `entropy`: with the
quickstart's bonus, which reaches every token, so that nothing can be left out; without it, zero groups are left out.
Seconds are processor time of all threads, which varies less than wall time on a machine that has other work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

PROMPTS, SIZE, PROMPT, COMPLETION = 64, 8, 7, 6
CASES = ((0.01, 0.0), (0.0, 0.0), (0.0, 0.3))  # entropy_coef, share of groups without advantage


def rollout(zeros: float) -> dict[str, Any]:
    """Random completions, all of full length, as TRL's generation would return them."""
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 20, (PROMPTS, PROMPT), generator=draw).repeat_interleave(SIZE, 0)
    completions = torch.randint(3, 20, (PROMPTS * SIZE, COMPLETION), generator=draw)
    advantages = torch.randn(PROMPTS, SIZE, generator=draw)
    advantages[: round(zeros * PROMPTS)] = 0.0
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
        "advantages": advantages.flatten(),
        "num_items_in_batch": torch.tensor(completions.numel()),
    }


def make_trainer(kind: type, model: Any) -> Any:
    """A trainer as `train()` leaves it before the first step, which takes its rollout from `fed`."""
    from datasets import Dataset
    from trl import GRPOConfig

    from recipes.models.tokenizers import character_tokenizer

    class Fed(kind):  # type: ignore[misc, valid-type]
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            return dict(self.fed)

    trainer = Fed(
        model=model,
        processing_class=character_tokenizer("0123456789+-*=>abcdef"),
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(), report_to="none", use_cpu=True, bf16=False, num_generations=SIZE,
            per_device_train_batch_size=PROMPTS * SIZE, max_completion_length=COMPLETION,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": "1"}] * SIZE),
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
    )  # fmt: skip
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def step(trainer: Any) -> tuple[float, torch.Tensor]:
    """One loss and its backward; the loss and the whole gradient."""
    trainer._step, trainer._buffered_inputs = 0, None
    loss = trainer.training_step(trainer.model, None, None)
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    trainer.model.zero_grad()
    return float(loss), gradient


def compare(rounds: int) -> list[dict[str, float]]:
    """A row for each case."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed
    from trl import GRPOTrainer

    from memhead.integrations import trl as memhead_trl
    from recipes.training.packed_step import packed

    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20, hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip
    rows = []
    with memhead_trl.install():
        trainers = {
            "trl": make_trainer(GRPOTrainer, model),
            "packed": make_trainer(packed(GRPOTrainer), model),
        }
        model.train()
        for entropy, zeros in CASES:
            gradients, seconds = {}, {name: [] for name in trainers}
            for name, trainer in trainers.items():
                trainer.fed = rollout(zeros)
                trainer.entropy_coef, trainer._entropy_bonus_enabled = entropy, entropy != 0.0
                _, gradients[name] = step(trainer)
            for _ in range(rounds):
                for name, trainer in trainers.items():
                    began = time.process_time()
                    step(trainer)
                    seconds[name].append(time.process_time() - began)
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            error = (gradients["packed"] - gradients["trl"]).norm() / gradients["trl"].norm()
            rows.append(
                {"entropy_coef": entropy, "zero_groups": zeros, **medians,
                 "ratio": medians["packed"] / medians["trl"], "gradient_difference": float(error)}
            )  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="folder for step_cpu.json; left out: printed only")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rows = compare(options.rounds)
    if options.output is not None:
        results = {"threads": options.threads, "torch": torch.__version__, "rows": rows}
        (options.output / "step_cpu.json").write_text(json.dumps(results, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
