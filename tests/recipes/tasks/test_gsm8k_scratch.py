"""GSM8K from nothing: the tokenizer, and a whole run with adapters – interrupted, resumed, evaluated, exported."""

import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import train_grpo
from recipes import export
from recipes.config.load import load_config
from recipes.models import load as models
from recipes.models.generation import by_transformers, encode, token_ids
from recipes.models.tokenizers import bpe_tokenizer
from recipes.tasks import gsm8k
from recipes.training.callbacks import BypassGuard
from recipes.training.evaluation import evaluator
from recipes.training.warm_start import IGNORED, collate

CONFIG = str(Path(__file__).parents[3] / "configs" / "gsm8k_scratch.yaml")
TEXTS = [f"Ann has {i} apples and buys {i + 3} more. How many apples has she?" for i in range(50)]


def test_any_text_is_written_and_read_back():
    tokenizer = bpe_tokenizer(TEXTS, 512)
    rng = random.Random(0)
    for text in (
        "",
        " a  b\n\tc ",
        "Größe ≠ 漢字 🙂",
        "".join(chr(rng.randrange(32, 0x2FFF)) for _ in range(200)),
    ):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer(TEXTS[0]).input_ids) < len(TEXTS[0]) / 3
    assert tokenizer.convert_ids_to_tokens(tokenizer("1207").input_ids) == ["1", "2", "0", "7"]
    assert 261 < len(tokenizer) <= 512


def test_the_same_texts_give_the_same_tokenizer_and_saving_keeps_it(tmp_path):
    tokenizer = bpe_tokenizer(TEXTS, 400)
    assert bpe_tokenizer(iter(TEXTS), 400).get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "12?"}]
    for one in (tokenizer, saved):
        text = one.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert text == "<|system|>s<eos><|user|>12?<eos><|assistant|>"
        ids = one(text, add_special_tokens=False).input_ids
        assert one.convert_ids_to_tokens(ids) == [
            "<|system|>", "s", "<eos>", "<|user|>", "1", "2", "?", "<eos>", "<|assistant|>"
        ]  # fmt: skip
    assert (saved.pad_token, saved.eos_token, saved.padding_side) == ("<pad>", "<eos>", "left")


def test_a_chat_is_learnt_on_its_completion_alone():
    tokenizer = bpe_tokenizer(TEXTS, 400)
    prompt = [{"role": "user", "content": "How many?"}]
    batch = collate(tokenizer, [(prompt, "12 apples"), (prompt, "3")])
    whole = tokenizer.decode(batch["input_ids"][0])
    assert whole == "<|user|>How many?<eos><|assistant|>12 apples<eos>"
    assert [tokenizer.decode(row[row != IGNORED]) for row in batch["labels"]] == ["12 apples<eos>", "3<eos>"]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The config on fifty problems, with a model of a few thousand parameters, adapters, and a reward of the user's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "brevity_file.py").write_text(
        "def brevity(completions, **columns):\n    return [-len(chat[0]['content']) for chat in completions]\n"
    )
    rewards = {"brevity_file.brevity": 0.1, "tag_count": 0.5}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"base": CONFIG, "task": {"rewards": rewards}}))
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        lines = [
            {"question": text, "answer": f"It is 1 + 1 = <<1+1=2>>2.\n#### {i}"}
            for i, text in enumerate(TEXTS)
        ]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [
        "--config", "mine.yaml", f"task.dataset={data}", f"run.output_root={tmp_path}", "run.name=tiny",
        "model.scratch.hidden_size=32", "model.scratch.heads=2", "model.scratch.layers=1",
        "model.scratch.intermediate_size=32", "model.scratch.vocabulary=512", "lora.r=4", "grpo.max_steps=3",
        "grpo.per_device_train_batch_size=8", "grpo.num_generations=4", "grpo.max_completion_length=12",
        "run.save_every=1", "run.warm_start.steps=2", "run.warm_start.batch_size=8", "run.evaluation.size=8",
        "run.evaluation.samples=2", "run.evaluation.every=2",
    ]  # fmt: skip


def test_interrupted_resumed_evaluated_and_exported(command, tmp_path, capsys, monkeypatch):
    ended = BypassGuard.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        ended(self, args, state, control, **kwargs)
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    reads = []
    read_rows = gsm8k.read_rows
    monkeypatch.setattr(gsm8k, "read_rows", lambda *what: reads.append(what[1]) or read_rows(*what))
    monkeypatch.setattr(BypassGuard, "on_step_end", interrupt)
    assert train_grpo.main(command) == 130
    assert reads == ["train", "test"]  # by tokenizer, warm start, rewards, GRPO and evaluation together
    monkeypatch.setattr(BypassGuard, "on_step_end", ended)
    assert train_grpo.main([*command, "--resume"]) == 0
    assert reads == ["train", "test"] * 2
    run = tmp_path / "tiny"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "warm_start" not in line]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert lines[1]["rewards"].keys() == {"brevity_file.brevity", "tag_count"}
    for line in (lines[0], lines[2], lines[3]):
        assert {"accuracy", "accuracy_lenient", "accuracy_interval", "pass@1", "pass@2", "maj@2"} <= set(line)

    # The adapters belong to the model after the supervised start, in the resumed session as in the first.
    started = AutoModelForCausalLM.from_pretrained(run / "warm_start")
    adapted = AutoPeftModelForCausalLM.from_pretrained(run / "final")
    adapted_base = dict(adapted.get_base_model().named_parameters())
    for name, weight in started.named_parameters():
        assert torch.equal(adapted_base.get(name, adapted_base.get(f"{name[:-6]}base_layer.weight")), weight)

    capsys.readouterr()
    assert train_grpo.main([*command, "--evaluate", str(run / "final")]) == 0
    measured = json.loads(capsys.readouterr().out)
    same = ("accuracy", "accuracy_lenient", "pass@1", "maj@2", "accuracy_problems")
    assert {key: measured[key] for key in same} == {key: lines[3][key] for key in same}

    assert export.main([str(run), "--merge"]) == 0
    tokens = torch.arange(20)[None]
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    with torch.no_grad():
        wanted, found = adapted(input_ids=tokens).logits, merged(input_ids=tokens).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    card = (run / "merged" / "README.md").read_text()
    for figure in (
        "3 optimizer steps",
        "on 8 problems",
        "| accuracy, lenient |",
        "| pass@2 |",
        "adapters of rank 4",
    ):
        assert figure in card


def test_samples_leave_the_random_state_and_may_be_left_out(command, tmp_path):
    config = load_config("mine.yaml", command[2:])
    task = config.make_task()
    model, tokenizer = models.load(config.model, task, seed=0)
    measure = evaluator(config, task, by_transformers(model, tokenizer))
    before = torch.get_rng_state()
    first, second = measure(), measure()
    assert torch.equal(torch.get_rng_state(), before)
    first.pop("evaluation_seconds"), second.pop("evaluation_seconds")
    assert first == second
    assert "pass@2" in first
    assert not any("@" in key for key in measure(sampled=False))


def test_every_prompt_is_rendered_as_training_renders_it(command, monkeypatch):
    """grpo.chat_template_kwargs reaches the template in TRL's trainer and in everything around it."""
    told = {}  # function of ours or of TRL on the way to the template -> what the template was told
    render = PreTrainedTokenizerBase.apply_chat_template

    def recorded(self, *arguments, **options):
        on_the_way = {frame.f_code.co_name for frame, _ in traceback.walk_stack(sys._getframe())}
        for place in ("collate", "complete", "check_head", "_tokenize_prompts"):
            if place in on_the_way:
                told.setdefault(place, set()).add(options.get("terse"))
        return render(self, *arguments, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", recorded)
    command = [*command, "grpo.chat_template_kwargs={terse: really}", "grpo.max_steps=1"]
    kept = [text for text in command if text != "grpo.max_steps=3"]
    assert train_grpo.main(kept) == 0
    assert told == {place: {"really"} for place in ("collate", "complete", "check_head", "_tokenize_prompts")}
    told.clear()
    assert train_grpo.main([*kept, "--evaluate", "tiny/final"]) == 0
    assert told == {"complete": {"really"}}


def test_template_arguments_change_the_prompt(monkeypatch):
    monkeypatch.setattr("recipes.models.tokenizers.CHAT_TEMPLATE", "{{ messages[0].content }}{{ tone }}")
    tokenizer = bpe_tokenizer(TEXTS, 400)
    prompt = [{"role": "user", "content": "How many?"}]
    assert tokenizer.decode(encode(tokenizer, [prompt], {"tone": " Now!"}).input_ids[0]) == "How many? Now!"
    assert tokenizer.decode(token_ids(tokenizer, [prompt], {"tone": " Now!"})[0]) == "How many? Now!"
    assert tokenizer.decode(encode(tokenizer, [prompt]).input_ids[0]) == "How many?"
