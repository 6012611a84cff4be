"""Cases for test_unsloth.py, which runs them in a separate process: importing unsloth changes TRL permanently."""

from __future__ import annotations

import os

os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"

import unsloth  # isort: skip  # before trl
import gc

import pytest
import torch
import transformers
import trl
from grpo_runs import PROMPTS, TOKENIZER, Trajectory, assert_same_trajectory, reward, save_model
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback
from unsloth_zoo import rl_replacements

from memhead.integrations import unsloth as memhead_unsloth

from datasets import Dataset  # isort: skip


@pytest.fixture(scope="session", autouse=True)
def _quick():
    transformers.utils.logging.disable_progress_bar()
    gc.freeze()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    path = save_model("llama", folder)
    TOKENIZER.save_pretrained(path)
    return path


class RecordingTrainer(trl.GRPOTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.losses.append(loss.item())
        return loss


def train(path, folder, impl, **overrides) -> Trajectory:
    """Ten steps of LoRA on the model that Unsloth loads, through the trainer that Unsloth leaves in trl."""
    settings = {
        "output_dir": str(folder), "max_steps": 10, "per_device_train_batch_size": 8, "num_generations": 4,
        "max_completion_length": 5, "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant",
        "logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False, "fp16": False, "save_strategy": "no",
        "disable_tqdm": True, "num_iterations": 2, "beta": 0.04, "gradient_checkpointing": False,
    }  # fmt: skip
    config = trl.GRPOConfig(**{**settings, **overrides})
    with memhead_unsloth.install(impl, args=config, chunk=(7, 5) if impl == "memhead" else None) as handle:
        set_seed(0)
        model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
            path, max_seq_length=32, dtype=torch.float32, load_in_4bit=False
        )
        model = unsloth.FastLanguageModel.get_peft_model(
            model, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], random_state=1
        )
        tokenizer.padding_side = "left"
        trainer = RecordingTrainer(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return Trajectory(
        trainer.losses,
        [entry["reward"] for entry in trainer.state.log_history if "reward" in entry],
        {name: p.detach().clone() for name, p in trainer.model.named_parameters()},
        handle.calls,
        trainer.state.log_history,
    )


def test_ten_steps_equal_unsloths_own_head(checkpoint, tmp_path):
    own = train(checkpoint, tmp_path, "trl")
    ours = train(checkpoint, tmp_path, "memhead")
    assert_same_trajectory(ours, own, loss=1e-6, loss_floor=1.0, parameters=1e-6)
    assert ours.calls == own.calls == 20  # five generations: old and reference; ten losses
    adapters = [name for name in ours.parameters if "lora_B.default" in name]
    assert len(adapters) == 3
    assert all(ours.parameters[name].abs().max() > 1e-3 for name in adapters)


def draw(hidden_dtype, weight_dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 16, generator=generator).to(hidden_dtype)
    weight = (torch.randn(101, 16, generator=generator) / 2).to(weight_dtype)
    index = torch.randint(101, (2, 9), generator=generator)
    return hidden.requires_grad_(), weight, index


OPTIONS = [
    {},
    {"temperature": 0.7},
    {"logit_softcapping": 3.0, "temperature": 1.3},
    {"logit_scale_multiply": 0.5},
    {"logit_scale_divide": 3.0},
    {"chunks": 2, "max_rows_per_chunk": 4},
    {"lm_head_bias": torch.linspace(-1, 1, 101)},
    {"support_top_k": 0, "support_top_p": 1.0, "support_min_p": 0.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
def test_scorer_equals_unsloths(options, dtypes):
    """The function that its generated trainer calls, with the arguments that it passes."""
    results = []
    for impl in ("trl", "memhead", "full"):
        hidden, weight, index = draw(*dtypes)
        with memhead_unsloth.install(impl) as handle:
            logprobs = getattr(rl_replacements, memhead_unsloth.SCORER)(hidden, weight, index, **options)
        assert handle.calls == 1
        assert handle.rows == 18
        (grad,) = torch.autograd.grad((logprobs * torch.linspace(-1, 1, 18).view(2, 9)).sum(), hidden)
        results.append((logprobs, grad))
    for logprobs, grad in results[1:]:
        assert logprobs.shape == (2, 9)
        assert logprobs.dtype == torch.float32
        torch.testing.assert_close(logprobs, results[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            grad, results[0][1], rtol=2e-2 if grad.dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )


def test_scorer_refuses_by_name():
    with memhead_unsloth.install(), pytest.raises(TypeError, match="unheard_of"):
        getattr(rl_replacements, memhead_unsloth.SCORER)(*draw(torch.float32, torch.float32), unheard_of=3)


@pytest.mark.parametrize(
    "options",
    [{"support_top_k": 5}, {"support_min_p": 0.1}, {"support_excluded_ids": torch.tensor([3, 7])}],
    ids=str,
)
def test_over_what_truncation_leaves_unsloths_own_head_scores(options):
    """As without memhead, and says so; it is counted."""
    given = draw(torch.float32, torch.float32)
    expected = getattr(rl_replacements, memhead_unsloth.SCORER)(*given, **options)
    with (
        memhead_unsloth.install() as handle,
        pytest.warns(UserWarning, match="by its own head, not by memhead"),
    ):
        found = getattr(rl_replacements, memhead_unsloth.SCORER)(*given, **options)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)
    assert handle.calls == 1


def test_uninstall_restores():
    scorer, slot = getattr(rl_replacements, memhead_unsloth.SCORER), trl.trainer.utils._ChunkedLogProbFunction
    with memhead_unsloth.install():
        assert getattr(rl_replacements, memhead_unsloth.SCORER) is not scorer
        assert trl.trainer.utils._ChunkedLogProbFunction is not slot
    assert getattr(rl_replacements, memhead_unsloth.SCORER) is scorer
    assert trl.trainer.utils._ChunkedLogProbFunction is slot


def test_bypasses_are_refused_by_name(monkeypatch, tmp_path):
    def config(**options):
        return trl.GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)

    for options in ({"entropy_coef": 0.1}, {"top_entropy_quantile": 0.2}):
        memhead_unsloth.refuse_bypasses(config(**options))  # the CPU backend's trainer is TRL's: no bypass
    monkeypatch.setattr(unsloth, "DEVICE_TYPE", "cuda")
    memhead_unsloth.refuse_bypasses(config())
    for options in ({"entropy_coef": 0.1}, {"top_entropy_quantile": 0.2}):
        (name,) = options
        with pytest.raises(ValueError, match=rf"grpo\.{name}={options[name]}"):
            memhead_unsloth.install(args=config(**options))
    monkeypatch.setenv("UNSLOTH_GRPO_LOGPROB_RECOMPUTE", "1")
    with pytest.raises(ValueError, match="UNSLOTH_GRPO_LOGPROB_RECOMPUTE=1"):
        memhead_unsloth.install()
    memhead_unsloth.install("trl").uninstall()  # Unsloth's own head may do as it likes
