"""One precision from the first evaluation to the last, as seen in the dtypes that the model's layers compute in."""

import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train_grpo
from recipes.config.load import load_config
from recipes.models.checkpoint import load_checkpoint
from recipes.models.load import load
from recipes.models.precision import Precision, rounded_away
from recipes.training.evaluation import evaluate_checkpoint
from recipes.training.trainer import reference_like_the_model

CONFIG = """
model:
  loader: scratch
  scratch: {hidden_size: 32, layers: 1, intermediate_size: 64}
task: {name: countdown, eval_problems: 24}
grpo:
  max_steps: 1
  per_device_train_batch_size: 8
  num_generations: 4
  max_completion_length: 6
  learning_rate: 1.0e-12     # the first step is taken at a rate that changes no weight
  bf16: true
  use_cpu: true
run:
  name: tiny
  warm_start: {steps: 2, batch_size: 8, check_every: 2, target_accuracy: null}
  evaluation: {every: 1, size: 24, batch_size: 24}
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(CONFIG)
    return file


@pytest.fixture
def computed_in(monkeypatch):
    """The dtypes in which linear layers multiply."""
    seen = set()
    # The patch compares one small loss with the model's own, in the weights' dtype and to its precision.
    monkeypatch.setattr("memhead.integrations.transformers._check", lambda model: None)
    original = torch.nn.Linear.forward

    def forward(self, x):
        out = original(self, x)
        if out.device.type != "meta":  # where the plan counts sizes
            seen.add(out.dtype)
        return out

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    return seen


def test_everything_computes_in_bfloat16_where_training_does(path, tmp_path, computed_in):
    command = ["--config", str(path), f"run.output_root={tmp_path}"]
    assert train_grpo.main(command) == 0
    assert computed_in == {torch.bfloat16}  # warm start, head check, evaluations, generation, scoring, loss
    folder = tmp_path / "tiny"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    before, after = (line for line in lines if "accuracy" in line)
    same = {name: value for name, value in before.items() if name.startswith("accuracy")}
    assert same == {name: after[name] for name in same}
    computed_in.clear()
    found = evaluate_checkpoint(load_config(path), folder / "final")
    assert computed_in == {torch.bfloat16}
    assert {name: found[name] for name in same} == same
    assert json.loads((folder / "head_check.json").read_text())["precision"] == {
        "trained_weights": "float32",
        "frozen_weights": "none",
        "products": "bfloat16",
        "logits": "float32",
    }


def test_without_autocast_it_is_float32(path, tmp_path, computed_in):
    assert train_grpo.main(["--config", str(path), f"run.output_root={tmp_path}", "grpo.bf16=false"]) == 0
    assert computed_in == {torch.float32}


@pytest.mark.parametrize(
    ("bf16", "fp16", "products"),
    [(True, False, torch.bfloat16), (False, True, torch.float16), (False, False, None)],
)
def test_it_is_what_the_trainer_will_do(bf16, fp16, products):
    class Arguments:
        pass

    Arguments.bf16, Arguments.fp16 = bf16, fp16
    precision = Precision.of(Arguments)
    assert precision.products == products
    with precision.autocast("cpu"):
        assert torch.is_autocast_enabled("cpu") == (products is not None)
        if products is not None:
            assert torch.get_autocast_dtype("cpu") == products


def test_weights_that_are_trained_are_float32_unless_asked_otherwise(path, tmp_path):
    config = load_config(path)
    model, tokenizer = load(config.model, config.make_task(), 0)
    half = tmp_path / "half"
    model.bfloat16().save_pretrained(half)
    tokenizer.save_pretrained(half)
    saved = {"model.loader": "transformers", "model.name": half, "model.scratch": "null"}
    dtypes = {}
    for name, more in {"full": [], "lora": ["lora={}"], "asked": ["model.dtype=bfloat16"]}.items():
        settings = [f"{key}={value}" for key, value in saved.items()]
        chosen = load_config(path, [*settings, "run.warm_start=null", *more])
        dtypes[name] = load(chosen.model, chosen.make_task(), 0, lora=chosen.lora)[0].dtype
    assert dtypes == {"full": torch.float32, "lora": torch.bfloat16, "asked": torch.bfloat16}


@pytest.fixture
def revisions(path, tmp_path, monkeypatch):
    """A hub of one model in two revisions, main and v2; the folder of v2's files, and what names it in a run."""
    config, hub = load_config(path), tmp_path / "hub"
    task, place = config.make_task(), hub / "models--some--model"
    for number, name in enumerate(("main", "v2")):
        commit = str(number) * 40
        for made in load(config.model, task, number):
            made.save_pretrained(place / "snapshots" / commit)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / name).write_text(commit)
    main = place / "snapshots" / ("0" * 40) / "config.json"  # which no part of the run has a use for
    quantised = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    main.write_text(json.dumps(json.loads(main.read_text()) | quantised))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    named = ["model.loader=transformers", "model.scratch=null", "model.name=some/model", "model.revision=v2"]
    return place / "snapshots" / ("1" * 40), [*named, "run.warm_start=null", f"run.output_root={tmp_path}"]


def test_the_reference_is_the_revision_that_is_trained_in_its_dtype(path, revisions, tmp_path, capsys):
    """TRL loads it by the model's name alone: from a hub of two revisions it took main, in float32."""
    more = ["model.dtype=bfloat16", "grpo.beta=0.1"]
    assert train_grpo.main(["--config", str(path), *revisions[1], *more]) == 0
    lines = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["kl"] == 0.0  # before the first update, to the bit
    said = capsys.readouterr()
    assert "will be ignored" not in said.out + said.err


def test_an_adapter_is_put_on_the_revision_that_it_was_trained_on(path, revisions, tmp_path):
    """PEFT writes the base's name alone: from a hub of two revisions its adapter was put on main."""
    place, named = revisions
    shutil.rmtree(place.parent / ("0" * 40))  # not even its config.json is asked for
    assert train_grpo.main(["--config", str(path), *named, "lora.r=2"]) == 0
    final = tmp_path / "tiny" / "final"
    found = load_checkpoint(final, load_config(path, named).model)[0].get_base_model().state_dict()
    wanted = load_file(place / "model.safetensors")
    assert torch.equal(found["model.norm.weight"], wanted["model.norm.weight"])
    assert torch.equal(found["model.embed_tokens.weight"], wanted["model.embed_tokens.weight"])


REFERENCE = "grpo.beta=0.1"
HUB = ["model.loader=transformers", "model.scratch=null", "model.name=some/model", "run.warm_start=null"]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([REFERENCE], {"dtype": torch.bfloat16}),
        (
            [REFERENCE, *HUB, "model.revision=v2", "model.attn_implementation=eager"],
            {"dtype": torch.bfloat16, "revision": "v2", "attn_implementation": "eager"},
        ),
        (["grpo.beta=0"], None),  # there is none
        ([REFERENCE, "lora.r=4", *HUB], None),  # it is the model without them
    ],
    ids=["new", "of the hub", "none", "adapters"],
)
def test_the_runs_arguments_are_its_own_again_where_the_reference_is_loaded(path, tmp_path, overrides, told):
    config = load_config(path, overrides)
    arguments, filters = config.grpo_config(tmp_path), logging.getLogger("trl.trainer.grpo_trainer").filters
    model, folder = SimpleNamespace(dtype=torch.bfloat16), SimpleNamespace(path=tmp_path)
    session = SimpleNamespace(config=config, arguments=arguments, model=model, folder=folder)
    own, heard = arguments.model_init_kwargs, list(filters)
    with reference_like_the_model(session):
        assert arguments.model_init_kwargs == (own if told is None else told)

    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), reference_like_the_model(session):
        fail()
    assert arguments.model_init_kwargs is own
    assert filters == heard


def test_weights_too_coarse_for_their_updates_are_said(path, monkeypatch):
    """Of a model in bfloat16 98.6 % of the weights were after four steps of 1e-6 what they had been."""
    model = torch.nn.Linear(2, 2).bfloat16()
    full, adapted = load_config(path), load_config(path, ["lora.r=4"])
    said = rounded_away(full, model)
    assert said.startswith(
        "model.dtype: the weights that are trained are bfloat16, which rounds to 0.004 of each; "
    )
    assert "grpo.learning_rate, 1e-12," in said
    assert "float16" in rounded_away(full, torch.nn.Linear(2, 2).half())
    assert rounded_away(adapted, model) == rounded_away(full, model.float()) == ""
    assert rounded_away(full, torch.nn.Linear(2, 2).bfloat16().requires_grad_(False)) == ""
    for spread, heard in (("FSDP", said), ("data parallel", said), ("DeepSpeed", "")):
        monkeypatch.setattr("recipes.models.precision.spread", lambda spread=spread: spread)
        assert rounded_away(full, torch.nn.Linear(2, 2).bfloat16()) == heard


def test_a_run_says_it_before_it_trains(path, tmp_path, capsys):
    overrides = ["model.dtype=bfloat16", "run.warm_start=null", f"run.output_root={tmp_path}"]
    assert train_grpo.main(["--config", str(path), *overrides]) == 0
    printed = capsys.readouterr().out
    assert printed.index("rounds to 0.004") < printed.index("before GRPO")
