"""The proof of concept's tables, redone beside its own figures.

    python -m benchmarks.seed_results                     # the device at hand, its size
    python -m benchmarks.seed_results --size tiny         # a few seconds, for the tests

memhead grew from a proof of concept: a memory-saving head written for a programming challenge. On a GPU
the head has the challenge's shape (4 x 4096 tokens, hidden 4096, vocabulary 128 K) and the supervised
run is Llama 3.2 1B's architecture; on a CPU both are smaller, and the result says which. Written to
``benchmarks/results/seed_<device>.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import memhead
from benchmarks.measure import interleaved_seconds, machine, peak_bytes, versions

RESULTS = Path(__file__).with_name("results")
DRAWS = 4


class Size(NamedTuple):
    """What fits one kind of device."""

    batch: int
    tokens: int
    hidden: int
    vocab: int
    layers: int  # of the supervised run's model
    width: int
    model_vocab: int
    intermediate: int
    steps: int
    rounds: int


SIZES = {
    "challenge": Size(4, 4096, 4096, 131072, 16, 2048, 128256, 8192, 20, 5),
    "cpu": Size(4, 512, 1024, 32768, 4, 256, 32768, 1024, 20, 3),
    "tiny": Size(2, 16, 32, 501, 1, 32, 101, 64, 3, 1),
}


class Line(NamedTuple):
    """One line of the table."""

    what: str
    old: str
    ours: str
    target: str
    met: bool | None


def head_inputs(
    size: Size, dtype: torch.dtype, device: torch.device, seed: int = 3407
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (B, T, H), weight (V, H) and targets (B, T)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(size.batch, size.tokens, size.hidden, generator=generator)
    weight = torch.randn(size.vocab, size.hidden, generator=generator) / size.hidden**0.5
    targets = torch.randint(size.vocab, (size.batch, size.tokens), generator=generator)
    return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device)


def standard_ce(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits, cast to float32 for the loss."""
    return F.cross_entropy(F.linear(hidden, weight).float().flatten(0, 1), targets.flatten())


def custom_ce(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same from hidden states."""
    return memhead.linear_cross_entropy(hidden, weight, targets)


def relu_mse(logits: Tensor, targets: Tensor) -> Tensor:
    """Row by row: mean squared error of relu(logits) against the token's number, scaled into 0..1."""
    return (torch.relu(logits) - (targets / 1000 % 1)[:, None]).square().mean(-1)


def standard_mse(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """:func:`relu_mse` of all logits at once."""
    return relu_mse(F.linear(hidden, weight).float().flatten(0, 1), targets.flatten()).mean()


def custom_mse(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """:func:`relu_mse` through ``chunked_linear``: autograd derives it, chunk by chunk."""
    return memhead.chunked_linear(hidden.flatten(0, 1), weight, relu_mse, targets.flatten())


def forward_backward(
    loss: Callable[..., Tensor], inputs: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Loss and its gradient of hidden; the head is frozen, as in the proof of concept's LoRA runs."""
    hidden = inputs[0].detach().requires_grad_()
    value = loss(hidden, *inputs[1:])
    (grad,) = torch.autograd.grad(value, hidden)
    return value.detach(), grad


def exact_loss(inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """The cross entropy in float64, some rows at a time."""
    hidden, weight, targets = inputs
    rows = zip(hidden.flatten(0, 1).split(256), targets.flatten().split(256), strict=True)
    wide = weight.double()
    total = sum(float(F.cross_entropy(x.double() @ wide.t(), t, reduction="sum")) for x, t in rows)
    return total / targets.numel()


def bfloat16_errors(size: Size, device: torch.device) -> tuple[float, float]:
    """Mean distance to float64 of the standard and the custom loss: in one draw the standard may be right by luck."""
    errors = []
    for seed in range(DRAWS):
        inputs = head_inputs(size, torch.bfloat16, device, seed)
        exact = exact_loss(inputs)
        with torch.no_grad():
            errors.append([abs(float(f(*inputs)) - exact) for f in (standard_ce, custom_ce)])
    standard, custom = (sum(column) / DRAWS for column in zip(*errors, strict=True))
    return standard, custom


def head_lines(size: Size, device: torch.device) -> list[Line]:
    """Losses, gradients, time and memory of the head alone."""
    inputs = head_inputs(size, torch.float32, device)
    (plain, plain_grad), (ours, grad) = (forward_backward(f, inputs) for f in (standard_ce, custom_ce))
    loss_gap, grad_gap = abs(float(ours - plain)), float((grad - plain_grad).abs().max())
    (plain_mse, _), (ours_mse, _) = (forward_backward(f, inputs) for f in (standard_mse, custom_mse))
    mse_gap = abs(float(ours_mse - plain_mse))
    lines = [
        Line(
            "CE loss, custom - standard (float32)", "0.024115", f"{loss_gap:.2e}", "<= 1e-6", loss_gap <= 1e-6
        ),
        Line(
            "input gradient, max difference", "7.45e-9", f"{grad_gap:.2e}", "<= 7.45e-9", grad_gap <= 7.45e-9
        ),
        Line("MSE with ReLU, loss difference", "0.166953", f"{mse_gap:.2e}", "<= 1e-6", mse_gap <= 1e-6),
    ]
    standard, custom = bfloat16_errors(size, device)
    text = f"{custom:.1e}, standard {standard:.1e}"
    name = f"CE loss in bfloat16, distance to float64, mean of {DRAWS} draws"
    lines.append(Line(name, "–", text, "< standard", custom <= standard))
    half = head_inputs(size, torch.bfloat16, device)
    # Time and memory in the dtype that such a device trains in.
    timed = half if device.type == "cuda" else inputs
    functions = {
        name: lambda f=f: forward_backward(f, timed) for name, f in (("s", standard_ce), ("c", custom_ce))
    }
    for function in functions.values():
        function()  # for what is made only once
    seconds = interleaved_seconds(functions, size.rounds, device)
    peaks = {name: peak_bytes(function, device) for name, function in functions.items()}
    ratio, saving = seconds["c"] / seconds["s"], peaks["s"] / peaks["c"]
    text = f"{saving:.1f} ({peaks['s'] / 2**30:.3f} / {peaks['c'] / 2**30:.3f} GiB)"
    lines.append(Line("time, custom / standard", "1.36", f"{ratio:.2f}", "< 1", ratio < 1))
    lines.append(Line("memory, standard / custom", "2.31 (4.063 / 1.761 GiB)", text, ">= 5", saving >= 5))
    return lines


def supervised(size: Size, device: torch.device, patched: bool) -> dict[str, Any]:
    """Losses step by step, and the Trainer's own runtime figures."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

    from memhead.integrations.transformers import patch

    set_seed(3407)
    config = LlamaConfig(
        vocab_size=size.model_vocab, hidden_size=size.width, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=max(1, size.width // 64),
        num_key_value_heads=max(1, size.width // 256), tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    ids = torch.randint(size.model_vocab, (4 * size.steps, min(size.tokens, 512))).tolist()
    losses: list[float] = []
    warm = torch.tensor(ids[:2], device=device)  # compiles everything before the clock runs
    with patch(model) if patched else nullcontext():
        model(input_ids=warm, labels=warm).loss.backward()
    model.zero_grad()

    class Recording(Trainer):
        """The Trainer rounds the losses it logs; this one keeps them."""

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(float(loss.detach()))
            return loss

    with tempfile.TemporaryDirectory() as folder, patch(model) if patched else nullcontext():
        arguments = TrainingArguments(
            folder, max_steps=size.steps, per_device_train_batch_size=2, learning_rate=1e-4, report_to="none",
            save_strategy="no", disable_tqdm=True, logging_strategy="no", use_cpu=device.type == "cpu", seed=3407,
        )  # fmt: skip
        trainer = Recording(
            model, arguments, train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids})
        )
        metrics = trainer.train().metrics | {"total_flos": trainer.state.total_flos}
    return {"losses": losses, "metrics": metrics, "parameters": sum(p.numel() for p in model.parameters())}


def supervised_lines(size: Size, device: torch.device) -> list[Line]:
    """Trainer against Trainer, one of them with a patched model."""
    plain, ours = (supervised(size, device, patched) for patched in (False, True))
    gaps = [abs(a - b) / abs(b) for a, b in zip(ours["losses"], plain["losses"], strict=True)]
    name = f"Llama of {ours['parameters'] / 1e6:.0f} M parameters, random weights, supervised"
    both = f"{plain['metrics']['train_loss']:.6f} / {ours['metrics']['train_loss']:.6f}"
    text = f"{both}, largest difference of a step {max(gaps):.1e} relative"
    lines = [
        Line(
            f"{name}: loss, standard / custom",
            "4.111237 / 4.111236",
            text,
            "<= 1e-6 a step",
            max(gaps) <= 1e-6,
        )
    ]
    for key in ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"):
        values = f"{plain['metrics'][key]:.4g} / {ours['metrics'][key]:.4g}"
        lines.append(Line(f"{key}, standard / custom", "–", values, "", None))
    return lines


def grpo(impl: str) -> tuple[list[float], list[float], list[Tensor]]:
    """Ten steps of TRL's GRPO on a tiny model: losses, rewards and final parameters."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed
    from trl import GRPOConfig, GRPOTrainer

    from memhead.integrations import trl as memhead_trl
    from recipes.models.tokenizers import character_tokenizer

    tokenizer = character_tokenizer("0123456789+-*=>")
    set_seed(3407)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None, initializer_range=0.2,
        )
    )  # fmt: skip

    def even_digits(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]

    with tempfile.TemporaryDirectory() as folder, memhead_trl.install(impl):
        settings = GRPOConfig(
            folder, max_steps=10, per_device_train_batch_size=16, num_generations=8, max_completion_length=8,
            num_iterations=2, learning_rate=1e-3, logging_steps=1, report_to="none", save_strategy="no",
            disable_tqdm=True, use_cpu=True, bf16=False, gradient_checkpointing=False,
        )  # fmt: skip
        data = Dataset.from_dict({"prompt": [f"{i:02d}>" for i in range(64)]})
        trainer = GRPOTrainer(model, even_digits, settings, data, processing_class=tokenizer)
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    parameters = [p.detach() for p in model.parameters()]
    return [entry["loss"] for entry in history], [entry["reward"] for entry in history], parameters


def grpo_lines() -> list[Line]:
    """One trajectory against the other, on the CPU, where both are deterministic."""
    (losses, rewards, ours), (plain_losses, plain_rewards, plain) = grpo("memhead"), grpo("full")
    loss_gap = max(abs(a - b) for a, b in zip(losses, plain_losses, strict=True))
    gap = max(float((a - b).abs().max()) for a, b in zip(ours, plain, strict=True))
    same = rewards == plain_rewards
    text = f"rewards {'equal' if same else 'differ'}, losses to {loss_gap:.1e}, parameters to {gap:.1e}"
    met = same and loss_gap <= 1e-6 and gap <= 1e-5
    return [Line("GRPO, memhead against plain, 10 steps", '"consistent"', text, "equal trajectory", met)]


def markdown(lines: list[Line], header: str) -> str:
    """The table."""
    rows = [
        "# The proof of concept's tables, redone",
        "",
        header,
        "",
        "| what | old | ours | target | met |",
        "|---|---|---|---|---|",
    ]
    for line in lines:
        met = "" if line.met is None else "yes" if line.met else "no"
        rows.append(f"| {line.what} | {line.old} | {line.ours} | {line.target} | {met} |")
    return "\n".join(rows) + "\n"


def main(arguments: list[str] | None = None) -> list[Line]:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=tuple(SIZES), help="default: challenge on a GPU, cpu elsewhere")
    parser.add_argument("--output", type=Path, help="where to store, without suffix")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    name = options.size or ("challenge" if device.type == "cuda" else "cpu")
    size = SIZES[name]
    lines = head_lines(size, device) + supervised_lines(size, device) + grpo_lines()
    header = (
        f"{machine(device)}; size `{name}`: {size.batch} x {size.tokens} tokens, hidden {size.hidden}, vocabulary "
        f"{size.vocab}; {', '.join(f'{k} {v}' for k, v in versions('torch', 'transformers', 'trl').items())}"
    )
    stem = options.output or RESULTS / f"seed_{device.type}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(
        json.dumps({"machine": header, "lines": [line._asdict() for line in lines]}, indent=1) + "\n"
    )
    stem.with_suffix(".md").write_text(markdown(lines, header))
    print(markdown(lines, header))
    return lines


if __name__ == "__main__":
    main()
