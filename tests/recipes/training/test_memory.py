"""A run that has too little memory says so on one page, keeps its last step, and takes its largest step first.

The allocations that fail here fail for real: more bytes are asked of the allocator than any machine can address.
"""

import json
import re
import resource
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from tiny import saved_llama
from transformers import LlamaForCausalLM

import train_grpo
from recipes.config.load import load_config
from recipes.models.tokenizers import character_tokenizer
from recipes.plan.plan import plan
from recipes.plan.processes import ddp, sharded
from recipes.problems import ConfigError
from recipes.training.memory import OutOfMemory, _asked, _free, explain, plan_of
from recipes.training.packed_step import PackedStep
from recipes.training.remedies import LOADING, remedies
from recipes.training.worst_case import longest_prompt

CONFIG = str(Path(__file__).parents[3] / "configs" / "quickstart.yaml")
ADAPTERS = Path(CONFIG).with_name("llama3.2_1b_gsm8k.yaml")
TINY = [
    "model.scratch.hidden_size=32",
    "model.scratch.layers=1",
    "model.scratch.intermediate_size=32",
    "grpo.per_device_train_batch_size=16",
    "grpo.num_generations=4",
    "run.warm_start=null",
    "run.save_every=null",
    "run.evaluation.size=16",
    "run.evaluation.every=null",
]
TOO_MUCH = 2**60


def run(tmp_path, *more, steps=3, name="tiny"):
    own = [f"grpo.max_steps={steps}", f"run.name={name}", f"run.output_root={tmp_path}"]
    return train_grpo.main(["--config", CONFIG, *TINY, *own, *more])


def metrics(tmp_path, name="tiny"):
    return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def fail(monkeypatch):
    """A function: the loss asks for too much memory wherever `when(trainer, inputs)` says so."""

    def fail(when):
        compute = PackedStep._compute_loss

        def computed(trainer, model, inputs):
            if when(trainer, inputs):
                torch.empty(TOO_MUCH, dtype=torch.uint8)
            return compute(trainer, model, inputs)

        monkeypatch.setattr(PackedStep, "_compute_loss", computed)
        return lambda: monkeypatch.setattr(PackedStep, "_compute_loss", compute)

    return fail


def test_an_evaluation_without_memory_is_one_page(tmp_path, capsys, monkeypatch):
    saved_llama(tmp_path / "base")
    forward = LlamaForCausalLM.forward

    def computed(model, *given, **options):
        torch.empty(TOO_MUCH, dtype=torch.uint8)
        return forward(model, *given, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", computed)
    assert train_grpo.main(["--config", CONFIG, *TINY, "--evaluate", str(tmp_path / "base")]) == 1
    said = capsys.readouterr().err
    assert "out of memory in the phase 'evaluation'" in said
    assert f"asked for  {TOO_MUCH / 2**30:.2f} GiB" in said
    assert "1. run.evaluation.batch_size=" in said


def test_of_a_model_that_cannot_be_loaded_no_batch_is_too_large(without_unsloth):
    """And what names no size is told in its own words."""
    vllm = ["grpo.use_vllm=true", "grpo.vllm_mode=colocate", "grpo.vllm_gpu_memory_utilization=0.35"]
    config = load_config(ADAPTERS, [*vllm, "model.dtype=float32"])
    assert remedies(config, LOADING, None) == [
        "grpo.vllm_gpu_memory_utilization lower than 0.35",
        "model.dtype=bfloat16",
        "more memory: end what else uses it, or take a larger device",
    ]
    assert remedies(load_config(CONFIG), LOADING, None)[0].startswith("more memory")
    with pytest.raises(OutOfMemory) as raised:
        explain(MemoryError("Your GPU ran out\n of memory loading vLLM"), config)
    page = str(raised.value)
    assert "  it says    Your GPU ran out of memory loading vLLM\n" in page
    assert "asked for" not in page
    assert "per_device_train_batch_size" not in page


def test_a_step_without_memory_is_one_page_and_a_checkpoint(tmp_path, capsys, fail):
    mend = fail(lambda trainer, _: trainer.state.global_step == 2)
    assert run(tmp_path) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "out of memory in the phase 'forward' after step 2" in said
    assert f"asked for  {TOO_MUCH / 2**30:.2f} GiB" in said
    for words in (
        "free ",
        "planned",
        "measured",
        "forward, loss and backward",
        "most useful first",
        "--resume",
    ):
        assert words in said
    (checkpoint,) = (tmp_path / "tiny" / "checkpoints").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-2"
    assert str(checkpoint) in said
    mend()
    assert run(tmp_path, "--resume") == 0
    assert [line["step"] for line in metrics(tmp_path)] == [0, 1, 2, 3]


def test_the_page_has_what_the_step_that_failed_took_until_then(tmp_path, capsys, monkeypatch):
    """Of the first step nothing is logged: its sampling's peak is known all the same, and the loss's so far."""
    compute, size = PackedStep._compute_loss, 30 * 2**20

    def computed(trainer, model, inputs):
        held = torch.ones(size, dtype=torch.uint8)
        loss = compute(trainer, model, inputs)
        return torch.empty(TOO_MUCH, dtype=torch.uint8) if len(held) == size else loss

    monkeypatch.setattr(PackedStep, "_compute_loss", computed)
    assert run(tmp_path, "run.checks=false") == 1
    page = capsys.readouterr().err
    measured = {
        phase: float(re.search(rf"  {phase} .*?([\d.]+) MiB\n", page)[1])
        for phase in ("generation", "forward, loss and backward")
    }
    assert 0 < measured["generation"] < 30 < measured["forward, loss and backward"] < 40
    assert re.search(r"  optimizer .*–\n", page)


def test_weights_that_may_be_half_updated_are_not_kept(tmp_path, capsys, monkeypatch):
    stepped = torch.optim.AdamW.step

    def step(optimizer, *given):
        if optimizer.state:  # the second one
            torch.empty(TOO_MUCH, dtype=torch.uint8)
        return stepped(optimizer, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    assert run(tmp_path) == 1
    said = capsys.readouterr().err
    assert "out of memory in the phase 'optimizer' after step 1" in said
    assert "The weights may be half updated and are not saved; there is no checkpoint" in said
    assert not list((tmp_path / "tiny").glob("checkpoints/*"))


def test_what_does_not_fit_fails_before_the_first_step(tmp_path, capsys, fail):
    def is_longest(trainer, inputs):
        return bool(inputs.run) and inputs.batch.completion_width == trainer.args.max_completion_length

    seen = []
    fail(lambda trainer, inputs: is_longest(trainer, inputs) and not seen.append(len(inputs.lengths.group)))
    assert run(tmp_path) == 1
    said = capsys.readouterr().err
    assert "out of memory in the phase 'a worst-case step before the first: forward' after step 0" in said
    assert seen == [16]  # the whole batch in one bin
    assert not (tmp_path / "tiny" / "metrics.jsonl").exists()


def test_the_worst_case_fills_its_bins(tmp_path, fail):
    """With other lengths, bins that are made even may be as full."""
    runs = []
    fail(lambda trainer, inputs: runs.append(list(inputs.run)))  # and nothing fails
    three = 3 * 4 * (7 + 4 * 5)  # micro-batches of four groups
    overrides = ["grpo.gradient_accumulation_steps=4", f"step.token_budget={three}"]
    assert run(tmp_path, *overrides, steps=1) == 0
    assert runs[:4] == [[], [], [0, 1, 2], [3]]
    assert [0, 1, 2] not in runs[4:]


def test_the_checks_change_nothing_but_can_be_left_out(tmp_path, capsys):
    assert run(tmp_path, steps=2) == 0
    checked = capsys.readouterr().out
    assert run(tmp_path, "run.checks=false", steps=2, name="unchecked") == 0
    unchecked = capsys.readouterr().out
    assert "worst case  16 × (" in checked
    assert "worst case" not in unchecked
    checks = [json.loads((tmp_path / name / "head_check.json").read_text()) for name in ("tiny", "unchecked")]
    assert ["passed" in check for check in checks] == [True, False]  # what chooses the step is beside it
    for with_it, without in zip(metrics(tmp_path), metrics(tmp_path, "unchecked"), strict=True):
        for key in ("reward", "loss", "grad_norm", "entropy", "accuracy", "tokens"):
            a, b = with_it.get(key), without.get(key)
            if key == "tokens" and a is not None:
                a, b = a["computed"], b["computed"]
            assert a == b, key
    plan = json.loads((tmp_path / "tiny" / "plan.json").read_text())
    assert plan["measured"].keys() <= plan["phases"].keys()
    assert plan["measured_figure"] == "tensor_peak_mib"
    assert (
        plan["phases"]["generation"] < 2 * plan["measured"]["generation"]
    )  # with the prompts that there are
    highest = metrics(tmp_path)[1]["memory"]["backward"]["tensor_peak_mib"] * 2**20
    assert plan["measured"]["forward, loss and backward"] >= highest > 2**16
    assert "memory  forward, loss and backward: planned" in checked


def test_the_worst_case_has_a_reference_where_the_loss_has(tmp_path, capsys):
    kept = [setting for setting in TINY if not setting.startswith("run.warm_start")]
    own = ["run.warm_start.steps=1", "run.warm_start.batch_size=8", "grpo.beta=0.04", "grpo.max_steps=1"]
    assert train_grpo.main(["--config", CONFIG, *kept, *own, f"run.output_root={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert "worst case  16 × (" in printed
    assert "No worst-case step" not in printed


def test_trls_step_is_tried_too(tmp_path, capsys):
    assert run(tmp_path, "step.impl=trl", steps=1) == 0
    assert "worst case  16 × (" in capsys.readouterr().out


def test_what_helps_most_comes_first(without_unsloth):
    config = load_config(CONFIG, ["head.impl=full", "grpo.max_completion_length=48"])
    found = remedies(config, "forward", plan_of(config).setting)
    saved = [line.split("saves ")[1] for line in found if "saves" in line]
    sizes = [float(text.split()[0]) * (1024 if "GiB" in text else 1) for text in saved]
    assert len(sizes) == 3
    assert sizes == sorted(sizes, reverse=True)
    assert "a lora section" in found[-1]
    assert remedies(config, "evaluation", plan_of(config).setting)[0].startswith("run.evaluation.batch_size=")


@pytest.mark.parametrize(
    ("budget", "advised"),
    [
        (  # bins of as many tokens as a padded micro-batch has slots would hold both halves
            None,
            r"grpo\.per_device_train_batch_size=256 grpo\.gradient_accumulation_steps=2 step\.token_budget=(\d+) ",
        ),
        (  # more than a rollout has, which is one micro-batch here
            10**6,
            r"grpo\.per_device_train_batch_size=256 grpo\.gradient_accumulation_steps=2 step\.token_budget=(\d+) ",
        ),
        (1, r"grpo\.per_device_train_batch_size=256 grpo\.gradient_accumulation_steps=2 "),
    ],
)
def test_no_bin_smaller_than_a_micro_batch_is_advised(without_unsloth, budget, advised):
    """The step would not divide it: what is left then are smaller micro-batches."""
    overrides = [] if budget is None else [f"step.token_budget={budget}"]
    config = load_config(CONFIG, overrides)
    text = "\n".join(remedies(config, "forward", plan_of(config).setting))
    found = re.search(advised, text)
    assert found, text
    if budget != 1:
        halves = ["grpo.per_device_train_batch_size=256", "grpo.gradient_accumulation_steps=2"]
        assert int(found[1]) == plan(load_config(CONFIG, halves)).setting.packed


def test_smaller_bins_are_advised_down_to_a_micro_batch(without_unsloth):
    quarters = ["grpo.per_device_train_batch_size=128", "grpo.gradient_accumulation_steps=4"]
    config = load_config(CONFIG, quarters)
    text = "\n".join(remedies(config, "forward", plan_of(config).setting))
    found = re.search(r"step\.token_budget=(\d+)", text)
    assert found, text
    assert "per_device_train_batch_size" not in text
    least = plan(config).setting.packed
    assert int(found[1]) >= least
    config = load_config(CONFIG, [*quarters, f"step.token_budget={least}"])
    advice = remedies(config, "forward", plan_of(config).setting)
    assert not any(line.startswith("step.token_budget") for line in advice)


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total", "2.50 GiB"),
        ("can't allocate memory: you tried to allocate 1073741824 bytes. Error code 12", "1.00 GiB"),
        ("bad_alloc", ""),
    ],
)
def test_how_much_was_asked_for(message, size):
    assert _asked(message) == size


def test_what_is_free_is_no_more_than_this_process_may_have():
    before = resource.getrlimit(resource.RLIMIT_AS)
    may = psutil.Process().memory_info().vms + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (may, before[1]))
    try:
        free = _free()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert re.match(r"(1\.00 GiB|9\d\d\.\d\d MiB|0\.9\d GiB) of ", free), free


def test_the_worst_case_is_of_the_prompt_with_the_most_tokens():
    """Not of the one with the most characters: some tokens are long."""
    tokenizer = character_tokenizer("0123456789")
    tokenizer.add_tokens(["<equals>"])
    prompts = ["1", "12345" * 3, "<equals>" * 4, *["12"] * 30, "123"]
    session = SimpleNamespace(
        task=SimpleNamespace(train={"prompt": prompts}),
        tokenizer=tokenizer,
        config=SimpleNamespace(chat_template_kwargs={}),
    )
    assert longest_prompt(session).tolist() == tokenizer("12345" * 3).input_ids


def test_other_errors_stay_what_they_are():
    explain(RuntimeError("shapes do not fit"), config=None)  # raises nothing


def test_a_pretrained_model_without_a_gpu_is_planned_on_the_cpu(monkeypatch):
    """Its run is: the bytes measured there are laid beside these."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # else it asks again for half a minute
    config = load_config(str(Path(CONFIG).parent / "llama3.2_1b_gsm8k.yaml"))
    assert plan(config).setting.device_type == "cuda"  # --plan: what the configuration was written for
    asked = load_config(str(Path(CONFIG).parent / "llama3.2_1b_gsm8k.yaml"), ["grpo.use_cpu=true"])
    for found in (plan_of(config), plan(asked)):
        assert found.setting.device_type == "cpu"
        assert not found.setting.precision.autocast


@pytest.mark.parametrize("launcher", ["", "FSDP", "DEEPSPEED"])
def test_the_plan_of_a_run_in_several_processes_is_of_one_of_them(monkeypatch, launcher):
    """Seen on two GPUs: DDP's buckets were not planned, and ZeRO-3 was planned whole and in bins."""
    if launcher:
        monkeypatch.setenv(f"ACCELERATE_USE_{launcher}", "true")
    config = load_config(CONFIG, processes=2)
    whole, found = plan(config), plan_of(config)
    assert found.memory.phases == (sharded(whole.setting, whole.memory, 2) if launcher else ddp(whole.memory))
    assert found.memory.phases != whole.memory.phases
    assert (found.setting.bin_tokens is None) is (launcher == "DEEPSPEED")


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_on_a_tied_embedding_is_refused_before_training(without_unsloth, tied):
    lora = "lora={r: 2, target_modules: [q_proj, embed_tokens]}"
    config = load_config(CONFIG, [lora, f"model.scratch.tie_embeddings={str(tied).lower()}"])
    if not tied:
        assert plan_of(config) is not None
        return
    with pytest.raises(
        ConfigError, match=r"lora\.target_modules: adapts the embedding, .* remove embed_tokens"
    ) as e:
        plan_of(config)
    assert len(e.value.lines) == 1
