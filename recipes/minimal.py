"""GRPO from top to bottom in one file: sample, reward, compare within the group, step. No trainer.

    python -m recipes.minimal                        the quickstart's task and model: about three minutes on two cores
    python -m recipes.minimal --steps 20 --seed 1

To read, and to test against: full logits, one row of tokens a completion, plain autograd, nothing clever.
`train_grpo.py` computes the same with less (memhead's head, the packed step).

The letters at the end of a name are its shape:

    P  prompts of a step       G  completions of a prompt       B  all completions, P·G, those of a prompt adjacent
    S  prompt tokens, padded on the left      C  completion tokens, padded on the right      V  vocabulary

The method: Z. Shao et al., DeepSeekMath, 2024, section 4.1 (groups in place of a critic), and Q. Yu et al., DAPO, 2025,
sections 3.1 (a higher upper clip) and 3.3 (every token of the batch weighs the same).
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """What may be turned. The defaults are those of configs/quickstart.yaml."""

    steps: int = 200
    prompts: int = 64  # P
    group: int = 8  # G
    completion_length: int = 6
    temperature: float = 1.0
    learning_rate: float = 2e-4
    warmup_steps: int = 10
    clip_low: float = 0.2
    clip_high: float = 0.28
    entropy_coef: float = 0.01
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Rollout:
    """Sampled completions with the prompts they answer; masks are 1 at real tokens."""

    prompt_BS: Tensor
    prompt_mask_BS: Tensor
    completion_BC: Tensor
    completion_mask_BC: Tensor


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompts: Sequence[str], settings: Settings) -> Rollout:
    """`settings.group` completions of each prompt, drawn from the policy as it is."""
    encoded = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left").to(
        model.device
    )
    repeated = {
        name: tensor.repeat_interleave(settings.group, dim=0)
        for name, tensor in encoded.items()
        if name in ("input_ids", "attention_mask")
    }
    tokens = model.generate(
        **repeated,
        do_sample=True,
        temperature=settings.temperature,
        top_k=0,
        max_new_tokens=settings.completion_length,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    prompt_BS, mask_BS = repeated["input_ids"], repeated["attention_mask"]
    completion_BC = tokens[:, prompt_BS.shape[1] :]
    return Rollout(prompt_BS, mask_BS, completion_BC, until_end(completion_BC, tokenizer.eos_token_id))


def until_end(completion_BC: Tensor, eos_token_id: int) -> Tensor:
    """1 up to the first end token, which counts, and 0 after it."""
    ended_BC = (completion_BC == eos_token_id).long().cumsum(dim=1)
    before_BC = ended_BC - (completion_BC == eos_token_id).long()  # end tokens strictly before this one
    return (before_BC == 0).long()


def advantages(rewards_B: Tensor, group: int) -> Tensor:
    """How much better than its group's mean each completion did, in its deviations (DeepSeekMath, 4.1.2)."""
    rewards_PG = rewards_B.view(-1, group)
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    return (centred_PG / (rewards_PG.std(dim=1, keepdim=True) + 1e-4)).view(-1)


def logprobs_and_entropy(model: Any, rollout: Rollout, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each completion token and the entropy it was drawn with, both (B, C), with gradients."""
    ids = torch.cat([rollout.prompt_BS, rollout.completion_BC], dim=1)
    mask = torch.cat([rollout.prompt_mask_BS, rollout.completion_mask_BC], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # a prompt begins at 0, however much it is padded
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    start = rollout.prompt_BS.shape[1] - 1  # the prompt's last token scores the first of the completion
    logits_BCV = logits[:, start:-1].to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    logprobs_BCV = logits_BCV.log_softmax(dim=-1)
    entropy_BC = -(logprobs_BCV.exp() * logprobs_BCV).sum(dim=-1)
    return logprobs_BCV.gather(2, rollout.completion_BC[:, :, None])[:, :, 0], entropy_BC


def clipped_loss(
    logprobs_BC: Tensor, old_BC: Tensor, advantages_B: Tensor, mask_BC: Tensor, low: float, high: float
) -> Tensor:
    """Minus the clipped objective (DeepSeekMath, eq. 3), averaged over all completion tokens (DAPO, eq. 8)."""
    ratio_BC = (logprobs_BC - old_BC).exp()
    advantages_B1 = advantages_B[:, None]
    gain_BC = torch.min(ratio_BC * advantages_B1, ratio_BC.clamp(1 - low, 1 + high) * advantages_B1)
    return -(gain_BC * mask_BC).sum() / mask_BC.sum()


def loss(
    model: Any, rollout: Rollout, advantages_B: Tensor, settings: Settings, old_BC: Tensor | None = None
) -> Tensor:
    """What a step descends. old_BC: log-probabilities under the policy that sampled; None: it is this one."""
    logprobs_BC, entropy_BC = logprobs_and_entropy(model, rollout, settings.temperature)
    old_BC = logprobs_BC.detach() if old_BC is None else old_BC
    mask_BC = rollout.completion_mask_BC
    policy = clipped_loss(logprobs_BC, old_BC, advantages_B, mask_BC, settings.clip_low, settings.clip_high)
    return policy - settings.entropy_coef * (entropy_BC * mask_BC).sum() / mask_BC.sum()


def rate(step: int, settings: Settings) -> float:
    """The learning rate of a step, counted from 0: up for `warmup_steps`, then straight down to nothing."""
    warm = settings.warmup_steps
    share = step / warm if step < warm else (settings.steps - step) / max(1, settings.steps - warm)
    return settings.learning_rate * share


def train(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    reward: Callable[..., list[float]],
    settings: Settings,
    seed: int = 0,
) -> None:
    """Whole GRPO. rows: a "prompt" each, and the columns that `reward(completions, **columns)` takes."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    chance = random.Random(seed)
    torch.manual_seed(seed)
    for step in range(settings.steps):
        started = time.perf_counter()
        drawn = chance.sample(rows, settings.prompts)
        rollout = sample(model, tokenizer, [row["prompt"] for row in drawn], settings)
        texts = tokenizer.batch_decode(rollout.completion_BC, skip_special_tokens=True)
        asked = [row for row in drawn for _ in range(settings.group)]
        columns = {name: [row[name] for row in asked] for name in asked[0] if name != "prompt"}
        rewards_B = torch.tensor(reward(completions=texts, **columns), device=model.device)

        objective = loss(model, rollout, advantages(rewards_B, settings.group), settings)
        objective.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, settings)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == settings.steps - 1:
            seconds = time.perf_counter() - started
            print(f"step {step:3d}  reward {rewards_B.mean():.3f}  {seconds:.2f} s", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The quickstart's model and task: a supervised start, then GRPO, the greedy accuracy before and after."""
    from recipes.config.load import load_config
    from recipes.models.generation import Sampling, by_transformers
    from recipes.models.load import load
    from recipes.models.precision import AS_WEIGHTS
    from recipes.training.evaluation import complete
    from recipes.training.warm_start import warm_start

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    config = load_config(
        Path(__file__).parents[1] / "configs" / "quickstart.yaml", [f"run.seed={options.seed}"]
    )
    task, started = config.make_task(), config.run.warm_start
    model, tokenizer = load(config.model, task, options.seed)
    held_out = list(task.held_out)

    def accuracy() -> float:
        answers = complete(by_transformers(model, tokenizer), held_out, Sampling(Settings.completion_length))
        return sum(task.is_correct(*pair) for pair in zip([a for (a,) in answers], held_out)) / len(held_out)

    if started is not None:
        examples = task.warm_start_examples(started.steps * started.batch_size)
        warm_start(model, tokenizer, examples, started, precision=AS_WEIGHTS, probe=accuracy)
    print(f"before GRPO: accuracy {accuracy():.3f} of {len(held_out)} held-out problems", flush=True)
    settings = Settings(steps=options.steps)
    train(model, tokenizer, list(task.train), task.rewards["correct"], settings, options.seed)
    print(f"after: accuracy {accuracy():.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
