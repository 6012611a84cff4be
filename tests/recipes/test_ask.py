"""A question before and after: the base and the adapter of a saved run, or the two whole models."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from recipes.ask import Answerer, _typed, ask, main, talk
from recipes.config.load import load_config
from recipes.config.schema import ModelConfig, ScratchConfig
from recipes.models.checkpoint import load_checkpoint
from recipes.models.generation import Sampling, by_transformers
from recipes.models.load import load
from recipes.models.precision import Precision
from recipes.models.tokenizers import bpe_tokenizer, character_tokenizer
from recipes.tasks import get_task
from recipes.tasks.countdown import Countdown
from recipes.tracking.run_folder import RunFolder


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.yaml"
    shape = "{hidden_size: 32, layers: 1, intermediate_size: 32, max_positions: 64}"
    path.write_text(
        f"model:\n  loader: scratch\n  scratch: {shape}\ntask:\n  name: countdown\ngrpo:\n  max_completion_length: 6\n"
    )
    return load_config(path)


def changed(model):
    """The model with every trained weight changed."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in filter(lambda weight: weight.requires_grad, model.parameters()):
            weight.add_(0.3 * torch.randn_like(weight))
    return model


def greedy(model, tokenizer, prompt):
    return by_transformers(model, tokenizer)([prompt], Sampling(6))[0][0]


def test_a_whole_model_against_the_one_it_began_as(config, tmp_path):
    run = RunFolder(tmp_path / "run")
    model, tokenizer = load(config.model, config.make_task(), config.run.seed)
    row = config.make_task().held_out[0]
    before = greedy(model, tokenizer, row["prompt"])
    changed(model).save_pretrained(run.final)
    tokenizer.save_pretrained(run.final)
    after = greedy(model, tokenizer, row["prompt"])
    assert before != after
    expected = {"question": row["prompt"], "before training: wrong": before, "after training: wrong": after}
    assert ask(config, run) == expected

    model.save_pretrained(run.path / "warm_start")  # where GRPO began, if there was one
    tokenizer.save_pretrained(run.path / "warm_start")
    assert ask(config, run)["before training: wrong"] == after


def test_an_adapter_against_its_base_and_another_question(config, tmp_path):
    run = RunFolder(tmp_path / "run")
    base, tokenizer = load(config.model, config.make_task(), config.run.seed)
    base.save_pretrained(tmp_path / "base")
    before = greedy(base, tokenizer, "234>24=")
    base.name_or_path = str(tmp_path / "base")
    model = changed(get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")))
    model.save_pretrained(run.final)
    tokenizer.save_pretrained(run.final)
    named = json.loads((run.final / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "base")
    after = greedy(model, tokenizer, "234>24=")
    assert before != after
    expected = {"question": "234>24=", "before training": before, "after training": after}
    assert ask(config, run, "234>24=") == expected


def test_an_adapter_is_put_on_the_base_it_was_trained_on(tmp_path):
    """Of a base in 4 bits; bitsandbytes computes on a CPU too."""
    pytest.importorskip("bitsandbytes")
    scratch = ModelConfig(
        loader="scratch", scratch=ScratchConfig(hidden_size=64, layers=1, intermediate_size=64)
    )
    task = Countdown(Countdown.Options(), 0)
    base, tokenizer = load(scratch, task, 0)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trained = ModelConfig(loader="transformers", name=str(tmp_path / "base"), load_in_4bit=True)
    quantised, tokenizer = load(trained, task, 0)
    model = changed(get_peft_model(quantised, LoraConfig(r=4, target_modules="all-linear")))
    model.save_pretrained(tmp_path / "final")
    tokenizer.save_pretrained(tmp_path / "final")
    again, _ = load_checkpoint(tmp_path / "final", trained)
    assert again.hf_quantizer is not None  # which keeps it from being moved
    ids = tokenizer("234>24=", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_an_empty_answer_is_called_that(config, capsys):
    task = config.make_task()
    model, tokenizer = load(config.model, task, config.run.seed)
    answerer = Answerer(model, tokenizer, config, Precision())
    example = task.held_out[0]["prompt"]
    talk([("after training", answerer)], task, [example])
    assert "(an empty answer)" not in capsys.readouterr().out
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    talk([("after training", answerer)], task, [example])
    assert capsys.readouterr().out.split() == ["(an", "empty", "answer)"]


def test_an_answer_and_an_example_control_no_terminal(config, capsys):
    model, _ = load(config.model, config.make_task(), config.run.seed)
    tokenizer = character_tokenizer("\x1b=")
    with torch.no_grad():  # whatever is asked, the answer is that character, again and again
        head = model.get_output_embeddings()
        head.weight.zero_()
        head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)))
        head.bias[tokenizer.convert_tokens_to_ids("\x1b")] = 1.0
    answerer = Answerer(model, tokenizer, config, Precision())
    task = SimpleNamespace(held_out=[{"prompt": "\x9b2J"}], prompt_of=lambda question, _: question)
    talk([("after training", answerer)], task, ["=", "unknown"])
    printed = capsys.readouterr().out
    assert "\\x1b" * 6 in printed
    assert "it was trained on: \\x9b2J" in printed
    assert all(character.isprintable() or character == "\n" for character in printed)


def test_an_empty_question_is_a_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), " "])
    assert capsys.readouterr().err.endswith(
        "question: is empty; write one, or leave it out to be asked for it\n"
    )


def test_another_question_stands_in_the_place_of_the_last_message(config):
    chat = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1 + 1?"}]
    asked = config.make_task().prompt_of("2 + 2?", chat)
    assert asked == [{"role": "system", "content": "Think."}, {"role": "user", "content": "2 + 2?"}]
    assert chat[1]["content"] == "1 + 1?"


@pytest.mark.parametrize(("name", "column"), [("gsm8k", "question"), ("math", "problem")])
@pytest.mark.parametrize("form", ["plain", "chat"])
def test_a_question_has_before_it_what_was_said_in_training(tmp_path, name, column, form):
    """A plain prompt was replaced as a whole, so the model was asked without its instruction."""
    file = tmp_path / "rows.jsonl"
    rows = [{column: f"{number} + 1?", "answer": str(number + 1)} for number in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kind = get_task(name)
    task = kind(kind.Options(dataset=str(file), held_out=2, prompt=form), 0)
    first, second = task.held_out
    assert task.prompt_of(f"{int(second['answer']) - 1} + 1?", first["prompt"]) == second["prompt"]
    if form == "plain":
        assert task.prompt_of(second["prompt"], first["prompt"]) == second["prompt"]


def test_a_tokenizer_of_bytes_knows_every_question(config):
    model, _ = load(config.model, config.make_task(), config.run.seed)
    characters, of_bytes = character_tokenizer("2+?"), bpe_tokenizer(["2 + 2?"], 270)
    assert [
        Answerer(model, tokenizer, config, Precision()).knows(question)
        for tokenizer in (characters, of_bytes)
        for question in ("2+2?", "\u2211?")
    ] == [True, False, True, True]


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt, lambda: " "])
def test_questions_end_by_ctrl_d_ctrl_c_or_an_empty_line(monkeypatch, end):
    typed = iter([" 2+2? ", "3?"])

    def answer(_):
        question = next(typed, None)
        if question is None and isinstance(end, type):
            raise end
        return " " if question is None else question

    monkeypatch.setattr("builtins.input", answer)
    assert list(_typed()) == ["2+2?", "3?"]
