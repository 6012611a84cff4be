"""The sizes of a model, compared with transformers' and PEFT's counts on real weights, and with model cards."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from recipes.config.load import load_config
from recipes.config.schema import LoraSection
from recipes.plan.shapes import CacheLayer, ModelShape, Trained, model_config, sizes
from recipes.problems import ConfigError

pytestmark = pytest.mark.usefixtures("without_unsloth")
ROOT = Path(__file__).parents[3]
SMALL = {
    "vocab_size": 103,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
KINDS = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gpt2": {"num_key_value_heads": None},
    "gemma3_text": {"head_dim": 16},
    "phi3": {},
    "olmo2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, **EXPERTS},
}


def small_config(kind):
    given = {**SMALL, **KINDS[kind]}
    return AutoConfig.for_model(kind, **{key: value for key, value in given.items() if value is not None})


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_and_adapters_are_transformers_and_pefts(kind):
    shape, trained = sizes(
        small_config(kind), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    model = AutoModelForCausalLM.from_config(small_config(kind))
    assert shape.parameters == model.num_parameters()
    assert (shape.vocab, shape.hidden) == tuple(model.get_output_embeddings().weight.shape)
    assert shape.kind == kind
    assert shape.dtype == "float32"
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert trained.adapters == adapted.get_nb_trainable_parameters()[0]
    assert trained.whole == 0
    assert not trained.head


@pytest.mark.parametrize("kind", KINDS)
def test_without_adapters_all_is_trained(kind):
    shape, trained = sizes(small_config(kind), None)
    assert trained == Trained(adapters=0, whole=shape.parameters, adapted=0, head=True)


@pytest.mark.parametrize("kind", KINDS)
def test_linears_are_those_that_bitsandbytes_takes(kind):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    shape = sizes(small_config(kind), None)[0]
    model = AutoModelForCausalLM.from_config(small_config(kind))
    skipped = get_keys_to_not_convert(model)
    model = replace_with_bnb_linear(model, skipped, BitsAndBytesConfig(load_in_4bit=True))
    taken = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    assert taken
    assert shape.linear == sum(m.in_features * m.out_features for m in taken)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["norm", "mlp"]], ids=str)
def test_modules_saved_in_full_are_counted(kind, saved):
    def adapters():
        return LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=saved, task_type="CAUSAL_LM")

    trained = sizes(small_config(kind), adapters())[1]
    model = get_peft_model(
        AutoModelForCausalLM.from_config(small_config(kind)).to(torch.bfloat16), adapters()
    )
    copies = [p for n, p in model.named_parameters() if ".modules_to_save." in n]
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in copies)
    assert trained.whole == sum(p.numel() for p in copies)
    assert trained.adapters + trained.whole == model.get_nb_trainable_parameters()[0]
    assert trained.head is (saved == ["lm_head"])


def test_adapted_weights_are_those_that_a_merge_changes():
    trained = sizes(small_config("llama"), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))[1]
    assert trained.adapted == 3 * (48 * 48 + 112 * 48)
    experts = sizes(small_config("qwen3_moe"), LoraConfig(r=4, target_modules="all-linear"))[1]
    attention, router, mlps = 2 * 48 * 48 + 2 * 48 * 24, 4 * 48, 4 * 3 * 48 * 32
    assert experts.adapted == 3 * (attention + router + mlps)


def test_layers_that_are_not_there_are_an_error_with_the_key():
    with pytest.raises(
        ConfigError, match=r"^lora\.target_modules: .*gate_proj.*; name layers that the model has"
    ):
        sizes(small_config("gpt2"), LoraConfig(r=4, target_modules=["gate_proj"]))
    some = LoraConfig(r=4, target_modules=["q_proj", "self_attn.k_proj", "proj", "ate_proj"])
    with pytest.raises(ConfigError, match=r"remove ate_proj or proj, name layers"):
        sizes(small_config("llama"), some)  # the others are there, and a part of a name is none


def test_what_a_cache_keeps():
    windows = AutoConfig.for_model(
        "gemma3_text", **{**SMALL, "head_dim": 16, "sliding_window": 8, "num_hidden_layers": 6}
    )
    assert set(windows.layer_types) == {"sliding_attention", "full_attention"}
    cache = sizes(windows, None)[0].cache
    assert cache == (CacheLayer(2 * 2 * 16, 7),) * 5 + (CacheLayer(2 * 2 * 16),)
    assert [layer.elements(20) for layer in cache[4:]] == [7 * 64, 20 * 64]
    assert CacheLayer(width=0, fixed=5).elements(20) == 5


def test_known_totals(without_unsloth):
    """Parameters as the model cards and the checkpoints' metadata give them, from the table alone."""
    table = yaml.safe_load((ROOT / "recipes" / "plan" / "model_shapes.yaml").read_text())
    known = {
        "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
        "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
        "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
        "Qwen/Qwen2.5-3B": 3_085_938_688,
        "Qwen/Qwen3-0.6B": 596_049_920,
        "Qwen/Qwen3-1.7B": 1_720_574_976,
        "Qwen/Qwen3-4B": 4_022_468_096,
        "Qwen/Qwen3-30B-A3B": 30_532_122_624,
        "google/gemma-3-1b-it": 999_885_952,
        "gpt2": 124_439_808,
        "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    }
    for name, total in known.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**table[name]))
        assert model.num_parameters() == total
    ours = {load_config(path).model.name for path in (ROOT / "configs").glob("*.yaml")}
    assert ours - {None} <= set(table)


def test_the_8b_has_the_adapters_that_its_cards_tell():
    """41,943,040 of rank 16 on all seven linears: what Unsloth prints for it."""
    table = yaml.safe_load((ROOT / "recipes" / "plan" / "model_shapes.yaml").read_text())
    config = AutoConfig.for_model(**table["unsloth/meta-Llama-3.1-8B-Instruct"])
    shape, trained = sizes(config, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert trained.adapters == 41_943_040
    assert trained.adapted == shape.linear == 8_030_261_248 - 2 * 128256 * 4096 - (2 * 32 + 1) * 4096
    assert shape.dtype == "bfloat16"


def config_of(tmp_path, name):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{loader: transformers, name: {name}}}\ntask: {{name: gsm8k}}\n")
    return load_config(path)


def test_a_local_folder_gives_its_dtype_and_quantisation(tmp_path):
    kind = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "quant_method": "bitsandbytes"}
    for written, expected in (({}, ""), ({"quantization_config": kind}, "4bit-double")):
        config = small_config("llama").to_dict() | {"dtype": "float16"} | written
        (tmp_path / "config.json").write_text(json.dumps(config))
        adapted = config_of(tmp_path, tmp_path).model_copy(update={"lora": LoraSection()})
        shape = sizes(model_config(adapted), None)[0]
        assert shape.dtype == "float16"
        assert shape.quantised == expected


def test_what_transformers_cannot_train_is_not_planned_for_it(tmp_path):
    """Unsloth, which has kernels of its own, may be able to."""
    written = small_config("llama").to_dict() | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(written))
    config = config_of(tmp_path, tmp_path)
    with pytest.raises(ConfigError, match=r"^model\.name: is quantised by awq"):
        model_config(config)
    unsloths = config.model.model_copy(update={"loader": "unsloth"})
    assert model_config(config.model_copy(update={"model": unsloths})).hidden_size == 48


def test_an_architecture_that_nobody_knows_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(ConfigError, match=r"^model\.name: .*nonesuch") as error:
        model_config(config_of(tmp_path, tmp_path))
    assert len(str(error.value).splitlines()) == 1


def test_a_model_from_scratch_has_the_size_that_is_made():
    from recipes.models.load import load

    config = load_config(ROOT / "configs" / "quickstart.yaml")
    shape = ModelShape.of(load(config.model, config.make_task(), 0)[0])
    assert sizes(model_config(config), None)[0] == shape


def test_no_network(tmp_path, monkeypatch):
    """A model that is nowhere on this machine is an error with a remedy; the network is not used."""
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("the plan went to the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(ConfigError, match=r"hf download nobody/nothing config\.json"):
        model_config(config_of(tmp_path, "nobody/nothing"))
    assert model_config(config_of(tmp_path, "google/gemma-3-1b-it")).model_type == "gemma3_text"
