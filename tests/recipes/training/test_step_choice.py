"""Which step a run takes, what it says of it, and what the run folder keeps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from test_quickstart import CONFIG, TINY
from torch._dynamo import lookup_backend

import train_grpo
from recipes.config.load import RunConfig, load_config
from recipes.models import load
from recipes.models.compiled import compile_layers
from recipes.models.manifest import damage
from recipes.plan.plan import GIB, plan
from recipes.tracking.run_folder import RunFolder
from recipes.training import preflight, step_check, step_choice
from recipes.training.resume import model_to_load

ONE_B = Path(CONFIG).with_name("llama3.2_1b_gsm8k.yaml")


def run(tmp_path, *more):
    short = ["grpo.max_steps=1", "run.warm_start=null", "run.evaluation.every=null"]
    changed = ("grpo.max_steps", "run.warm_start", "run.evaluation.every")
    kept = [setting for setting in TINY if not setting.startswith(changed)]
    return train_grpo.main(["--config", CONFIG, *kept, *short, f"run.output_root={tmp_path}", *more])


def kept(tmp_path):
    """The step as environment.json has it, head_check.json's figures of it, and the tokens of the last step."""
    folder = tmp_path / "tiny"
    environment, check = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("environment", "head_check")
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = next(line for line in lines if "reward" in line)
    return environment["step"], check.get("step"), logged.get("tokens")


@pytest.mark.parametrize(
    ("overrides", "budget", "said"),
    [
        ([], None, "step: packed, in bins of as many tokens as a padded micro-batch has slots\n"),
        (
            ["step.token_budget=70", "step.impl=packed"],
            70,
            "step: packed, in bins of 70 tokens, as told, a micro-batch at least\n",
        ),
    ],
    ids=["default", "as told"],
)
def test_a_packed_run_says_and_keeps_its_bins(tmp_path, capsys, monkeypatch, overrides, budget, said):
    right, given = step_choice.planned_budget, []
    monkeypatch.setattr(
        step_choice, "planned_budget", lambda *arguments: given.append(arguments) or right(*arguments)
    )
    assert run(tmp_path, *overrides) == 0
    [(config, planned, _)] = given  # the run's plan, as it stands in its folder
    assert planned.name == config.run.name == "tiny"
    assert planned.memory.parts == json.loads((tmp_path / "tiny" / "plan.json").read_text())["parts"]
    printed = capsys.readouterr().out
    assert said in printed
    assert re.search(r"step 1/1:.*\s[\d,]+\s+tokens/s\s+\d+\s+%\s+left\s+out\s", printed, re.DOTALL)
    assert re.search(r"│ tokens a second +│ +[\d,]+ │ +[\d,]+ │", printed)
    step, check, tokens = kept(tmp_path)
    assert step == {"impl": "packed", "token_budget": budget}
    assert check["passed"]
    assert check["packed"]["gradient_error"] < 1e-4
    assert 0 < tokens["computed"] < tokens["real"]


def disagrees(monkeypatch):
    monkeypatch.setattr(step_check, "check_step", lambda *a: {"passed": False, "packed": {}})
    return "it disagrees with TRL's padded way on this model; "


def does_not_run(monkeypatch):
    def check(*arguments):
        raise RuntimeError("no kernel for heads of 7\nsecond line")

    monkeypatch.setattr(step_check, "check_step", check)
    return "it does not run on this model: no kernel for heads of 7"


@pytest.mark.parametrize("fault", [disagrees, does_not_run])
def test_a_step_that_fails_its_check_is_trls(tmp_path, capsys, monkeypatch, fault):
    reason = fault(monkeypatch)
    assert run(tmp_path, "run.save_every=1") == 0
    assert damage(tmp_path / "tiny" / "checkpoints" / "checkpoint-1") == ""  # it stays guarded
    line = f"step.impl: packed would not be exact, so TRL's step is used: {reason}"
    assert line in capsys.readouterr().out
    step, check, tokens = kept(tmp_path)
    assert step["impl"] == "trl"
    assert step["why"].startswith(reason)
    assert not check["passed"]
    assert tokens is None
    # The folder's own configuration does it again, where the packed step by name would be an error.
    again = ["--config", str(tmp_path / "tiny" / "config.yaml"), "run.name=again"]
    assert train_grpo.main(again) == 0
    assert line in capsys.readouterr().out
    asked = run(tmp_path, "step.impl=packed", "run.name=asked")
    assert asked == 2
    assert train_grpo.main(["--config", str(tmp_path / "asked" / "config.yaml"), "run.name=asked-again"]) == 2


def test_a_step_asked_for_by_name_that_fails_its_check_is_an_error(tmp_path, capsys, monkeypatch):
    reason = disagrees(monkeypatch)
    assert run(tmp_path, "step.impl=packed") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"step.impl: {reason}")
    assert error.endswith("head_check.json has the figures (value 'packed'); set it to trl\n")


def compiled(monkeypatch, change, backend="eager"):
    """Let a run on a CPU compile its layers, change what they give, and count their calls."""
    torch._dynamo.reset()  # a layer is compiled for eight backends at most
    calls = []

    def counted(graph, inputs):
        made = lookup_backend(backend)(graph, inputs)
        return lambda *arguments: calls.append(1) or change(made(*arguments))

    monkeypatch.setattr(preflight, "_compiled", lambda *_: [])
    monkeypatch.setattr(load, "compile_layers", lambda model: compile_layers(model, counted))
    return calls


def test_a_run_with_compiled_layers(tmp_path, capsys, monkeypatch):
    unmetered = (
        "tracking.memory=false"  # on a CPU a mode of torch counts tensors, under which nothing is compiled
    )
    assert run(tmp_path / "plain", unmetered) == 0
    calls = compiled(monkeypatch, lambda found: found, "aot_eager")  # by AOTAutograd, as inductor
    assert run(tmp_path, unmetered, "model.compile_layers=true") == 0
    assert len(calls) == 3  # the start-up check, the worst case, the step
    assert "; layers compiled\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "tiny" / "environment.json").read_text())["compiled_layers"] is True
    step, check, _ = kept(tmp_path)
    assert step["impl"] == "packed"
    assert check["packed"]["gradient_error"] < 1e-4
    plain, ours = (
        [json.loads(line) for line in (folder / "tiny" / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "plain", tmp_path)
    )
    assert ours[-1]["loss"] == pytest.approx(plain[-1]["loss"], abs=1e-5)
    assert ours[-1]["grad_norm"] == pytest.approx(plain[-1]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("step", ["packed", "trl"])
def test_layers_that_a_compiler_got_wrong_are_an_error(tmp_path, capsys, monkeypatch, step):
    compiled(monkeypatch, lambda found: [value + 0.5 for value in found])
    assert run(tmp_path, "model.compile_layers=true", f"step.impl={step}") == 2
    error = capsys.readouterr().err
    assert error.startswith("model.compile_layers: it disagrees with TRL's padded way on this model; ")
    assert error.endswith("(value true); set it to false\n")


@pytest.mark.parametrize(
    ("overrides", "compiled"),
    [
        ([], True),
        (["grpo.max_steps=200"], True),
        (["grpo.max_steps=199"], False),
        (["grpo.max_steps=-1"], True),  # as many as the epochs have
        (["model.compile_layers=false"], False),
        (["grpo.max_steps=5", "model.compile_layers=true"], True),
        (["model.load_in_4bit=true"], True),
        (["grpo.use_vllm=true", "grpo.vllm_mode=colocate"], True),
        (["model.load_in_4bit=true", "grpo.use_vllm=true", "grpo.vllm_mode=colocate"], False),
        (
            ["grpo.use_vllm=true", "grpo.vllm_mode=server", "grpo.vllm_server_base_url=http://localhost:1"],
            True,
        ),
        (["model.load_in_8bit=true"], False),
    ],
    ids=str,
)
def test_which_runs_compile_their_layers(monkeypatch, overrides, compiled):
    config = load_config(ONE_B, overrides)
    assert config.compiles_layers(cuda=True) is compiled
    assert plan(config, 80 * GIB).setting.compiled is compiled
    asked = bool(config.model.compile_layers)
    assert config.compiles_layers(cuda=False) is asked
    assert config.model_copy(update={"processes": 2}).compiles_layers(cuda=True) is asked
    assert not load_config(CONFIG).compiles_layers(cuda=True)  # a model from scratch
    for launcher in ("FSDP", "DEEPSPEED"):  # which take the layers apart, in a process alone, too
        with monkeypatch.context() as patch:
            patch.setenv(f"ACCELERATE_USE_{launcher}", "true")
            assert config.compiles_layers(cuda=True) is asked


def test_what_a_run_loads_by_says_whether_layers_are_compiled(tmp_path, monkeypatch):
    config, folder = load_config(ONE_B), RunFolder(tmp_path)
    assert model_to_load(config, folder).compile_layers is False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert model_to_load(config, folder).compile_layers is True
    kept_off = load_config(ONE_B, ["grpo.use_cpu=true", "grpo.bf16=false"])
    assert model_to_load(kept_off, folder).compile_layers is False


@pytest.mark.parametrize("step", ["packed", "trl"])
def test_wrong_layers_that_nobody_asked_for_are_plain_again(tmp_path, capsys, monkeypatch, step):
    unmetered = "tracking.memory=false"
    assert run(tmp_path / "plain", unmetered, f"step.impl={step}") == 0
    calls = compiled(monkeypatch, lambda found: [value + 0.5 for value in found])
    monkeypatch.setattr(RunConfig, "compiles_layers", lambda self, cuda: True)
    assert run(tmp_path, unmetered, f"step.impl={step}") == 0
    assert len(calls) == 1  # the start-up check
    assert (
        "layers: compiled ones would not be exact, so they are as they came: it disagrees"
        in capsys.readouterr().out
    )
    environment = json.loads((tmp_path / "tiny" / "environment.json").read_text())
    assert environment["step"]["impl"] == step
    assert environment["compiled_layers"] is False
    plain, ours = (
        [json.loads(line) for line in (folder / "tiny" / "metrics.jsonl").read_text().splitlines()][-1]
        for folder in (tmp_path / "plain", tmp_path)
    )
    assert (ours["loss"], ours["grad_norm"]) == (plain["loss"], plain["grad_norm"])


def test_a_gpu_without_memory_for_the_check_is_no_fault_of_the_step(tmp_path, capsys, monkeypatch):
    def check(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step_check, "check_step", check)
    assert run(tmp_path) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: out of memory")
    assert "TRL's step is used" not in printed.out


def test_trls_step_is_neither_checked_nor_said(tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(step_check, "check_step")
    assert run(tmp_path, "step.impl=trl") == 0
    assert "step:" not in capsys.readouterr().out
    assert kept(tmp_path) == ({"impl": "trl"}, None, None)


@pytest.fixture
def gpu(monkeypatch, without_unsloth):
    """A device on which other programs hold something."""

    def free(gib: float, total: float, reserved: float = 0.0) -> torch.device:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(gib * GIB), int(total * GIB)))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(reserved * GIB))
        return torch.device("cuda")

    return free


def test_bins_are_planned_from_the_memory_that_is_there(gpu):
    config = load_config(ONE_B)
    small, large = plan(config, 6 * GIB), plan(config, 80 * GIB)
    assert small.setting.bin_tokens < large.setting.bin_tokens

    def budget(device, *more, planned=large):
        return step_choice.planned_budget(load_config(ONE_B, more), planned, device)

    empty = gpu(5.5, total=6)
    assert budget(empty) == small.setting.bin_tokens  # CUDA's context is in the plan
    assert budget(empty, planned=small) == budget(empty)
    assert budget(gpu(3.5, total=6, reserved=2)) == budget(empty)  # the model is loaded
    assert budget(gpu(5.25, total=80)) == budget(empty)  # somebody else is there
    assert budget(gpu(79, total=80)) == large.setting.bin_tokens
    assert budget(torch.device("cpu")) is None
    assert budget(empty, "step.token_budget=5") == 5
    eager = plan(load_config(ONE_B, ["model.attn_implementation=eager"]), 6 * GIB)
    assert budget(empty, planned=eager) is None
    assert budget(gpu(79, total=80), planned=None) is None  # a model whose sizes are not at hand
