"""A folder that is no whole checkpoint: evaluating, asking and exporting say so in one line, with status 2."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import saved_llama
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import train_grpo
from recipes import ask, export
from recipes.config.schema import ModelConfig
from recipes.models.checkpoint import load_checkpoint, with_adapter
from recipes.models.manifest import other_base, seal
from recipes.models.saved import readable, require_savable, without_weights
from recipes.problems import ConfigError

RUN = """
model: {loader: scratch}
task: {name: countdown}
run: {evaluation: {size: 4}}
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A whole model, and an adapter on it, in folders of their names."""
    root = tmp_path_factory.mktemp("saved")
    tokenizer = saved_llama(root / "whole")
    model = AutoModelForCausalLM.from_pretrained(root / "whole")
    get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(root / "adapter")
    tokenizer.save_pretrained(root / "adapter")
    return root


def gone(*names):
    return lambda place: [(place / name).unlink() for name in names]


def cut(name):
    return lambda place: (place / name).write_bytes((place / name).read_bytes()[:-100])


def without_norm(place):
    weights = load_file(place / "model.safetensors")
    save_file({key: value for key, value in weights.items() if key != "model.norm.weight"},
              place / "model.safetensors", {"format": "pt"})  # fmt: skip


def without_half(place):
    weights = load_file(place / "adapter_model.safetensors")
    save_file({key: value for key, value in weights.items() if "lora_B" not in key},
              place / "adapter_model.safetensors")  # fmt: skip


def of_another_shape(place):
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))


def in_parts(place):
    gone("model.safetensors")(place)
    parts = {"model.norm.weight": "model-00002-of-00002.safetensors"}
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))


def on_no_base(place):
    config = json.loads((place / "adapter_config.json").read_text())
    base = str(place.parent / "gone")
    (place / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))


FAULTS = [
    ("whole", shutil.rmtree, "there is no such folder"),
    ("whole", gone("config.json"), "holds neither config.json nor adapter_config.json"),
    ("whole", gone("model.safetensors"), "holds no weights (model.safetensors)"),
    ("whole", in_parts, "holds no model-00002-of-00002.safetensors, a part of its weights"),
    ("whole", cut("model.safetensors"), "its model cannot be loaded (Error while deserializing header"),
    ("whole", without_norm, "its weights lack model.norm.weight, or have another shape"),
    ("whole", of_another_shape, "its weights lack model.layers.0.mlp.down_proj.weight and 5 more, or have"),
    ("whole", gone("tokenizer.json"), "its tokenizer cannot be loaded (there is no tokenizer.json)"),
    ("whole", gone("tokenizer_config.json"), "its tokenizer cannot be loaded (it has no end token"),
    ("adapter", gone("adapter_model.safetensors"), "holds no weights (adapter_model.safetensors)"),
    ("adapter", cut("adapter_model.safetensors"), "its adapter on "),
    ("adapter", without_half, "its adapter on "),
    ("adapter", gone("tokenizer.json"), "its tokenizer cannot be loaded (there is no tokenizer.json)"),
    ("adapter", on_no_base, "its base "),
]
REMEDIES = {on_no_base: "/gone is not there; put it back, or write where it is now into adapter_config.json"}


@pytest.mark.parametrize(("kind", "harm", "words"), FAULTS)
def test_what_is_missing_is_one_line(saved, tmp_path, capsys, kind, harm, words):
    run, place = tmp_path, tmp_path / "final"
    shutil.copytree(saved / kind, place)
    harm(place)
    (run / "config.yaml").write_text(RUN)
    commands = [
        lambda: train_grpo.main(["--config", str(run / "config.yaml"), "--evaluate", str(place)]),
        lambda: ask.main([str(run), "1+1>2="]),
    ]
    if kind == "adapter":
        commands.append(lambda: export.main([str(run), "--merge"]))
    for command in commands:
        capsys.readouterr()
        assert command() == 2
        said = capsys.readouterr()
        (line,) = said.err.splitlines()
        assert line.startswith(f"{place}: {words}")
        assert line.endswith(REMEDIES.get(harm, "; give a whole checkpoint, or a run's final folder"))
        assert not said.out


@pytest.mark.parametrize(
    "form", ["model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin"]
)
def test_of_weights_in_several_files_every_one_is_looked_for(tmp_path, form):
    if form.startswith("adapter"):
        (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / f"{form}.index.json").write_text(json.dumps({"weight_map": {"a": "1", "b": "2", "c": "1"}}))
    (tmp_path / "1").touch()
    assert without_weights(tmp_path) == "no 2, a part of its weights"
    (tmp_path / "2").touch()
    assert without_weights(tmp_path) is None


@readable("model", "a/b", "take another")
def fail_quietly(error):
    assert logging.get_verbosity() == logging.ERROR
    raise error


def test_what_is_no_fault_of_the_folder_passes_and_the_log_is_as_loud_as_before():
    before = logging.get_verbosity()
    logging.set_verbosity_info()
    try:
        for error, kind in (
            (torch.OutOfMemoryError("no room"), RuntimeError),
            (OSError("gone"), ConfigError),
        ):
            with pytest.raises(kind) as raised:
                fail_quietly(error)
            assert logging.get_verbosity() == logging.INFO
            assert (raised.value is error) == (kind is RuntimeError)
    finally:
        logging.set_verbosity(before)


def test_an_adapter_of_a_model_on_the_cpu_stays_off_the_gpu(saved, monkeypatch):
    """Where PEFT is not told, it asks which accelerator there is, and reads the file onto that."""
    asked = []
    for module in ("peft.peft_model", "peft.utils.save_and_load"):
        monkeypatch.setattr(f"{module}.infer_device", lambda: asked.append(True) or "cpu")
    model = with_adapter(saved / "adapter")
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert not asked


@pytest.mark.parametrize("where", ["final", "checkpoints/checkpoint-2"])
def test_the_base_that_a_warm_start_left_is_found_where_the_run_folder_is_now(saved, tmp_path, where):
    shutil.copytree(saved / "whole", tmp_path / "warm_start")
    shutil.copytree(saved / "adapter", tmp_path / where)
    file = tmp_path / where / "adapter_config.json"
    moved = {"base_model_name_or_path": "/before/it/was/moved/warm_start"}
    file.write_text(json.dumps(json.loads(file.read_text()) | moved))
    weights = load_file(tmp_path / "warm_start" / "model.safetensors")
    found = with_adapter(tmp_path / where).get_base_model().state_dict()
    assert torch.equal(found["model.norm.weight"], weights["model.norm.weight"])


def test_of_two_warm_starts_that_may_be_the_base_the_run_folders_own_is_taken(saved, tmp_path):
    """Nothing is noted beside the adapter. Where something is, and it is neither, the own one is refused."""
    places = [tmp_path / "run" / "warm_start", tmp_path / "elsewhere" / "warm_start"]
    for number, place in enumerate(places):
        shutil.copytree(saved / "whole", place)
        weights = load_file(place / "model.safetensors")
        weights["model.norm.weight"] += number
        save_file(weights, place / "model.safetensors", {"format": "pt"})
    final = tmp_path / "run" / "final"
    shutil.copytree(saved / "adapter", final)
    file = final / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(places[1])}))
    assert with_adapter(final).get_base_model().model.norm.weight.unique().tolist() == [1.0]
    seal(places[0])
    (final / "base.json").write_text('{"manifest": "0"}')
    shutil.rmtree(places[1])
    with pytest.raises(ConfigError, match=r"of its base .*/run/warm_start, it is another model"):
        with_adapter(final)


@pytest.mark.parametrize("noted", ["[]", "null", "{", "{}", '"a"', "[" * 100_000])
def test_a_note_of_the_base_that_says_nothing_is_none(tmp_path, noted):
    (tmp_path / "base.json").write_text(noted)
    assert other_base(tmp_path, tmp_path / "nowhere") == ""


@pytest.mark.parametrize("more", [2, -2])
def test_tokens_that_were_added_beside_an_adapter_have_their_rows(saved, tmp_path, more):
    """A model may have more rows than its tokenizer has tokens, too; and an adapter may come without a tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(saved / "whole")
    model = AutoModelForCausalLM.from_pretrained(saved / "whole")
    rows = len(tokenizer) + 2
    if more > 0:
        tokenizer.add_tokens(["<one>", "<two>"])
    else:
        model.resize_token_embeddings(rows)
    model.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(rows)
    base.get_input_embeddings().weight.data[-1] = 7.0
    config = LoraConfig(r=2, task_type="CAUSAL_LM", modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(base, config).save_pretrained(tmp_path / "final")
    tokenizer.save_pretrained(tmp_path / "final")
    file = tmp_path / "final" / "adapter_config.json"
    there = {"base_model_name_or_path": str(tmp_path / "base")}
    file.write_text(json.dumps(json.loads(file.read_text()) | there))
    weight = with_adapter(tmp_path / "final").get_input_embeddings().weight
    assert weight.shape[0] == rows
    assert weight[-1].unique().tolist() == [7.0]
    if more < 0:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "final" / name).unlink()
        assert with_adapter(tmp_path / "final").get_input_embeddings().weight.shape[0] == rows


def test_a_base_that_lacks_weights_is_one_line(saved, tmp_path, capsys):
    """They were drawn at random, and the adapter put on it."""
    base, place = tmp_path / "base", tmp_path / "final"
    shutil.copytree(saved / "whole", base)
    shutil.copytree(saved / "adapter", place)
    file = place / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))
    without_norm(base)
    (tmp_path / "config.yaml").write_text(RUN)
    for command in (
        lambda: train_grpo.main(["--config", str(tmp_path / "config.yaml"), "--evaluate", str(place)]),
        lambda: export.main([str(tmp_path), "--merge"]),
        lambda: export.main([str(tmp_path), "--merge", "--base", str(base)]),
    ):
        capsys.readouterr()
        assert command() == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{base}: its weights lack model.norm.weight")


def test_an_adapter_is_loaded_on_a_base_that_is_quantised_as_in_training(saved):
    trained = ModelConfig(loader="transformers", name="a/b", load_in_4bit=True)
    assert load_checkpoint(saved / "adapter", trained)[0].get_base_model().is_loaded_in_4bit


def test_a_folder_that_is_no_runs_is_one_line(tmp_path, capsys):
    for main, lacks in ((ask.main, "config.yaml"), (export.main, "folder final")):
        assert main([str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{tmp_path}: holds no {lacks}; give the folder of a")


def test_whole_ones_are_read(saved, tmp_path, capsys):
    """Pickled weights and weights in several files too."""
    assert [without_weights(saved / kind) for kind in ("whole", "adapter")] == [None, None]
    model = AutoModelForCausalLM.from_pretrained(saved / "whole")
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert without_weights(tmp_path / "parts") is None
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert without_weights(tmp_path) is None
    (tmp_path / "run.yaml").write_text(RUN)
    for kind in ("whole", "adapter"):
        command = ["--config", str(tmp_path / "run.yaml"), "--evaluate", str(saved / kind)]
        assert train_grpo.main(command) == 0
        assert json.loads(capsys.readouterr().out)["accuracy_problems"] == 4


def test_what_cannot_be_saved_is_refused_before_it_is_trained(saved, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(saved / "whole")
    tokenizer = AutoTokenizer.from_pretrained(saved / "whole")
    require_savable(model, tokenizer, "some/model")
    model.config.made_up = object()  # no JSON
    with pytest.raises(ConfigError, match=r"model\.name: could not be saved again \(.*JSON serializable"):
        require_savable(model, tokenizer, "some/model", "model.name")
