"""PackedGRPOTrainer in a script: TRL's losses, what a script may do with it, and where it takes TRL's step."""

from __future__ import annotations

import math
import warnings

import pytest
import script_on_ranks
import torch
from datasets import Dataset, IterableDataset
from launched import torchrun
from peft import LoraConfig, get_peft_model
from rollouts import WIDTH, model_of
from test_packed_runs import reward
from tiny import saved_llama
from transformers import ProcessorMixin, TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer
from trl.trainer.utils import pad
from vllm_colocated import vllm_stand_in

from memhead.integrations import trl as memhead_trl
from recipes import packed_trainer
from recipes.models.tokenizers import character_tokenizer
from recipes.packed_trainer import PackedGRPOTrainer
from recipes.training import packed_attention, step_check
from recipes.training.generation_batches import ReadOnce
from recipes.training.packed_step import PackedStep
from recipes.training.packing import measure
from recipes.training.rollout import _shuffled, padded

PROMPTS = [f"{n}+{n % 3}=" for n in range(32)]


@pytest.fixture(autouse=True)
def _head_as_it_was():
    yield
    if (handle := memhead_trl.installed()) is not None:
        handle.uninstall()


def even(completion_ids, **_):
    """A second reward, with which advantages differ within most groups."""
    return [0.1 * (len(ids) % 2) for ids in completion_ids]


def made(kind, folder, model=None, script=None, **settings):
    """A trainer as a script makes it. script: what the trainer takes beside its GRPOConfig."""
    set_seed(0)
    arguments = {
        "max_steps": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1,
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_generations": 4,
        "max_completion_length": WIDTH, "report_to": "none", "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    return kind(
        model=model_of("llama").float() if model is None else model,
        args=GRPOConfig(str(folder), **{**arguments, **settings}),
        **{
            "reward_funcs": [reward, even],
            "train_dataset": Dataset.from_dict({"prompt": PROMPTS}),
            "processing_class": character_tokenizer("0123456789+-*=>abcdef"),
            **(script or {}),
        },
    )


def history(trainer):
    """Entries of the steps, whose losses are those of whole accumulation windows, and of the evaluations."""
    entries = trainer.state.log_history
    return [e for e in entries if "loss" in e], [e for e in entries if "eval_loss" in e]


def compared(ours, theirs, *, exact=True):
    """TRL's figures of each step are the same; the packed step's are beside them, and nothing else.

    exact: of the rewards, where no log-probability is in them.
    """
    for mine, other in zip(ours, theirs, strict=True):
        assert set(mine) - set(other) == {"step/tokens_computed", "step/tokens_real", "step/left_out"}
        for name in other:
            if name.startswith(("reward", "completions")):
                assert mine[name] == (other[name] if exact else pytest.approx(other[name], rel=1e-4)), name
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5, abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3, abs=1e-5)


def same_weights(ours, theirs):
    for (name, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4, msg=name)


def lora():
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"])


class Streamed:
    """Rows one after another."""

    def __iter__(self):
        return iter({"prompt": prompt} for prompt in PROMPTS)


def messages():
    """Prompts as chat messages."""
    tokenizer = character_tokenizer("0123456789+-*=>abcdef")
    tokenizer.chat_template = "{% for message in messages %}>{{ message.content }}{% endfor %}="
    rows = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    return {"processing_class": tokenizer, "train_dataset": Dataset.from_dict({"prompt": rows})}


CASES = {
    "plain": (dict, {}),
    "lora, its head's too": (lambda: {"peft_config": lora()}, {}),
    "two iterations": (dict, {"num_iterations": 2}),
    "a micro-batch is half a group": (dict, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}),
    "unused columns": (
        lambda: {"train_dataset": Dataset.from_dict({"prompt": PROMPTS, "note": PROMPTS})},
        {"remove_unused_columns": True},
    ),
    "streamed": (lambda: {"train_dataset": IterableDataset.from_generator(lambda: iter(Streamed()))}, {}),
    "small bins": (dict, {}),
    "messages": (messages, {}),
    "checkpointed": (dict, {"gradient_checkpointing": True}),
    "checkpointed, lora": (lambda: {"peft_config": lora()}, {"gradient_checkpointing": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_steps_are_trls(tmp_path, name):
    script, settings = CASES[name]
    budget = {"token_budget": 60} if name == "small bins" else {}
    ours = made(PackedGRPOTrainer, tmp_path, script={**script(), **budget}, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours.train()
    assert ours.why_not_packed is None
    assert isinstance(ours, PackedStep)
    assert type(ours).__name__ == "PackedGRPOTrainer"
    assert ours.step_check["passed"]
    assert ours.step_check["rows"] == 6  # of two prompts: of one there would be no padding on the left
    assert memhead_trl.installed().calls > 0  # LoRA on the head included, which TRL alone refuses
    theirs = made(GRPOTrainer, tmp_path, script=script(), **settings)
    theirs.train()
    steps, expected = history(ours)[0], history(theirs)[0]
    compared(steps, expected)
    same_weights(ours.model, theirs.model)
    assert all(0 < step["step/tokens_computed"] < step["step/tokens_real"] for step in steps)
    assert any(step["grad_norm"] > 0.1 for step in steps)
    assert ours.args.gradient_accumulation_steps == settings.get("gradient_accumulation_steps", 2)


BY_MICRO_BATCH = [
    {"loss_type": "bnpo"},
    {"entropy_coef": 0.05},
    {"top_entropy_quantile": 0.3, "num_iterations": 2},
    {"steps_per_generation": 4, "num_iterations": 2},
    {"steps_per_generation": 2, "gradient_accumulation_steps": 3, "max_steps": -1, "num_train_epochs": 2},
]


@pytest.mark.parametrize("settings", BY_MICRO_BATCH, ids=str)
def test_where_micro_batches_matter_they_are_all_that_differs(tmp_path, monkeypatch, settings):
    """With its groups kept together TRL's trainer has the same ones, and the same losses."""

    def by_group(batch):
        order = _shuffled(measure(padded(batch)).group)
        return {n: x[order] if isinstance(x, torch.Tensor) and x.ndim > 0 else x for n, x in batch.items()}

    monkeypatch.setattr(grpo_trainer, "shuffle_sequence_dict", by_group)
    found = []
    for kind in (PackedGRPOTrainer, GRPOTrainer):
        trainer = made(kind, tmp_path, script={"reward_funcs": unlike}, **settings)
        trainer.train()
        found.append(trainer)
    assert isinstance(found[0], PackedStep)
    compared(*(history(trainer)[0] for trainer in found))


@pytest.mark.parametrize("window", [1, 2])
def test_adapters_that_a_model_comes_with_and_their_reference(tmp_path, window):
    """The figure kl is a mean of micro-batches' means: TRL's own where there is one, and near it where groups are
    shuffled in the place of completions."""
    found = []
    for kind in (PackedGRPOTrainer, GRPOTrainer):
        set_seed(3)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
        model = get_peft_model(model_of("llama").float(), config)
        sizes = {"gradient_accumulation_steps": window, "per_device_train_batch_size": 16 // window}
        trainer = made(kind, tmp_path, model=model, beta=0.1, **sizes)
        trainer.train()
        found.append(history(trainer)[0])
    compared(*found)
    for mine, other in zip(*found, strict=True):
        for name in ("kl", "entropy"):
            assert mine[name] == pytest.approx(other[name], rel=1e-3 if window == 1 else 0.1, abs=1e-6), name
    assert found[0][-1]["kl"] > 1e-3


def test_rows_without_an_advantage_are_left_out(tmp_path):
    ours = made(PackedGRPOTrainer, tmp_path, script={"reward_funcs": reward})
    ours.train()
    assert any(step["step/left_out"] > 0 for step in history(ours)[0])


class Counted(TrainerCallback):
    def __init__(self):
        self.ended = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.ended += 1


def test_evaluations_and_callbacks_are_trls(tmp_path):
    found, counts = [], []
    for kind in (PackedGRPOTrainer, GRPOTrainer):
        counts.append(Counted())
        script = {"eval_dataset": Dataset.from_dict({"prompt": PROMPTS[:8]}), "callbacks": [counts[-1]]}
        settings = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8}
        trainer = made(kind, tmp_path, script=script, **settings)
        before = trainer.evaluate()  # TRL's, as train() has not chosen yet
        trainer.train()
        after = trainer.evaluate()
        found.append((before, *history(trainer)[1], after))
    assert [count.ended for count in counts] == [4, 4]
    assert len(found[0]) == 5  # before, two within training, after as logged and as returned
    for mine, other in zip(*found, strict=True):
        assert set(mine) == set(other)
        assert mine["eval_reward"] == other["eval_reward"]
        assert mine["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-5, abs=1e-5)
        assert mine["eval_entropy"] == pytest.approx(other["eval_entropy"], rel=1e-4)


def test_a_resumed_training_goes_on_as_it_would_have(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole = made(PackedGRPOTrainer, tmp_path / "whole", **settings)
    whole.train()
    resumed = made(PackedGRPOTrainer, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert isinstance(resumed, PackedStep)
    steps, expected = (history(trainer)[0][2:] for trainer in (resumed, whole))
    assert [step["step"] for step in steps] == [3, 4]
    for mine, other in zip(steps, expected, strict=True):
        timed = {name for name in other if "time" in name}
        assert {n: x for n, x in mine.items() if n not in timed} == {
            n: x for n, x in other.items() if n not in timed
        }
    for mine, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def scripts_own(base):
    """What people change: advantages, the step around its loss, the log, how a reward is called."""

    class Own(base):
        def __init__(self, *args, scale, **kwargs):
            super().__init__(*args, **kwargs)
            self.scale, self.seen, self.logged = scale, [], 0

        def _calculate_rewards(self, inputs, *args, **kwargs):
            return self.scale * super()._calculate_rewards(inputs, *args, **kwargs)

        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            output["advantages"] = output["advantages"].clamp(-1.0, 1.0)
            return output

        def training_step(self, model, inputs, num_items_in_batch=None):
            self.seen.append(inputs[0]["prompt"])
            return super().training_step(model, inputs, num_items_in_batch)

        def log(self, logs, *args, **kwargs):
            self.logged += 1
            super().log(logs, *args, **kwargs)

    return Own


def test_a_subclass_keeps_what_is_its_own(tmp_path):
    made_by = [
        made(scripts_own(base), tmp_path, script={"scale": 3.0}) for base in (PackedGRPOTrainer, GRPOTrainer)
    ]
    for trainer in made_by:
        set_seed(0)
        trainer.train()
    ours, theirs = made_by
    assert isinstance(ours, PackedStep)
    compared(history(ours)[0], history(theirs)[0])
    assert type(ours).__qualname__ == "scripts_own.<locals>.Own"
    assert ours.seen == theirs.seen
    assert len(ours.seen) == 8
    assert ours.logged == theirs.logged == 5
    assert (
        max(step["reward"] for step in history(ours)[0]) > 1.1
    )  # what a reward without the scale is at most


def prefixes(base):
    """Prompts that are changed in place, as by a script that adds an instruction."""

    class Prefixes(base):
        def _generate_and_score_completions(self, inputs):
            for row in inputs:
                row["prompt"] = "=" + row["prompt"]
            return super()._generate_and_score_completions(inputs)

    return Prefixes


def collates(base):
    class Collates(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.data_collator = lambda rows: [{**row, "prompt": "=" + row["prompt"]} for row in rows]

    return Collates


def drawn():
    """Rows that are another at each read."""
    rows = Dataset.from_dict({"prompt": PROMPTS[:4]})
    rows.set_transform(lambda batch: {"prompt": [f"{p}{int(torch.randint(9, ()))}" for p in batch["prompt"]]})
    return rows


ROWS = {
    "changed in place": (prefixes, lambda: Dataset.from_dict({"prompt": PROMPTS[:4]})),
    "a collator of its own": (collates, lambda: Dataset.from_dict({"prompt": PROMPTS})),
    "drawn at each read": (lambda base: base, drawn),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_trls_whatever_a_script_does_with_them(tmp_path, name):
    """Of a few prompts in order, of which every generation has all."""
    script, rows = ROWS[name]
    found = []
    for base in (PackedGRPOTrainer, GRPOTrainer):
        trainer = made(script(base), tmp_path, script={"train_dataset": rows()}, shuffle_dataset=False)
        if base is PackedGRPOTrainer:
            trainer._choose_step()  # which reads two rows
            trainer._chosen = True
        set_seed(1)
        trainer.train()
        found.append(trainer)
    assert isinstance(found[0], PackedStep)
    compared(*(history(trainer)[0] for trainer in found))


def of_its_own(name):
    """A subclass that only hands the method on."""

    def method(self, *args, **kwargs):
        return getattr(super(kind, self), name)(*args, **kwargs)

    kind = type("Mine", (PackedGRPOTrainer,), {name: method})
    return kind


def own_inputs():
    """A training_step as transformers has it, which looks at what it computes the loss of."""

    class Mine(PackedGRPOTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            inputs = self._prepare_inputs(inputs)
            assert inputs["completion_ids"].ndim == 2
            loss = self.compute_loss(model, inputs)
            self.accelerator.backward(loss)
            self._step += 1
            return loss.detach()

    return Mine


def named(*, method=None, attribute=None):
    class Mine(PackedGRPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if attribute:
                setattr(self, attribute, [])

    if method:
        setattr(Mine, method, lambda self, text: len(text))
    return Mine


def set_on_it():
    """A loss that is put on the trainer and not into its class."""

    class Mine(PackedGRPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trls = self._compute_loss
            self._compute_loss = lambda model, inputs: 2 * trls(model, inputs)

    return Mine


def dropout():
    return LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1)


def saved(folder):
    """A model that TRL can load again as its reference."""
    model_of("llama").float().save_pretrained(folder / "model")
    return str(folder / "model")


FALL_BACKS = {
    "dropout": (lambda: (PackedGRPOTrainer, {"peft_config": dropout()}, {}), "lora.dropout is 0.1"),
    "noise": (lambda: (PackedGRPOTrainer, {}, {"neftune_noise_alpha": 5.0}), "neftune_noise_alpha adds noise"),
    "loss": (lambda: (of_its_own("_compute_loss"), {}, {}), "Mine has a _compute_loss of its own"),
    "inputs": (lambda: (of_its_own("_prepare_inputs"), {}, {}), "Mine has a _prepare_inputs of its own"),
    "step": (lambda: (own_inputs(), {}, {}), "calls _prepare_inputs and compute_loss itself"),
    "a loss set on it": (lambda: (set_on_it(), {}, {}), "_compute_loss has been set on the trainer"),
    "a name": (lambda: (named(method="_score"), {}, {}), "Mine has a _score of its own, a name that"),
    "a name set on it": (lambda: (named(attribute="_scores"), {}, {}), "Mine has a _scores of its own, a name that"),
    "a name of a run": (lambda: (named(attribute="truncation"), {}, {}), "Mine has a truncation of its own"),
}  # fmt: skip


def falls_back(trainer, reason):
    """It takes TRL's step and says why, once. What it logs of the steps."""
    with pytest.warns(UserWarning, match="so TRL's step is used") as said:
        trainer.train()
    (warned,) = [str(w.message) for w in said if "packed step" in str(w.message)]
    assert reason in warned
    assert "\n" not in warned
    assert [w.filename for w in said if "packed step" in str(w.message)] == [__file__]
    assert reason in trainer.why_not_packed
    assert not isinstance(trainer, PackedStep)
    steps = history(trainer)[0]
    assert "step/left_out" not in steps[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer.train()
    return steps


@pytest.mark.parametrize("name", FALL_BACKS)
def test_where_it_would_not_be_exact_the_step_is_trls(tmp_path, name):
    case, reason = FALL_BACKS[name]
    kind, script, settings = case()
    trainer = made(kind, tmp_path, script=script, max_steps=1, **settings)
    falls_back(trainer, reason)
    assert trainer.step_check is None
    assert type(trainer) is kind


def test_a_loss_that_a_script_puts_into_trls_class(tmp_path, monkeypatch):
    trls = GRPOTrainer._compute_loss
    trainer = made(PackedGRPOTrainer, tmp_path, max_steps=1)
    monkeypatch.setattr(
        GRPOTrainer, "_compute_loss", lambda self, model, inputs: 2 * trls(self, model, inputs)
    )
    falls_back(trainer, "PackedGRPOTrainer has a _compute_loss of its own")


def test_the_names_that_the_packed_step_keeps(tmp_path):
    """Each is looked for on a script's trainer before."""
    trainer = made(PackedGRPOTrainer, tmp_path, max_steps=1)
    before = set(vars(trainer))
    trainer.train()
    assert isinstance(trainer, PackedStep)
    new = set(vars(trainer)) - before
    assert {"_rollout", "_scores"} < new
    plain = made(GRPOTrainer, tmp_path, max_steps=1)
    plain.train()
    assert new - set(vars(plain)) <= packed_trainer._STATE


def test_an_architecture_that_is_not_known_to_be_exact(tmp_path):
    model = model_of("llama").float()
    model.config.model_type = "made-up"
    trainer = made(PackedGRPOTrainer, tmp_path, model=model, max_steps=1)
    falls_back(trainer, "the architecture made-up is not among those known to be exact")


def asks(base, *, by_sampling):
    """Log-probabilities where a script asks for them: before TRL's passes, in a reward, and what TRL's have found."""

    class Asks(base):
        found = 0

        def logps(self, prompts, completions):
            prompts, completions = ([torch.tensor(ids) for ids in some] for some in (prompts, completions))
            sides = list(zip((prompts, completions), ("left", "right"), strict=True))
            ids = torch.cat([pad(x, padding_value=0, padding_side=side) for x, side in sides], 1)
            ones = [([torch.ones_like(i) for i in x], side) for x, side in sides]
            masks = [pad(x, padding_value=0, padding_side=side) for x, side in ones]
            with torch.no_grad():
                kept = masks[1].shape[1]
                logps = self._get_per_token_logps_and_entropies(self.model, ids, torch.cat(masks, 1), kept)[0]
            return (logps * masks[1]).sum(1)

        def _generate(self, prompts):
            self.found += self.logps([[3, 4], [5]], [[6], [7, 8]]).sum().item()
            return super()._generate(prompts)

        def _calculate_rewards(self, inputs, prompts, completions, ids):
            own = self.logps(self._tokenize_prompts(prompts)[0], ids)
            return super()._calculate_rewards(inputs, prompts, completions, ids) + 0.01 * own[:, None]

    class Samples(Asks):
        def _generate_and_score_completions(self, inputs):
            self.found += self.logps([[3, 4]], [[6]]).sum().item()
            output = super()._generate_and_score_completions(inputs)
            self.found += sum(
                output[name].sum().item() for name in output if name.endswith("per_token_logps")
            )
            self.keys = set(output)
            return output

    return Samples if by_sampling else Asks


@pytest.mark.parametrize("by_sampling", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"beta": 0.1}, {"num_iterations": 2}, {"num_iterations": 2, "beta": 0.1}], ids=str
)
def test_log_probabilities_that_a_script_asks_for_while_sampling(tmp_path, settings, by_sampling):
    found = []
    for base in (PackedGRPOTrainer, GRPOTrainer):
        trainer = made(asks(base, by_sampling=by_sampling), tmp_path, model=saved(tmp_path), **settings)
        trainer.train()
        found.append(trainer)
    ours, theirs = found
    assert isinstance(ours, PackedStep)
    compared(history(ours)[0], history(theirs)[0], exact=False)
    assert ours.found == pytest.approx(theirs.found, rel=1e-4)
    assert not by_sampling or ours.keys == theirs.keys
    if settings.get("beta"):
        assert history(ours)[0][-1]["kl"] > 1e-3


def test_a_row_left_out_has_a_ratio_of_one_whatever_its_old_log_probabilities(tmp_path):
    class Half(PackedGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            output["advantages"][::2] = 0.0
            output["old_per_token_logps"][::2] = -100.0  # whose ratio to a log-probability of 0 is infinite
            return output

    trainer = made(Half, tmp_path, num_iterations=2, logging_nan_inf_filter=False)
    trainer.train()
    assert isinstance(trainer, PackedStep)
    for step in history(trainer)[0]:
        assert step["step/left_out"] > 0.4
        assert math.isfinite(step["loss"])
        assert math.isfinite(step["grad_norm"])


@pytest.mark.parametrize("option", packed_trainer._UNTESTED)
def test_options_that_nobody_has_tried(tmp_path, option):
    trainer = made(PackedGRPOTrainer, tmp_path)
    assert list(packed_trainer._of_the_script(trainer)) == []
    setattr(trainer.args, option, True)
    (reason,) = packed_trainer._of_the_script(trainer)
    assert reason.startswith(option)


@pytest.mark.parametrize(
    "name", ["_prepare_inputs", "_compute_loss", "compute_loss", "_get_per_token_logps_and_entropies"]
)
def test_a_method_of_the_scripts_own_that_the_step_goes_around(tmp_path, name):
    (reason,) = packed_trainer._of_the_script(made(of_its_own(name), tmp_path))
    assert reason == f"Mine has a {name} of its own, which the packed step would go around"


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("tools", [print], "tools writes"), ("rollout_func", print, "rollout_func writes"),
        ("environment_factories", {"a": print}, "environment_factory writes"),
        ("train_dataset", Dataset.from_dict({"prompt": ["a"], "image": ["b"]}), "images take"),
        ("processing_class", ProcessorMixin(), "images take"),
    ],
)  # fmt: skip
def test_what_a_script_gives_its_trainer_is_looked_at(tmp_path, attribute, value, reason):
    trainer = made(PackedGRPOTrainer, tmp_path)
    assert packed_trainer.ruled_out(packed_trainer._made_with(trainer)) is None
    setattr(trainer, attribute, value)
    assert packed_trainer.ruled_out(packed_trainer._made_with(trainer)).startswith(reason)


@pytest.mark.parametrize("name", [None, "training_step", "get_train_dataloader"])
def test_rows_are_read_once_unless_the_script_looks_at_them(tmp_path, name):
    trainer = made(PackedGRPOTrainer if name is None else of_its_own(name), tmp_path, max_steps=1)
    trainer.train()
    assert isinstance(trainer.get_train_dataloader().dataset, ReadOnce) == (name is None)


def test_a_small_budget_makes_more_bins(tmp_path):
    passes = []
    for budget in (None, 30):
        trainer = made(PackedGRPOTrainer, tmp_path, script={"token_budget": budget}, max_steps=1)
        passes.append(0)

        def count(*_):
            passes[-1] += 1

        trainer.model.model.register_forward_pre_hook(count)
        trainer.train()
    assert passes[1] > passes[0] > 0


def test_another_trl_is_not_packed(tmp_path, monkeypatch):
    monkeypatch.setattr(packed_trainer.trl, "__version__", "1.16.0")
    falls_back(made(PackedGRPOTrainer, tmp_path, max_steps=1), "methods of TRL 1.15.x, and this is 1.16.0")


def wrong_positions(monkeypatch):
    right = step_check.check_step

    def check(trainer, prompts):
        monkeypatch.setattr(packed_attention, "masks", all_see_all)
        return right(trainer, prompts)

    def all_see_all(packed, *rest):
        length = packed.source.shape[1]
        return torch.ones(len(packed.source), 1, length, length, dtype=torch.bool).tril()

    monkeypatch.setattr(step_check, "check_step", check)
    return "it disagrees with TRL's padded way on this model; trainer.step_check has the figures"


def no_kernel(monkeypatch):
    def check(*_):
        raise RuntimeError("no kernel for heads of 7\nmore")

    monkeypatch.setattr(step_check, "check_step", check)
    return "it does not run on this model: no kernel for heads of 7"


def no_reason(monkeypatch):
    def check(*_):
        raise AssertionError

    monkeypatch.setattr(step_check, "check_step", check)
    return "it does not run on this model: AssertionError"


@pytest.mark.parametrize("fault", [wrong_positions, no_kernel, no_reason])
def test_a_check_that_fails_leaves_the_script_its_trainer(tmp_path, monkeypatch, fault):
    reason = fault(monkeypatch)
    kind = scripts_own(PackedGRPOTrainer)
    trainer = made(kind, tmp_path, script={"scale": 1.0}, max_steps=2)
    steps = falls_back(trainer, reason)
    assert type(trainer) is kind
    assert not trainer.step_check["passed"]
    monkeypatch.undo()
    theirs = made(scripts_own(GRPOTrainer), tmp_path, script={"scale": 1.0}, max_steps=2)
    theirs.train()
    assert [step["loss"] for step in steps] == [step["loss"] for step in history(theirs)[0]]


def test_a_packed_step_that_is_required(tmp_path):
    trainer = made(PackedGRPOTrainer, tmp_path, script={"peft_config": dropout(), "require_packed": True})
    with pytest.raises(ValueError, match=r"the packed step would not be exact: lora.dropout is 0.1"):
        trainer.train()


@pytest.mark.parametrize("budget", [0, -1, 1.5, "16k"])
def test_a_budget_that_is_none(tmp_path, budget):
    with pytest.raises(ValueError, match=r"token_budget=.* is not a number of tokens"):
        made(PackedGRPOTrainer, tmp_path, script={"token_budget": budget})


def test_a_training_after_one_that_failed_leaves_no_row_out(tmp_path, monkeypatch):
    """In the middle of a window: the next begins one, with what was left of the generation."""

    class Fails(PackedGRPOTrainer):
        def training_step(self, *args):
            if self.state.global_step == 1 and self._step == 3 and not hasattr(self, "failed"):
                self.failed = True
                raise KeyboardInterrupt
            return super().training_step(*args)

    trainer = made(Fails, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    computed = []
    trls = PackedStep._score_bin

    def score(self, model, part, *, entropy):
        if entropy:
            computed.append(part.run)
        return trls(self, model, part, entropy=entropy)

    monkeypatch.setattr(PackedStep, "_score_bin", score)
    trainer.train()
    assert computed == [range(1, 2), range(1)] * 4  # the window is astride of generations, as TRL's is


def test_a_check_without_memory_is_the_scripts_error(tmp_path, monkeypatch):
    def check(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step_check, "check_step", check)
    trainer = made(PackedGRPOTrainer, tmp_path, max_steps=1)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    assert type(trainer) is PackedGRPOTrainer
    monkeypatch.undo()
    trainer.train()
    assert isinstance(trainer, PackedStep)


def test_a_head_that_is_installed_stays(tmp_path):
    handle = memhead_trl.install("full")
    made(PackedGRPOTrainer, tmp_path, max_steps=1).train()
    assert memhead_trl.installed() is handle
    assert handle.calls > 0


def unlike(completion_ids, **_):
    """Hardly ever equal for a whole group."""
    return [sum(ids) / 100 for ids in completion_ids]


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_where_vllm_samples_the_importance_ratio_is_trls(tmp_path, mode):
    """With no pass for it: the sampler differs smoothly, as rounding would enlarge any difference."""
    tokenizer = saved_llama(tmp_path / "model", initializer_range=0.3)
    found = []
    for kind in (PackedGRPOTrainer, GRPOTrainer):
        with vllm_stand_in() as engines:
            trainer = made(
                kind, tmp_path, model=str(tmp_path / "model"), use_vllm=True, vllm_mode="colocate",
                vllm_importance_sampling_mode=mode,
                script={"reward_funcs": unlike, "processing_class": tokenizer,
                        "train_dataset": Dataset.from_dict({"prompt": [f"{n:02d}>" for n in range(32)]})},
            )  # fmt: skip
            engines[0].base.model.norm.register_forward_hook(lambda module, given, out: 1.02 * out)
            trainer.train()
        found.append(history(trainer)[0])
    compared(*found)
    whole = [(mine, other) for mine, other in zip(*found, strict=True) if mine["step/left_out"] == 0.0]
    assert len(whole) > 2
    for mine, other in whole:
        names = [name for name in other if name.startswith("sampling/")]
        assert len(names) == 5
        assert other["sampling/sampling_logp_difference/mean"] > 1e-3
        for name in names:
            assert mine[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name


def by_two_processes(folder, kind):
    process = torchrun(2, script_on_ranks.__file__, folder, kind)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return [torch.load(folder / f"{kind}-{rank}.pt") for rank in range(2)]


def test_two_processes_go_trls_way(tmp_path):
    """Each has half of the groups, and their means over all are TRL's."""
    ours, theirs = (by_two_processes(tmp_path, kind) for kind in ("packed", "trl"))
    assert [found["why"] for found in ours] == [None, None]
    compared(ours[0]["steps"], theirs[0]["steps"])
    for name, value in ours[0]["weights"].items():
        assert torch.equal(ours[1]["weights"][name], value), name
        torch.testing.assert_close(value, theirs[0]["weights"][name], rtol=1e-4, atol=1e-4, msg=name)


def test_what_one_process_finds_all_do(tmp_path):
    found = by_two_processes(tmp_path, "fault")
    assert all(one["why"].startswith("it disagrees with TRL's padded way") for one in found)
    assert [len(one["said"]) for one in found] == [1, 0]  # the main process speaks
    assert "step/left_out" not in found[0]["steps"][0]
