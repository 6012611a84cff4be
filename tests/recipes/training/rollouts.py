"""Made-up rollouts for the tests of the step, the trainers that take them, and their steps."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from typing import Any, NamedTuple

import torch
import transformers
from datasets import Dataset
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import pad, use_adapter

from recipes.training.packed_step import packed

VOCABULARY, PAD = 24, 0
PROMPT_WIDTHS, WIDTH = (5, 2, 4, 3), 6
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}


def rollout(prompts: str, zeros: str, seed: int = 0, groups: int = 4, size: int = 4) -> dict[str, Any]:
    """What TRL's trainer makes of `groups` × `size` completions; lengths 1, the whole width, and between.

    prompts: "shared", one a group; "single", all different; "partly", a group's rows under two prompts.
    zeros: "none", "some" or "all" of the groups have no advantage.
    """
    draw = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> Tensor:
        return torch.randint(3, VOCABULARY, (count,), generator=draw)

    prompt_ids, completion_ids = [], []
    for group in range(groups):
        shared = tokens(PROMPT_WIDTHS[group % 4])
        for row in range(size):
            own = prompts == "single" or (prompts == "partly" and row % 2)
            prompt_ids.append(tokens(PROMPT_WIDTHS[(group + row) % 4]) if own else shared)
            length = (1, WIDTH, 3, 1 + int(torch.randint(0, WIDTH, (), generator=draw)))[row % 4]
            completion_ids.append(tokens(length))
    advantages = torch.randn(groups * size, generator=draw, dtype=torch.float64)
    dead = {"none": 0, "some": 1, "all": groups}[zeros]
    advantages[: dead * size] = 0.0
    if zeros == "some":
        advantages[-1] = 0.0  # one of a group that is alive
    completion_mask = [torch.ones_like(ids) for ids in completion_ids]
    mask = pad(completion_mask, padding_value=0, padding_side="right")
    return {
        "prompt_ids": pad(prompt_ids, padding_value=PAD, padding_side="left"),
        "prompt_mask": pad([torch.ones_like(i) for i in prompt_ids], padding_value=0, padding_side="left"),
        "completion_ids": pad(completion_ids, padding_value=PAD, padding_side="right"),
        "completion_mask": mask,
        "advantages": advantages,
        "num_items_in_batch": mask.sum(),
    }


class Fed(GRPOTrainer):
    """TRL's trainer with given completions, which it scores as TRL does."""

    fed: dict[str, Any] | list[dict[str, Any]]  # of every generation, or of one after another

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = dict(self.fed if isinstance(self.fed, dict) else self.fed.pop(0))
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
        arguments = (ids, mask, output["completion_ids"].shape[1])
        with torch.no_grad():
            every = self.args.steps_per_generation * self.num_iterations
            if self.args.gradient_accumulation_steps % every != 0 or (
                self.use_vllm and self.vllm_importance_sampling_correction
            ):
                old, _, _ = self._get_per_token_logps_and_entropies(self.model, *arguments)
                if old is not None:
                    output["old_per_token_logps"] = old
                if self.use_vllm and self.vllm_importance_sampling_correction:
                    output["importance_sampling_ratio"] = self._ratios(output)
            if self.beta != 0.0:
                if self.ref_model is not None:
                    ref, _, _ = self._get_per_token_logps_and_entropies(self.ref_model, *arguments)
                else:
                    with use_adapter(self.accelerator.unwrap_model(self.model), adapter_name=None):
                        ref, _, _ = self._get_per_token_logps_and_entropies(self.model, *arguments)
                output["ref_per_token_logps"] = ref
        return output

    def _ratios(self, output: dict[str, Any]) -> Tensor:
        """The importance ratio as TRL's documentation has it, token by token, and TRL's metrics of it."""
        old, sampled = output["old_per_token_logps"].tolist(), output["sampling_per_token_logps"].tolist()
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        level, treatment = self.vllm_importance_sampling_mode.split("_")
        gaps, seen, rows = [], [], []
        for row, mask in enumerate(output["completion_mask"].tolist()):
            differences = [a - b if m else 0.0 for a, b, m in zip(old[row], sampled[row], mask, strict=True)]
            gaps += [abs(d) for d, m in zip(differences, mask, strict=True) if m and d == d]
            differences = [d if d == d else 0.0 for d in differences]
            ratios = [math.exp(d) for d in (differences if level == "token" else [sum(differences)])]
            if treatment == "truncate":
                ratios = [min(max(r, low), high) for r in ratios]
            else:
                ratios = [r if low <= r <= high else 0.0 for r in ratios]
            rows.append(ratios)
            seen += ratios if level == "sequence" else [r for r, m in zip(ratios, mask, strict=True) if m]
        for name, values in (("sampling_logp_difference", gaps), ("importance_sampling_ratio", seen)):
            metrics = {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}
            for figure in ("mean", "max") if values is gaps else ("min", "mean", "max"):
                self._metrics["train"][f"sampling/{name}/{figure}"].append(metrics[figure])
        return torch.tensor(rows, dtype=torch.float64)


PackedFed = packed(Fed)


def configurations() -> dict[str, Any]:
    """A tiny config of each architecture, with windows that are shorter than the rows and longer ones."""
    t = transformers
    kinds = ["sliding_attention", "full_attention"]
    gemma = {**SMALL, "head_dim": 8, "query_pre_attn_scalar": 8}
    return {
        "llama": t.LlamaConfig(**SMALL),
        # Of which its code knows nothing.
        "llama-window": t.LlamaConfig(**SMALL, sliding_window=4, layer_types=kinds),
        "qwen2": t.Qwen2Config(
            **SMALL, tie_word_embeddings=True, use_sliding_window=True, sliding_window=4, max_window_layers=1
        ),
        "qwen3": t.Qwen3Config(**SMALL, head_dim=8),
        "mistral": t.MistralConfig(**SMALL, sliding_window=32),
        # One for all layers.
        "mistral-window": t.MistralConfig(**SMALL, sliding_window=4, layer_types=kinds),
        "gemma2": t.Gemma2Config(**gemma, sliding_window=32),
        "gemma3": t.Gemma3TextConfig(**gemma, sliding_window=4, layer_types=kinds),
        "phi": t.PhiConfig(**SMALL),
        "phi3": t.Phi3Config(**SMALL),
        "phi3-window": t.Phi3Config(**SMALL, sliding_window=4),
        "olmo2": t.Olmo2Config(**SMALL),
        "granite": t.GraniteConfig(**SMALL, logits_scaling=3.0),
        "smollm3": t.SmolLM3Config(**SMALL),
        "smollm3-window": t.SmolLM3Config(
            **SMALL, use_sliding_window=True, sliding_window=4, layer_types=kinds
        ),
        "cohere": t.CohereConfig(**SMALL, logit_scale=0.25),
    }


def model_of(name: str, attention: str = "sdpa", **settings: Any) -> Any:
    torch.manual_seed(1)
    config = configurations()[name]
    config.update(settings)
    return transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float64, attn_implementation=attention
    )


def trainer_of(kind: type, model: Any, folder: Any, tokenizer: Any, **settings: Any) -> Any:
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": WIDTH,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "beta": 0.0,
    }
    own = {k: settings.pop(k) for k in ("peft_config", "token_budget") if k in settings}
    trainer = kind(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(**{**arguments, **settings}),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 16}),
        processing_class=tokenizer,
        **own,
    )
    trainer.create_optimizer()
    return trainer


class Step(NamedTuple):
    """What came of one accumulation window."""

    loss: float
    gradients: dict[str, torch.Tensor]
    metrics: dict[str, float]


def run(trainer: Any, fed: dict[str, Any] | list[dict[str, Any]], windows: int) -> list[Step]:
    """Train `windows` windows on one rollout or on several, with plain steps along the gradient; the model is put back
    after it.
    """
    model = trainer.model
    before = [p.detach().clone() for p in model.parameters()]
    model.train()
    trainer.fed = fed if isinstance(fed, dict) else list(fed)
    trainer._step, trainer._place, trainer._rollout = 0, 0, None
    trainer._buffered_inputs = None
    trainer.current_gradient_accumulation_steps = window = trainer.args.gradient_accumulation_steps
    steps = []
    for _ in range(windows):
        trainer._metrics["train"] = defaultdict(list)
        loss = 0.0
        for place in range(window):
            trainer.accelerator.gradient_state._set_sync_gradients(place == window - 1)
            loss += float(trainer.training_step(model, None, None))
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        metrics = {k: sum(v) / len(v) for k, v in trainer._metrics["train"].items()}
        steps.append(Step(loss, gradients, metrics))
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.02 * p.grad / (1e-3 + p.grad.abs().max())
        model.zero_grad()
    with torch.no_grad():
        for p, value in zip(model.parameters(), before, strict=True):
            p.copy_(value)
    return steps


def varlen_by_segment(
    query, key, value, query_ends, key_ends, longest_query, longest_keys, *, scale, window_size
):
    """What torch's varlen_attn computes: segments, each causal from the bottom right, with a window to the left."""
    pieces = []
    for (q0, q1), (k0, k1) in zip(
        itertools.pairwise(query_ends.tolist()), itertools.pairwise(key_ends.tolist()), strict=True
    ):
        q, (k, v) = query[q0:q1].transpose(0, 1), (x[k0:k1].transpose(0, 1) for x in (key, value))
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        distance = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None] - torch.arange(k1 - k0)
        seen = (distance >= 0) if window_size[0] < 0 else (distance >= 0) & (distance <= window_size[0])
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
        pieces.append((scores.softmax(-1) @ v).transpose(0, 1))
        assert q1 - q0 <= longest_query
        assert k1 - k0 <= longest_keys
    return torch.cat(pieces)
