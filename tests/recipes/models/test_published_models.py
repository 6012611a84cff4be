"""Folders as they are published, that would fail late or train something else without a word: said before training."""

import json
import re
from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model
from tiny import saved_llama
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import train_grpo
from recipes.config.load import load_config
from recipes.config.schema import LoraSection, ModelConfig
from recipes.models.load import load, pretrained_tokenizer
from recipes.models.published import (
    require_blanks,
    require_known_tokens,
    require_open_end,
    require_whole,
    unended_turn,
)
from recipes.models.tokenizers import CHAT_TEMPLATE, bpe_tokenizer, character_tokenizer
from recipes.problems import ConfigError
from recipes.training.evaluation import evaluate_checkpoint


def edit(place, file, **more):
    path = place / file
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def without_an_end(place):
    saved_llama(place)
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (place / file).is_file():
            edit(place, file, eos_token=None)


def with_a_padding_of_its_own(place):
    """[PAD] added to the tokenizer, and the embeddings left as they were."""
    tokenizer = saved_llama(place)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(place)


def with_too_few_embeddings(place):
    saved_llama(place)
    model = AutoModelForCausalLM.from_pretrained(place)
    model.resize_token_embeddings(12)  # <pad>, <eos>, <unk> and the digits to 8
    model.save_pretrained(place)


def with_an_adapter(place):
    saved_llama(place)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(place), lora).save_pretrained(place)


def without_a_head(place):
    """A reward model: its weights lack the head, which would be drawn at random."""
    saved_llama(place)
    LlamaForSequenceClassification.from_pretrained(place).save_pretrained(place)


def by_another_tool(place):
    saved_llama(place)
    edit(place, "config.json", quantization_config={"quant_method": "awq", "bits": 4, "version": "gemm"})


def by_bitsandbytes(place):
    saved_llama(place)
    edit(place, "config.json", quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})


def an_encoder(place):
    tokenizer = saved_llama(place)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(place)


def an_encoder_and_a_decoder(place):
    tokenizer = saved_llama(place)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(place)


def with_other_shapes(place):
    saved_llama(place)
    edit(place, "config.json", intermediate_size=96)


def that_ends_every_text(place):
    tokenizer = saved_llama(place)
    ended = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer.backend_tokenizer.post_processor = ended
    tokenizer.save_pretrained(place)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (without_an_end, "it has no end token"),
        (with_a_padding_of_its_own, r"padding token '\[PAD\]' is number 18, and the model has 18 embeddings"),
        (with_too_few_embeddings, r"a text of the task has the token '>', number 17"),
        (with_an_adapter, "holds an adapter beside the whole weights"),
        (without_a_head, "its weights lack lm_head.weight"),
        (with_other_shapes, "down_proj.weight and 5 more, or have another shape"),
        (by_another_tool, "is quantised by awq"),
        (by_bitsandbytes, "quantised weights cannot be trained"),
        (an_encoder, r"is an encoder \(bert\)"),
        (an_encoder_and_a_decoder, "is no causal language model"),
        (that_ends_every_text, "puts the end token '<eos>' behind every text"),
    ],
)
def test_what_cannot_be_trained_is_one_line_before_training(tmp_path, capsys, make, said):
    place, config = tmp_path / "base", tmp_path / "run.yaml"
    make(place)
    config.write_text(f"""
model: {{loader: transformers, name: {place}}}
task: {{name: countdown}}
grpo: {{max_steps: 1, per_device_train_batch_size: 4, num_generations: 4, max_completion_length: 4, use_cpu: true}}
run: {{name: tiny, output_root: {tmp_path}, evaluation: {{size: 4}}}}
""")
    assert train_grpo.main(["--config", str(config)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("model.name: ")
    assert re.search(said, last)
    assert not list(tmp_path.glob("tiny/metrics.jsonl"))


@pytest.mark.parametrize(("make", "said"), [(by_another_tool, "by awq"), (an_encoder, "is an encoder")])
def test_nor_is_it_loaded_without_a_plan_before(tmp_path, make, said):
    """A program of the user's may ask for the model alone."""
    make(tmp_path)
    with pytest.raises(ConfigError, match=said):
        load(ModelConfig(loader="transformers", name=str(tmp_path)), None, 0, lora=LoraSection())


def test_tokens_that_are_not_used_may_be_beyond_the_model(tmp_path):
    """Gemma 3's tokenizer has one more than the text models' embeddings."""
    tokenizer = saved_llama(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    assert len(tokenizer) > model.config.vocab_size
    require_known_tokens(model, tokenizer, [[3, 17]], "base")


def test_an_end_of_a_turn_that_ends_no_completion_is_said():
    tokenizer = character_tokenizer("0123456789forty-w ")
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<eos>", "<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    closing, prompt = tokenizer.convert_tokens_to_ids("<|im_end|>"), [{"role": "user", "content": "1"}]
    line = unended_turn(tokenizer, prompt, [tokenizer.eos_token_id], {})
    assert "'<|im_end|>', which ends no completion; <eos> does" in line
    assert f"put {closing} into eos_token_id" in line
    assert unended_turn(tokenizer, prompt, [tokenizer.eos_token_id, closing], {}) is None
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert unended_turn(tokenizer, prompt, [tokenizer.eos_token_id], {}) is None


def test_an_evaluation_of_a_folder_with_unknown_tokens_is_one_line(tmp_path, capsys):
    with_too_few_embeddings(tmp_path / "base")
    config = tmp_path / "run.yaml"
    config.write_text(f"""
model: {{loader: transformers, name: {tmp_path / "base"}}}
task: {{name: countdown}}
grpo: {{max_steps: 1, per_device_train_batch_size: 4, num_generations: 4, max_completion_length: 4, use_cpu: true}}
run: {{evaluation: {{size: 4}}}}
""")
    assert train_grpo.main(["--config", str(config), "--evaluate", str(tmp_path / "base")]) == 2
    assert "has the token" in capsys.readouterr().err


def test_every_prompt_of_an_evaluation_has_to_be_known(tmp_path):
    """A rare token need not be in the first: here it is the 9, the last of the vocabulary."""
    tokenizer = saved_llama(tmp_path / "base")
    last = character_tokenizer("012345678+-*=>9")
    last.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(len(tokenizer) - 1)
    model.save_pretrained(tmp_path / "base")
    path = tmp_path / "run.yaml"
    path.write_text("model: {loader: scratch}\ntask: {name: countdown}\n")
    config = load_config(path, ["run.seed=1", "run.evaluation.size=8", "grpo.use_cpu=true"])
    asked = ["9" in prompt for prompt in config.make_task().held_out[:8]["prompt"]]
    assert not asked[0]
    assert any(asked)
    with pytest.raises(ConfigError, match="a text of the task has the token '9'"):
        evaluate_checkpoint(config, tmp_path / "base")


@pytest.mark.parametrize("written", [None, ""])
def test_a_loaded_tokenizer_without_a_padding_token_pads_with_its_end_token(tmp_path, written):
    tokenizer = bpe_tokenizer(["2 , 3"], 300)
    tokenizer.save_pretrained(tmp_path)
    edit(tmp_path, "tokenizer_config.json", pad_token=written)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token == written
    assert pretrained_tokenizer(str(tmp_path)).pad_token_id == tokenizer.eos_token_id


def test_a_loaded_bpe_tokenizer_does_not_warn_of_a_clean_up_that_is_ignored(tmp_path):
    tokenizer = bpe_tokenizer(["2 , 3"], 300)
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).clean_up_tokenization_spaces
    assert not pretrained_tokenizer(str(tmp_path)).clean_up_tokenization_spaces


def test_a_tokenizer_that_loses_the_blanks_is_one_line(tmp_path):
    """A byte-level tokenizer.json under the class LlamaTokenizerFast, as DeepSeek's distilled Llamas are published."""
    saved_llama(tmp_path)
    text = "Tom has 3 apples and buys 4 more"
    bpe_tokenizer([text], 300).save_pretrained(tmp_path)
    require_blanks(AutoTokenizer.from_pretrained(tmp_path), text, "base")
    edit(tmp_path, "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    with pytest.raises(
        ConfigError, match=r'base: its tokenizer .* loses the blanks .*"PreTrainedTokenizerFast"'
    ):
        require_blanks(AutoTokenizer.from_pretrained(tmp_path), text, "base")
    require_blanks(character_tokenizer("Tomhas"), text, "base")  # which has no blank, and says so by <unk>


FLASH = """
model: {{loader: transformers, name: {place}}}
task: {{name: countdown}}
grpo: {{per_device_train_batch_size: 4, num_generations: 4, max_completion_length: 4, use_cpu: true}}
"""


def test_an_attention_that_config_json_asks_for_is_the_users_to_change(tmp_path, capsys):
    saved_llama(tmp_path / "base")
    edit(tmp_path / "base", "config.json", attn_implementation="flash_attention_2")
    config = tmp_path / "run.yaml"
    config.write_text(FLASH.format(place=tmp_path / "base"))
    capsys.readouterr()
    assert train_grpo.main(["--config", str(config), "--plan"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("model.attn_implementation: ")
    assert "set it to sdpa" in said
    assert train_grpo.main(["--config", str(config), "--plan", "model.attn_implementation=sdpa"]) == 0


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"missing_keys": {"b"}, "mismatched_keys": set()}, "lack b, or"),
        ({"missing_keys": {"b", "c"}, "mismatched_keys": {("a", (1, 2), (2, 2))}}, "lack a and 2 more, or"),
    ],
)
def test_the_first_missing_weight_and_how_many_more_are_named(found, said):
    with pytest.raises(ConfigError, match=said):
        require_whole(None, found, "base", "mend it")


def test_a_prompt_that_is_one_token_may_be_the_end_token():
    """A model that begins its texts by its end token, as GPT-2, is asked to go on after nothing else."""
    tokenizer = SimpleNamespace(eos_token_id=2, eos_token="<eos>")
    for prompt in ([2], [2, 5], []):
        require_open_end(tokenizer, prompt, "base")
    with pytest.raises(ConfigError, match="behind every text"):
        require_open_end(tokenizer, [5, 2], "base")


class Losing(SimpleNamespace):
    """A tokenizer of characters that gives so many of a text's blanks back."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(one) for one in text]}

    def decode(self, ids, clean_up_tokenization_spaces):
        words = "".join(map(chr, ids)).split(" ")
        return " ".join(words[: self.kept + 1]) + "".join(words[self.kept + 1 :])


def test_a_tokenizer_may_fold_some_blanks_but_not_most_of_them():
    require_blanks(Losing(unk_token_id=None, kept=2), "a b c d e", "base")
    with pytest.raises(ConfigError, match="loses the blanks"):
        require_blanks(Losing(unk_token_id=None, kept=1), "a b c d e", "base")
    require_blanks(Losing(unk_token_id=ord("c"), kept=0), "a b c d e", "base")
