"""Real GRPO runs of TRL on models of a few thousand parameters, short enough to run hundreds of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PretrainedConfig, set_seed
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from memhead.integrations import trl as memhead_trl
from recipes.models.tokenizers import character_tokenizer

CHARACTERS = "0123456789+-*=>"
TOKENIZER = character_tokenizer(CHARACTERS)
PROMPTS = [f"{i:02d}>" for i in range(32)]
SMALL = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": TOKENIZER.pad_token_id,
    "eos_token_id": TOKENIZER.eos_token_id,
    "bos_token_id": None,
    # Wide enough for a policy that is far from uniform, so that what a head gets wrong shows.
    "initializer_range": 0.3,
}


def configurations() -> dict[str, PretrainedConfig]:
    """A tiny config of every kind of head: plain, tied, scaled, divided, capped, with bias."""
    grouped = SMALL | {"num_key_value_heads": 1}
    return {
        "llama": transformers.LlamaConfig(**grouped),
        "qwen2-tied": transformers.Qwen2Config(**grouped, tie_word_embeddings=True),
        "mistral": transformers.MistralConfig(**grouped),
        "gemma2-softcap": transformers.Gemma2Config(
            **grouped, head_dim=8, final_logit_softcapping=2.0, query_pre_attn_scalar=8
        ),
        "cohere-scale-tied": transformers.CohereConfig(**grouped, logit_scale=0.25),
        "granite-divisor": transformers.GraniteConfig(**grouped, logits_scaling=3.0),
        "falcon-h1-multiplier": transformers.FalconH1Config(
            **grouped, lm_head_multiplier=0.3, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_d_state=4,
            mamba_n_groups=1, mamba_chunk_size=4,
        ),
        "phi-bias": transformers.PhiConfig(**grouped),
        "gpt2": transformers.GPT2Config(
            vocab_size=SMALL["vocab_size"], n_embd=16, n_layer=1, n_head=2, n_positions=32,
            pad_token_id=SMALL["pad_token_id"], eos_token_id=SMALL["eos_token_id"], bos_token_id=None,
            initializer_range=0.3,
        ),
    }  # fmt: skip


def save_model(name: str, folder) -> str:
    """A checkpoint of random weights, its head's bias included, under ``folder``."""
    set_seed(1)
    model = AutoModelForCausalLM.from_config(configurations()[name], dtype=torch.float32)
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias, std=0.5)
    path = folder / name
    model.save_pretrained(path)
    return str(path)


def reward(completion_ids, **kwargs):
    """A reward that differs within every group: the share of even tokens, the first counting most."""
    return [sum((token % 2 == 0) / (1 + i) for i, token in enumerate(ids)) for ids in completion_ids]


class Trajectory(NamedTuple):
    """The losses and rewards of a run, and the parameters at its end."""

    losses: list[float]
    rewards: list[float]
    parameters: dict[str, torch.Tensor]
    calls: int
    history: list[dict]


class RecordingTrainer(GRPOTrainer):
    """TRL's trainer rounds the losses it logs; this one keeps them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.losses.append(loss.item())
        return loss


class PlainTrainer(RecordingTrainer):
    """Log-probabilities and entropies from the model's own logits, past TRL's fused head and ours."""

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **kwargs
    ):
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -logits_to_keep - 1 : -1]
        logp = (logits / self.temperature).log_softmax(-1)
        scored = attention_mask[:, -logits_to_keep:].bool()
        chosen = logp.gather(2, input_ids[:, -logits_to_keep:, None]).squeeze(2)
        entropy = -(logp.exp() * logp).sum(-1)
        return chosen.where(scored, 0.0), entropy.where(scored, 0.0), None


def make_trainer(
    path, folder, *, lora=None, trainer=RecordingTrainer, model=None, **overrides
) -> GRPOTrainer:
    """A trainer of the checkpoint at ``path``; ``lora`` is a LoraConfig, or True for one on the attention."""
    set_seed(0)
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 5,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "model_init_kwargs": {"dtype": "float32"} if model is None else None,
    }
    if lora is True:
        lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    made = trainer(
        model=model or path,
        reward_funcs=reward,
        args=GRPOConfig(**{**settings, **overrides}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=TOKENIZER,
        peft_config=lora or None,
    )
    made.remove_callback(PrinterCallback)
    return made


def train(path, folder, impl="memhead", **settings) -> Trajectory:
    """Run ``make_trainer(path, folder, **settings)`` with ``impl`` as its head."""
    with memhead_trl.install(impl, chunk=(7, 5) if impl == "memhead" else None) as handle:
        trainer = make_trainer(path, folder, **settings)
        trainer.train()
    return Trajectory(
        trainer.losses,
        [entry["reward"] for entry in trainer.state.log_history if "reward" in entry],
        {name: p.detach().clone() for name, p in trainer.model.named_parameters()},
        handle.calls,
        trainer.state.log_history,
    )


def assert_same_trajectory(
    ours: Trajectory, plain: Trajectory, *, loss: float, loss_floor: float, parameters: float
) -> None:
    """Rewards equal, losses within ``loss`` times their size or ``loss_floor``, parameters within ``parameters``."""
    assert ours.rewards == plain.rewards
    assert len(ours.losses) == len(plain.losses) > 0
    for a, b in zip(ours.losses, plain.losses, strict=True):
        assert abs(a - b) <= loss * max(abs(b), loss_floor)
    assert ours.parameters.keys() == plain.parameters.keys()
    for name, value in plain.parameters.items():
        difference = (ours.parameters[name] - value).abs().max().item()
        assert difference <= parameters, f"{name} differs by {difference}"
