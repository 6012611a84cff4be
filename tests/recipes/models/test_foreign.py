"""What comes with a checkpoint is data: neither its Python files nor its pickles are run, nor is that offered."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

import train_grpo
from recipes import export
from recipes.ask import ask
from recipes.ask import main as asked
from recipes.config.load import load_config
from recipes.config.schema import ModelConfig, ScratchConfig
from recipes.models.checkpoint import with_adapter
from recipes.models.load import load, scratch_llama
from recipes.models.tokenizers import CHAT_TEMPLATE, character_tokenizer
from recipes.problems import ConfigError
from recipes.tracking.run_folder import RunFolder

CONFIG = str(Path(__file__).parents[3] / "configs" / "quickstart.yaml")
CODE = """\
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
"""


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """The file that foreign code would make; and nobody is asked."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it was offered to run foreign code"))
    return tmp_path / "mark"


@pytest.fixture
def model(tmp_path):
    """A saved model of a few thousand parameters with a tokenizer."""
    tokenizer = character_tokenizer("0123456789+-*()>=")
    tokenizer.chat_template = CHAT_TEMPLATE
    place = tmp_path / "model"
    shape = ScratchConfig(hidden_size=32, layers=1, intermediate_size=32)
    scratch_llama(shape, tokenizer, 0).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def make_foreign(place, mark):
    """The model as one that only code of its own can load."""
    config = json.loads((place / "config.json").read_text())
    config |= {"model_type": "evil", "architectures": ["EvilModel"]}
    config["auto_map"] = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    (place / "config.json").write_text(json.dumps(config))
    (place / "evil.py").write_text(CODE.format(mark=str(mark)))


class Pickled:
    """Unpickled as a whole it touches a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def refused(said, mark):
    assert "code of its own" in said
    assert "trust_remote_code" not in said
    assert not mark.exists()


def test_training_plan_and_evaluation_refuse_a_models_own_code(
    tmp_path, model, mark, without_unsloth, capsys
):
    make_foreign(model, mark)
    run = tmp_path / "run.yaml"
    run.write_text(
        json.dumps(
            {
                "model": {"loader": "transformers", "name": str(model)},
                "task": {"name": "countdown"},
                "run": {"output_root": str(tmp_path / "runs")},
            }
        )
    )
    for mode in ([], ["--plan"], ["--evaluate", str(model)]):
        assert train_grpo.main(["--config", str(run), *mode]) == 2
        refused(capsys.readouterr().err, mark)
    assert not (tmp_path / "runs").exists()
    config = ModelConfig(loader="transformers", name=str(model))
    with pytest.raises(ConfigError) as error:
        load(config, None, 0)
    refused(str(error.value), mark)


NONSENSE = {
    "hidden_size": "x\x1b[31m", "num_attention_heads": 0, "vocab_size": -1, "dtype": "os.system",
    "model_type": "evil\x1b[31m", "hidden_act": "os.system\x1b[31m", "rope_parameters": {"rope_type": "x\x1b[31m"},
    "quantization_config": 5, "attn_implementation": "evil/kernel",
}  # fmt: skip


@pytest.mark.parametrize("key", NONSENSE)
def test_a_configuration_that_says_nonsense_is_one_line(
    tmp_path, model, without_unsloth, capsys, caplog, key
):
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: NONSENSE[key]}))
    run = {"model": {"loader": "transformers", "name": str(model)}, "task": {"name": "countdown"}}
    (tmp_path / "run.yaml").write_text(json.dumps(run | {"run": {"output_root": str(tmp_path / "runs")}}))
    for mode in ([], ["--plan"], ["--evaluate", str(model)]):
        assert train_grpo.main(["--config", str(tmp_path / "run.yaml"), *mode]) == 2, mode
        printed = capsys.readouterr()
        assert str(model)[:60] in printed.err.splitlines()[-1]  # a long value is cut
        assert "Traceback" not in printed.err
        assert "\x1b" not in printed.out + printed.err + caplog.text


def test_a_kernel_of_the_hub_is_refused_before_a_model_is_made(
    tmp_path, model, without_unsloth, capsys, monkeypatch
):
    """Making it would fetch the kernel and run it, where the package `kernels` is installed."""
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attn_implementation": "evil/kernel"}))

    def made(*_, **__):
        raise AssertionError("a model was made")

    monkeypatch.setattr("transformers.PreTrainedModel.__init__", made)
    run = {"model": {"loader": "transformers", "name": str(model)}, "task": {"name": "countdown"}}
    (tmp_path / "run.yaml").write_text(json.dumps(run | {"run": {"output_root": str(tmp_path / "runs")}}))
    for mode in ([], ["--plan"], ["--evaluate", str(model)]):
        assert train_grpo.main(["--config", str(tmp_path / "run.yaml"), *mode]) == 2, mode
        assert "needs code of its own" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="needs code of its own"):
        load(ModelConfig(loader="transformers", name=str(model)), None, 0)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    with pytest.raises(ConfigError, match="needs code of its own"):
        with_adapter(adapter)


def test_a_tokenizer_that_says_nonsense_is_one_line(tmp_path, model, without_unsloth, capsys):
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": 5}))
    run = {"model": {"loader": "transformers", "name": str(model)}, "task": {"name": "char_count"}}
    (tmp_path / "run.yaml").write_text(json.dumps(run | {"run": {"output_root": str(tmp_path / "runs")}}))
    for mode in ([], ["--plan"], ["--evaluate", str(model)]):
        assert train_grpo.main(["--config", str(tmp_path / "run.yaml"), *mode]) == 2, mode
        assert "its tokenizer cannot be loaded" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no\x1b[31m') }}", "{% for %}", "{{ 1 / 0 }}", "silence"]
)
def test_a_template_that_fails_in_an_evaluation_or_an_answer_is_one_line(
    tmp_path, model, without_unsloth, capsys, template
):
    (model / "chat_template.jinja").write_text(template)
    run = {"model": {"loader": "transformers", "name": str(model)}, "task": {"name": "char_count"}}
    (tmp_path / "config.yaml").write_text(json.dumps(run))
    assert train_grpo.main(["--config", str(tmp_path / "config.yaml"), "--evaluate", str(model)]) == 2
    evaluated = capsys.readouterr().err
    model.rename(tmp_path / "final")
    assert asked([str(tmp_path), "How many?"]) == 2
    for line in (evaluated, capsys.readouterr().err):
        assert "its chat template cannot render a prompt (" in line
        assert "\x1b" not in line
        assert len(line.splitlines()) == 1


def test_export_and_ask_refuse_a_models_own_code(tmp_path, model, mark, without_unsloth, capsys):
    run = tmp_path / "run"
    base = load(ModelConfig(loader="transformers", name=str(model)), None, 0)[0]
    get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(run / "final")
    for file in model.glob("tokenizer*"):
        shutil.copy(file, run / "final")
    make_foreign(model, mark)
    for more in ([], ["--base", str(model)]):
        assert export.main([str(run), "--merge", *more]) == 2
        refused(capsys.readouterr().err, mark)
    with pytest.raises(ConfigError) as error:
        ask(load_config(CONFIG), RunFolder(run))
    refused(str(error.value), mark)


@pytest.mark.parametrize("adapter", [False, True])
def test_pickled_weights_are_not_unpickled(tmp_path, model, mark, without_unsloth, capsys, adapter):
    place = tmp_path / "final"
    if adapter:
        base = load(ModelConfig(loader="transformers", name=str(model)), None, 0)[0]
        get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(place)
        for file in model.glob("tokenizer*"):
            shutil.copy(file, place)
        (place / "adapter_model.safetensors").unlink()
        torch.save({"weight": Pickled(mark)}, place / "adapter_model.bin")
    else:
        shutil.copytree(model, place)
        (place / "model.safetensors").unlink()
        torch.save({"weight": Pickled(mark)}, place / "pytorch_model.bin")
    assert train_grpo.main(["--config", CONFIG, "--evaluate", str(place)]) == 2
    said = capsys.readouterr().err
    assert "holds a pickle that is damaged, or runs code" in said
    assert "weights_only" not in said
    assert not mark.exists()


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_checkpoints_pickles_are_not_unpickled_on_resume(tmp_path, mark, without_unsloth, capsys, file):
    tiny = [
        "model.scratch.hidden_size=32",
        "model.scratch.layers=1",
        "run.warm_start=null",
        "run.save_every=1",
    ]
    tiny += ["grpo.per_device_train_batch_size=8", "grpo.num_generations=4", "run.evaluation.size=4"]
    tiny += ["run.checks=false", "run.name=tiny", f"run.output_root={tmp_path}"]
    assert train_grpo.main(["--config", CONFIG, *tiny, "grpo.max_steps=1"]) == 0
    torch.save({"state": Pickled(mark)}, tmp_path / "tiny" / "checkpoints" / "checkpoint-1" / file)
    capsys.readouterr()
    status = train_grpo.main(["--config", CONFIG, *tiny, "grpo.max_steps=2", "--resume"])
    assert not mark.exists()
    assert status in (
        0,
        1,
        2,
    )  # what nobody reads does no harm; whatever else is refused, and never by a traceback
