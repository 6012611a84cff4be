"""Ratios under truncated sampling: unbiased over the sampler's support, biased over the whole vocabulary."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from test_vllm_engine import trainer_of as vllm_trainer_of
from tiny import saved_llama
from transformers import LlamaForCausalLM, set_seed
from trl import GRPOConfig, GRPOTrainer
from vllm_colocated import vllm_stand_in

from memhead.integrations import trl as memhead_trl
from memhead.ragged_support import Truncation
from recipes.config.load import load_config
from recipes.problems import ConfigError
from recipes.training.checkpoints import guarded
from recipes.training.packed_step import packed
from recipes.training.truncation import supported, truncation_of

CONFIG = Path(__file__).parents[3] / "configs" / "llama3.2_1b_gsm8k.yaml"
CUT = {"top_p": Truncation(top_p=0.8), "top_k": Truncation(top_k=5), "min_p": Truncation(min_p=0.4)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    tokenizer = saved_llama(place, initializer_range=0.3)
    return place, tokenizer


class Recorder(GRPOTrainer):
    """Keeps, of each loss, new minus old log-probability of the completion tokens."""

    def _compute_loss(self, model, inputs):
        seen = []
        compute = type(self)._get_per_token_logps_and_entropies

        def recording(*args, **kwargs):
            found = compute(self, *args, **kwargs)
            seen.append(found[0].detach())
            return found

        self._get_per_token_logps_and_entropies = recording
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            del self._get_per_token_logps_and_entropies
        old = inputs.get("old_per_token_logps")
        old = seen[0] if old is None else old
        self.ratios.append((seen[0] - old)[inputs["completion_mask"].bool()].exp())
        return loss


def ratios(saved, folder, truncation, wrap, head="memhead", **overrides):
    """Of both updates of each rollout: the second has completions that the first one did not see."""
    place, tokenizer = saved
    set_seed(0)
    settings = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 128, "num_generations": 8,
        "steps_per_generation": 2, "gradient_accumulation_steps": 1, "max_completion_length": 8, "learning_rate": 2e-2,
        "logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "save_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "constant",
        **{name: value for name, value in vars(truncation).items() if value is not None},
    }  # fmt: skip
    with memhead_trl.install(head):
        trainer = guarded(wrap(supported(Recorder, truncation if head == "memhead" else None)))(
            model=LlamaForCausalLM.from_pretrained(place),
            reward_funcs=[lambda completion_ids, **_: [float(5 in ids) for ids in completion_ids]],
            args=GRPOConfig(**{**settings, **overrides}),
            train_dataset=Dataset.from_dict({"prompt": [f"{i:02d}>"[i % 2 :] for i in range(64)]}),
            processing_class=tokenizer,
        )
        trainer.ratios = []
        trainer.train()
        assert memhead_trl.installed().truncated is None
    return trainer.ratios


def deviations(values):
    """Of the mean from 1, in standard errors."""
    return float((values.mean() - 1).abs() / (values.std() / len(values) ** 0.5))


@pytest.mark.parametrize(
    ("cut", "wrap"),
    [("top_p", lambda kind: kind), ("top_p", packed), ("top_k", packed), ("min_p", packed)],
    ids=["top_p-trl", "top_p", "top_k", "min_p"],
)
def test_the_mean_ratio_is_one(saved, tmp_path, wrap, cut):
    # With groups left out for lack of a gradient the packed step's would be 1 by decree.
    found = ratios(saved, tmp_path, CUT[cut], wrap, entropy_coef=1e-6)
    first, second = torch.cat(found[0::2]), torch.cat(found[1::2])
    torch.testing.assert_close(first, torch.ones_like(first), rtol=0, atol=0 if wrap is packed else 1e-4)
    assert len(second) > 1000
    assert second.std() > 0.05  # the policy has moved
    assert deviations(second) < 3.5


def test_over_the_whole_vocabulary_it_is_not(saved, tmp_path):
    """TRL's way, by the plain baseline."""
    found = ratios(
        saved, tmp_path, CUT["top_p"], lambda kind: kind, head="full", per_device_train_batch_size=256
    )
    assert deviations(torch.cat(found[1::2])) > 6


def test_packed_and_trls_step_agree(saved, tmp_path):
    """One micro-batch a rollout, used twice: the same rows, in another order."""
    settings = {"num_iterations": 2, "steps_per_generation": 1, "entropy_coef": 1e-6, "max_steps": 4}
    settings |= {"per_device_train_batch_size": 64, "learning_rate": 1e-3}
    theirs, ours = (
        ratios(saved, tmp_path, CUT["top_p"], wrap, **settings) for wrap in (lambda kind: kind, packed)
    )
    for one, two in zip(theirs, ours, strict=True):
        torch.testing.assert_close(one.sort().values, two.sort().values, rtol=1e-3, atol=1e-3)
    assert ours[1].std() > 0.005


@pytest.mark.parametrize("wrap", [lambda kind: kind, packed], ids=["trl", "packed"])
def test_vllms_log_probabilities_are_over_the_same_tokens(saved, tmp_path, wrap):
    def difference(head, truncation):
        with memhead_trl.install(head), vllm_stand_in():
            kind = wrap(supported(GRPOTrainer, truncation))
            trainer = vllm_trainer_of(saved, tmp_path, kind, lora=False, top_p=0.8, learning_rate=1e-3)
            trainer.train()
        entries = [entry for entry in trainer.state.log_history if "reward" in entry]
        return [entry["sampling/sampling_logp_difference/max"] for entry in entries]

    assert max(difference("memhead", CUT["top_p"])) < 1e-4
    assert min(difference("full", None)) > 0.05


def test_when_the_run_truncates():
    assert truncation_of(load_config(CONFIG)) is None
    cut = ["grpo.top_p=0.9", "grpo.top_k=20", "grpo.min_p=0.05"]
    assert truncation_of(load_config(CONFIG, cut)) == Truncation(top_k=20, top_p=0.9, min_p=0.05)
    assert truncation_of(load_config(CONFIG, [*cut, "head.impl=full"])) is None
    unsloths = load_config(CONFIG, cut)
    model = unsloths.model.model_copy(update={"loader": "unsloth"})
    assert truncation_of(unsloths.model_copy(update={"model": model})) is None
    assert supported(GRPOTrainer, None) is GRPOTrainer


def test_what_is_not_combined_with_it():
    with pytest.raises(ConfigError, match=r"grpo\.beta: .*truncated"):
        load_config(CONFIG, ["grpo.top_p=0.9", "grpo.beta=0.01"])
    with pytest.raises(ConfigError, match=r"grpo\.min_p: vLLM applies it before top_p"):
        load_config(CONFIG, ["grpo.top_p=0.9", "grpo.min_p=0.1", "grpo.use_vllm=true"])
    load_config(CONFIG, ["grpo.top_p=0.9", "grpo.beta=0.01", "head.impl=full"])


def test_a_head_that_cannot():
    hidden, weight = torch.randn(3, 4), torch.randn(7, 4)
    with memhead_trl.install() as handle:
        from trl.trainer import utils

        from memhead.integrations.handle import Truncated

        handle.truncated = Truncated(Truncation(top_k=2))
        with pytest.raises(ValueError, match="not combined with is_top1"):
            utils._ChunkedLogProbFunction.apply(
                hidden, weight, None, torch.zeros(3, dtype=torch.long), 1.0, 1, None, 1.0, ("is_top1",)
            )
