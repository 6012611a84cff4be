"""A real GRPOTrainer of TRL, guarded as a run's is, on a Llama of a few thousand parameters."""

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, set_seed
from trl import GRPOConfig, GRPOTrainer

from recipes.models.manifest import seal
from recipes.models.tokenizers import character_tokenizer
from recipes.training.checkpoints import guarded


def digits_reward(completions, **kwargs):
    """The share of a completion's characters that are even digits."""
    return [sum(c in "02468" for c in text) / max(len(text), 1) for text in completions]


def length_reward(completions, **kwargs):
    """Longer is a little better."""
    return [0.01 * len(text) for text in completions]


def tiny_trainer(
    folder, *, hidden=32, layers=2, steps=6, seed=0, peft_config=None, kind=GRPOTrainer, **overrides
):
    """A trainer that runs on CPU in seconds once memhead is in TRL's slot; `overrides` are GRPOConfig's."""
    set_seed(seed)
    tokenizer = character_tokenizer("0123456789+-*=>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).to(torch.float32)
    settings = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": seed,
    }
    return guarded(kind)(
        model=model,
        reward_funcs=[digits_reward, length_reward],
        args=GRPOConfig(**{**settings, **overrides}),
        train_dataset=Dataset.from_dict({"prompt": [f"{i:02d}>" for i in range(64)]}),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def saved_llama(place, **shape):
    """A tiny Llama in float32 and its tokenizer, saved in `place`; `shape` is LlamaConfig's. Returns the tokenizer."""
    torch.manual_seed(0)
    tokenizer = character_tokenizer("0123456789+-*=>")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, **shape,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return tokenizer


def made_up_checkpoint(run, step):
    """A checkpoint of the run folder that is whole, as far as one can see from outside."""
    place = run / "checkpoints" / f"checkpoint-{step}"
    place.mkdir(parents=True)
    (place / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (place / name).write_text(name)
    seal(place)
    return place
