"""Export: a merged adapter is verified against base plus adapter, and a useless one is refused."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SiglipVisionConfig,
)

from recipes import export
from recipes.config.load import load_config
from recipes.export import LOGITS_TOLERANCE, _fault, _relative, main
from recipes.models.checkpoint import with_adapter
from recipes.models.manifest import note_base, seal
from recipes.models.tokenizers import character_tokenizer
from recipes.report.model_card import model_card

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def llama(vocab_size, **more):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes, **more))


def qwen3_moe(vocab_size):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(vocab_size=vocab_size, num_key_value_heads=2, **sizes, **experts)
    )


def tied(vocab_size):
    return llama(vocab_size, tie_word_embeddings=True)


def run_folder(tmp_path, dtype=torch.float32, learnt=True, model_of=llama, **lora):
    """A run's folder as training leaves it: an adapter in final/, figures and config."""
    tokenizer = character_tokenizer("0123456789")
    base = tmp_path / "base"
    model_of(len(tokenizer)).to(dtype).save_pretrained(base)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=dtype),
        LoraConfig(r=4, target_modules="all-linear", **lora),
    )
    if learnt:
        for name, weight in model.named_parameters():
            if (
                "lora_B" in name
                or "lora_bias" in name
                or "trainable_tokens" in name
                or "modules_to_save" in name
            ):
                torch.nn.init.normal_(weight, std=0.1)
    run = tmp_path / "run"
    model.save_pretrained(run / "final")
    tokenizer.save_pretrained(run / "final")
    evaluated = {
        "accuracy": 0.25,
        "accuracy_interval": [0.1, 0.4],
        "accuracy_lenient": 0.5,
        "accuracy_problems": 64,
    }
    lines = [
        {"step": 0, **evaluated, "accuracy": 0.125},
        {"step": 7, "reward": 1.5, "rewards": {"integer": 0.75}, "time": {"forward": 2.5},
         "memory": {"forward": {"tensor_peak_mib": 96.0}}, "device": "cpu", **evaluated},
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "head.json").write_text(json.dumps({"impl": "memhead", "calls": 7, "rows": 70}))
    errors = {"logprob_error": 2e-7, "gradient_error": 3e-7}
    (run / "head_check.json").write_text(json.dumps({"memhead": errors}))
    (run / "environment.json").write_text(json.dumps({"cpu": "a CPU", "packages": {"trl": "1.15.0"}}))
    (run / "config.yaml").write_text(load_config(QUICKSTART).to_yaml())
    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_weights_are_proven_and_load_alone(tmp_path, capsys, dtype):
    run = run_folder(tmp_path, dtype)
    assert main([str(run), "--merge"]) == 0
    proof = json.loads(capsys.readouterr().out)
    assert proof["changed_weights"] == proof["adapted_weights"] == 14
    assert proof["logits_error"] <= proof["allowed"] < proof["adapter_effect"]
    assert AutoModelForCausalLM.from_pretrained(run / "merged").config.num_hidden_layers == 2
    card = (run / "merged" / "README.md").read_text()
    for figure in (
        "7 optimizer steps; greedy accuracy on 64 problems",
        "| accuracy | 0.125 [0.100, 0.400] | 0.250 [0.100, 0.400] |",
        "| accuracy, lenient | 0.500 | 0.500 |",
        "|   integer | 0.750 | 0.750 |",
        "| forward | 2.5 | 100 % | 96.0 MiB |",
        "called 7 times",
        "2.0e-07",
        "a CPU",
        "trl 1.15.0",
        "loader: scratch",
    ):
        assert figure in card
    front = yaml.safe_load(card.split("---")[1])
    assert front["tags"] == ["grpo", "trl", "memhead"]
    assert "base_model" not in front  # it was made from nothing


@pytest.mark.parametrize("model_of", [llama, tied])
@pytest.mark.parametrize(
    "lora",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [1, 2]},
        {"use_dora": True},
        {"use_rslora": True},
    ],
    ids=lambda lora: "-".join(lora),
)
def test_what_is_trained_beside_an_adapter_is_merged_in_the_dtype_of_the_base(tmp_path, model_of, lora):
    proof = export.merge(run_folder(tmp_path, torch.bfloat16, model_of=model_of, **lora))
    assert (
        proof["logits_error"] < 5 / 2**8 < proof["adapter_effect"]
    )  # a rounding is 1 / 2**8 of a weight at most
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged", dtype="auto")
    assert {weight.dtype for weight in merged.parameters()} == {torch.bfloat16}


def test_the_proof_reads_no_control_tokens(tmp_path, monkeypatch):
    """Of SmolLM2, whose first 17 tokens they are, merges in bfloat16 were refused."""
    seen, logits = [], export._logits
    monkeypatch.setattr(export, "_logits", lambda model, ids: seen.append(ids) or logits(model, ids))
    run = run_folder(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    assert added
    export.merge(run)
    assert len(seen) == 3
    for ids in seen:
        assert torch.equal(ids, seen[0])
        assert ids.shape == (1, 32)
        assert set(ids[0].tolist()) == set(range(len(tokenizer))) - added
    assert export.ordinary_tokens(tokenizer, 1).unique().tolist() == [0]  # nothing but control tokens


def test_the_proofs_tokens_are_spread_over_the_vocabulary_without_what_was_added():
    """A token that was added need not be called special: <|im_start|> of some models is not."""
    tokenizer = character_tokenizer("".join(map(chr, range(1000, 2600))))
    (marker,) = tokenizer.convert_tokens_to_ids(["<|im_start|>"] * tokenizer.add_tokens("<|im_start|>"))
    assert marker not in tokenizer.all_special_ids
    some = export.ordinary_tokens(tokenizer, len(tokenizer))[0].tolist()
    assert [(token - 3) // 50 for token in some] == list(range(32))  # one of each fifty
    few = character_tokenizer("ab")
    few.add_tokens("<|im_start|>")
    assert set(export.ordinary_tokens(few, len(few))[0].tolist()) == set(
        few.convert_tokens_to_ids(["a", "b"])
    )


def test_logits_are_computed_in_float32_and_without_dropout():
    torch.manual_seed(0)
    model = llama(20).bfloat16().train()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    exact = copy.deepcopy(model).double().eval()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        wanted = exact(input_ids=tokens).logits
    assert (export._logits(model, tokens) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_digest_sees_every_bit():
    weight = torch.randn(40, 30)
    assert export._digest(weight) == export._digest(weight.clone()) == export._digest(weight.T.contiguous().T)
    for place in (0, 1199):
        other = weight.clone()
        other.view(torch.int32).flatten()[place] ^= 1
        assert export._digest(other) != export._digest(weight)


def test_experts_are_merged_and_proven(tmp_path, capsys):
    """Their weights are one parameter each, for which peft has a layer of another kind."""
    assert main([str(run_folder(tmp_path, model_of=qwen3_moe)), "--merge"]) == 0
    proof = json.loads(capsys.readouterr().out)
    assert proof["changed_weights"] == proof["adapted_weights"] == 2 * 7  # attention, router, experts twice
    assert proof["logits_error"] <= proof["allowed"] < proof["adapter_effect"]


def test_the_card_names_what_the_hub_knows(tmp_path):
    for config in ("llama3.2_1b_gsm8k", "gsm8k_scratch"):
        (tmp_path / "config.yaml").write_text(load_config(QUICKSTART.with_stem(config)).to_yaml())
        front = yaml.safe_load(model_card(tmp_path).split("---")[1])
        base = {"base_model": "meta-llama/Llama-3.2-1B-Instruct"} if "llama" in config else {}
        found = {key: front[key] for key in ("base_model", "datasets") if key in front}
        assert found == base | {"datasets": ["openai/gsm8k"]}


def test_a_card_alone_is_named(tmp_path, capsys):
    run = run_folder(tmp_path)
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'final' / 'README.md'}\n"


def test_merging_twice_is_refused(tmp_path, capsys):
    run = run_folder(tmp_path)
    assert main([str(run), "--merge"]) == 0
    assert main([str(run), "--merge"]) == 1
    assert "remove it to merge again" in capsys.readouterr().err


def test_an_adapter_with_nan_is_refused_before_anything_is_written(tmp_path, capsys):
    run = run_folder(tmp_path)
    weights = load_file(file := run / "final" / "adapter_model.safetensors")
    weights[next(name for name in weights if "lora_B" in name)][0, 0] = float("nan")
    save_file(weights, file, {"format": "pt"})
    assert main([str(run), "--merge"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {run / 'final'} cannot be merged: NaNs detected")
    assert not (run / "merged").exists()


def test_an_adapter_that_changes_nothing_is_refused(tmp_path, capsys):
    run = run_folder(tmp_path, learnt=False)
    assert main([str(run), "--merge"]) == 1
    assert "equal the base" in capsys.readouterr().err
    assert not (run / "merged").exists()


def test_the_base_may_be_named(tmp_path, capsys):
    run = run_folder(tmp_path)
    place = run / "final" / "adapter_config.json"
    quantised = {**json.loads(place.read_text()), "base_model_name_or_path": "its-4bit-copy"}
    place.write_text(json.dumps(quantised))
    (tmp_path / "base" / "generation_config.json").write_text(
        '{"top_p": 0.6}'
    )  # transformers would not save it
    assert main([str(run), "--merge", "--base", str(tmp_path / "base")]) == 0
    said = capsys.readouterr()
    assert "generation_config.json" in said.err
    proof = json.loads(said.out)
    assert proof["changed_weights"] == 14
    assert proof["logits_error"] <= proof["allowed"] < proof["adapter_effect"]


def test_what_is_missing_is_said(tmp_path, capsys, monkeypatch):
    assert main([str(tmp_path)]) == 2
    assert "holds no folder final" in capsys.readouterr().err
    run = run_folder(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([str(run), "--gguf"]) == 1
    assert "add --merge" in capsys.readouterr().err
    assert main([str(run), "--merge", "--gguf"]) == 1
    said = capsys.readouterr().err
    assert "convert_hf_to_gguf.py on the PATH" in said
    assert "pip install sentencepiece" in said


@pytest.mark.parametrize(
    "options", [["--base", "x"], ["--saver", "unsloth"], ["--merge", "--saver", "unsloth", "--base", "x"]]
)
def test_an_option_that_would_do_nothing_is_refused(tmp_path, capsys, options):
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), *options])
    assert "--base: names" in (said := capsys.readouterr().err) or "--saver: says" in said


def test_an_adapter_without_a_base_is_refused(tmp_path, capsys):
    run = run_folder(tmp_path)
    place = run / "final" / "adapter_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "base_model_name_or_path": None}))
    assert main([str(run), "--merge"]) == 2
    assert "base_model_name_or_path is empty" in capsys.readouterr().err


def test_unsloths_saver_is_for_what_unsloth_trained(tmp_path, capsys, without_unsloth):
    run = run_folder(tmp_path)
    assert main([str(run), "--merge", "--saver", "unsloth"]) == 1
    assert "was trained by model.loader: scratch; leave --saver out" in capsys.readouterr().err
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"] = {"loader": "unsloth", "name": "some/model"}
    config["run"]["warm_start"] = None
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main([str(run), "--merge", "--saver", "unsloth"]) == 1
    assert "Unsloth does not start here" in capsys.readouterr().err
    assert not (run / "merged").exists()

    start = (tmp_path / "base").rename(tmp_path / "warm_start")
    file = run / "final" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(start)}))
    seal(start)
    note_base(run / "final", start)
    (start / "config.json").write_text("{}")
    seal(start)  # as another run's
    assert main([str(run), "--merge", "--saver", "unsloth"]) == 2
    assert f"of its base {start}, it is another model" in capsys.readouterr().err


def spoil(place, change):
    """Changes one tensor of the weights on the disk."""
    from safetensors.torch import load_file, save_file

    weights = load_file(place / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = change(weights[name])
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change",
    [lambda weight: weight * 1.5, lambda weight: weight.flip(0), torch.zeros_like],
    ids=["scaled", "turned", "empty"],
)
def test_a_copy_that_is_damaged_on_the_disk_is_refused_and_removed(tmp_path, capsys, monkeypatch, change):
    """The proof is of the model as it will be loaded."""
    run = run_folder(tmp_path)
    save = LlamaForCausalLM.save_pretrained

    def save_damaged(self, place, *rest, **more):
        save(self, place, *rest, **more)
        if Path(place).name.startswith("merged"):
            spoil(Path(place), change)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save_damaged)
    assert main([str(run), "--merge"]) == 1
    error = capsys.readouterr().err
    assert "the merged model's logits are not those of base and adapter" in error
    proof = json.loads(error[error.index("({") + 1 : error.rindex(")")])
    assert proof["allowed"] == 1e-4 < proof["logits_error"]
    assert not (run / "merged").exists()


@pytest.mark.parametrize(
    ("dtype", "allowed"), [("float32", 1e-4), ("bfloat16", 0.05), ("float16", 0.01)], ids=str
)
def test_what_a_merge_may_be_off_by(dtype, allowed):
    assert LOGITS_TOLERANCE[dtype] == allowed


def test_an_error_is_the_tokens_median_as_a_share_of_the_largest_logit():
    wanted = torch.tensor([[[1.0, -4.0], [0.0, 0.5], [2.0, 1.0]]])
    found = wanted + torch.tensor([[[0.25, -0.5], [0.125, 0.0], [0.0, 9.0]]])
    assert _relative(found, wanted) == pytest.approx(0.5 / 4.0)
    assert _relative(wanted * 0, wanted * 0) == 0.0
    for fault in (math.nan, math.inf):
        found[0, 1, 1] = fault
        assert _relative(found, wanted) == math.inf


def test_a_merged_weight_is_rounded_once(tmp_path):
    """In bfloat16, to what the sum in float32 rounds to; peft alone rounds the adapter's product first."""
    run = run_folder(tmp_path, torch.bfloat16)
    export.merge(run)
    merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype="auto").state_dict()
    model = with_adapter(run / "final")
    layers = [
        (name, layer) for name, layer in model.get_base_model().named_modules() if hasattr(layer, "lora_A")
    ]
    assert len(layers) == 14
    for name, layer in layers:
        product = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        wanted = layer.base_layer.weight.double() + layer.scaling["default"] * product
        found = merged[f"{name}.weight"]
        assert found.dtype == torch.bfloat16
        assert (found == wanted.float().bfloat16()).float().mean() > 0.999  # but for ties of a float32 sum


def test_nothing_is_loaded_with_code_of_its_own_and_nothing_keeps_a_graph(tmp_path, monkeypatch):
    given, graphs = [], []
    for kind in (AutoModelForCausalLM, AutoTokenizer):
        load = kind.from_pretrained

        def watched(*place, load=load, **options):
            given.append(options.get("trust_remote_code"))
            return load(*place, **options)

        monkeypatch.setattr(kind, "from_pretrained", watched)
    logits = export._logits
    monkeypatch.setattr(export, "_logits", lambda *a: graphs.append(found := logits(*a)) or found)
    run = run_folder(tmp_path)
    given.clear()
    for base in (None, str(tmp_path / "base")):
        shutil.rmtree(run / "merged", ignore_errors=True)
        assert export.merge(run, base)["changed_weights"] == 14
    assert len(given) >= 6
    assert set(given) == {False}
    assert [found.requires_grad for found in graphs] == [False] * 6
    assert {found.dtype for found in graphs} == {torch.float32}


def proof(**changes):
    good = {
        "adapted_weights": 3,
        "changed_weights": 3,
        "logits_error": 0.1,
        "adapter_effect": 1.0,
        "allowed": 0.1,
    }
    return _fault({**good, **changes})  # fmt: skip


def test_faults_of_a_merge():
    assert proof() == ""
    assert "equal the base" in proof(changed_weights=0)
    assert "logits are not those" in proof(logits_error=0.1000001)
    assert "logits are not those" in proof(logits_error=float("inf"))
    assert "logits are not those" in proof(logits_error=float("nan"))


@pytest.mark.parametrize("whole", [False, True], ids=["merged", "without an adapter"])
def test_gguf_converts_the_merged_model_or_the_whole_final_one(tmp_path, capsys, monkeypatch, whole):
    run = run_folder(tmp_path)
    if whole:
        shutil.rmtree(run / "final")
        shutil.copytree(tmp_path / "base", run / "final")
    else:
        assert main([str(run), "--merge"]) == 0
    source = run / ("final" if whole else "merged")
    tools = tmp_path / "tools"
    tools.mkdir()
    converter = tools / "convert_hf_to_gguf.py"
    converter.write_text(
        "import json, pathlib, sys\npathlib.Path(sys.argv[3]).write_text(json.dumps(sys.argv[1:]))\n"
    )
    converter.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    capsys.readouterr()
    assert main([str(run), "--gguf"]) == 0
    target = run / f"{source.name}.gguf"
    assert capsys.readouterr().out.strip() == str(target)
    assert json.loads(target.read_text()) == [
        str(source),
        "--outfile",
        str(target),
        "--outtype",
        "f16",
    ]
    converter.write_text("raise SystemExit(3)\n")
    assert main([str(run), "--gguf"]) == 1
    assert "failed on" in capsys.readouterr().err


def test_a_model_whose_text_configuration_is_within_it_is_merged(tmp_path):
    torch.manual_seed(0)
    tokenizer = character_tokenizer("0123456789")
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
    sight = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**text), vision_config=SiglipVisionConfig(**sight), mm_tokens_per_image=4
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora)
    adapted.save_pretrained(tmp_path / "run" / "final")
    tokenizer.save_pretrained(tmp_path / "run" / "final")
    proof = export.merge(tmp_path / "run")
    # the image part's q_proj is adapted too, and no token shows it
    assert proof["changed_weights"] == proof["adapted_weights"] >= 2
    assert proof["logits_error"] < 1e-5 < proof["adapter_effect"]
