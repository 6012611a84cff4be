"""A model whose generation_config.json transformers loads and refuses to save: what is trained from it is saved."""

import json
from types import SimpleNamespace

import pytest
from tiny import saved_llama
from transformers import AutoModelForCausalLM, GenerationConfig

import train_grpo
from recipes.config.schema import ModelConfig
from recipes.models.checkpoint import load_checkpoint
from recipes.models.generation_config import refusal, settle_generation_config
from recipes.problems import ConfigError

LLAMA_2 = {"temperature": 0.9, "top_p": 0.6}  # meta-llama/Llama-2-7b-chat-hf's, as it was for long


def folder(place, **more):
    saved_llama(place)
    path = place / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return place


@pytest.mark.parametrize(
    ("given", "kept", "lost", "said"),
    [
        (LLAMA_2, {**LLAMA_2, "do_sample": True}, set(), "do_sample is true"),
        ({"top_k": 4, "penalty_alpha": 0.5}, {"top_k": 4, "do_sample": True}, set(), "do_sample is true"),
        (
            {"length_penalty": 2.0, "top_p": 0.5},
            {"top_p": 0.5, "do_sample": True},
            {"length_penalty"},
            "length_penalty left out",
        ),
        ({"pad_token_id": -1, "top_p": 0.5}, {}, {"pad_token_id", "top_p"}, "the token ids alone"),
        ({"temperature": 0.5, "do_sample": True}, {"temperature": 0.5}, set(), None),
    ],
)
def test_what_could_not_be_saved_is_mended_and_said(tmp_path, given, kept, lost, said):
    place = folder(tmp_path / "base", **given)
    model = AutoModelForCausalLM.from_pretrained(place)
    line = settle_generation_config(model, str(place))
    assert (line is None) == (said is None)
    assert (said or "") in (line or "")
    model.save_pretrained(tmp_path / "again")
    again = GenerationConfig.from_pretrained(tmp_path / "again").to_diff_dict()
    ids = json.loads((place / "generation_config.json").read_text())
    assert {name: again[name] for name in kept} == kept
    assert not lost & again.keys()
    assert again["eos_token_id"] == ids["eos_token_id"]


def test_the_line_says_what_transformers_found_first():
    found = refusal(GenerationConfig(temperature=0.5, top_p=0.5))
    assert found.startswith("`temperature`: `do_sample` is")
    assert "top_p" not in found
    assert refusal(GenerationConfig(eos_token_id=0)) is None


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no id. Set it"), "no id"),
        (TypeError(""), "TypeError"),
        (ValueError("-" + "x" * 300), "x" * 200),
    ],
)
def test_so_does_that_of_what_is_no_finding(error, line):
    def fail(strict):
        raise error

    assert refusal(SimpleNamespace(validate=fail)) == line


TRICKS = {
    "num_beams": 3,
    "no_repeat_ngram_size": 2,
    "min_p": 0.2,
    "min_new_tokens": 3,
    "suppress_tokens": [5],
}


def test_what_would_change_the_sampling_behind_a_run_is_left_out_and_said(tmp_path):
    """transformers takes from the file whatever the call leaves open: every setting that a run does not write."""
    place = folder(tmp_path / "base", **TRICKS, use_cache=False, temperature=0.5, do_sample=True)
    model = AutoModelForCausalLM.from_pretrained(place)
    line = settle_generation_config(model, str(place))
    assert all(name in line for name in [*TRICKS, "use_cache"])
    effective, _ = model._prepare_generation_config(GenerationConfig(do_sample=True, temperature=1.0))
    plain, _ = AutoModelForCausalLM.from_pretrained(folder(tmp_path / "plain"))._prepare_generation_config(
        GenerationConfig(do_sample=True, temperature=1.0)
    )
    assert effective.to_dict() == plain.to_dict()
    assert model.generation_config.temperature == 0.5
    assert settle_generation_config(model, str(place)) is None


def test_a_checkpoint_is_evaluated_as_its_run_samples(tmp_path):
    place = folder(tmp_path / "base", **TRICKS)
    model, _ = load_checkpoint(place, ModelConfig(loader="transformers", name=str(place)))
    assert model.generation_config.num_beams is None


def test_the_first_token_may_be_the_end(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder(tmp_path / "base", eos_token_id=0))
    assert settle_generation_config(model, "base") is None
    assert model.generation_config.eos_token_id == 0


@pytest.mark.parametrize("ends", ["x", [1, "x"], -1, True, 1.5])
def test_end_tokens_that_are_none_are_refused(tmp_path, ends):
    place = folder(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(place)
    model.generation_config.eos_token_id = ends
    with pytest.raises(ConfigError, match=r"model\.name: its generation_config\.json has an eos_token_id"):
        settle_generation_config(model, str(place), "model.name")


def test_a_run_from_such_a_model_ends_with_its_model_saved(tmp_path, capsys):
    place = folder(tmp_path / "base", **LLAMA_2)
    config = tmp_path / "run.yaml"
    config.write_text(f"""
model: {{loader: transformers, name: {place}}}
task: {{name: countdown}}
grpo: {{max_steps: 2, per_device_train_batch_size: 4, num_generations: 4, max_completion_length: 4, use_cpu: true}}
run: {{name: tiny, output_root: {tmp_path}, save_every: 1, checks: false, evaluation: {{size: 4}}}}
""")
    assert train_grpo.main(["--config", str(config)]) == 0
    assert "generation_config.json of" in capsys.readouterr().out
    assert GenerationConfig.from_pretrained(tmp_path / "tiny" / "final").top_p == 0.6
