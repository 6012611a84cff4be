"""A sealed model that was damaged or exchanged is neither measured, asked, merged nor converted; one without a manifest
is taken as it is, and so is one of which only the model card, or what lies beside it, has changed."""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import made_up_checkpoint, saved_llama
from transformers import AutoModelForCausalLM

import train_grpo
from recipes import ask, export
from recipes.config.load import load_config
from recipes.models.manifest import altered, condemn, damage, seal

RUN = """
model: {loader: scratch}
task: {name: countdown}
run: {evaluation: {size: 4}}
"""
REMEDY = "; put back what was written, or remove manifest.json if the change is meant"
CONVERTER = "import pathlib, sys\npathlib.Path(sys.argv[3]).touch()\n"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """`whole` and `adapter`, sealed, and beside them `others`, of the same shapes; nothing is sealed of those."""
    root = tmp_path_factory.mktemp("written")
    tokenizer = saved_llama(root / "whole")
    (root / "whole" / "README.md").write_text("as it was")
    model = AutoModelForCausalLM.from_pretrained(root / "whole")
    adapted = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM"))
    for place, seed in ((root / "adapter", 1), (root / "others" / "adapter", 2)):
        torch.manual_seed(seed)
        for name, weight in adapted.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(weight, std=0.1)
        adapted.save_pretrained(place)
        tokenizer.save_pretrained(place)
    other = AutoModelForCausalLM.from_pretrained(root / "whole")
    torch.nn.init.normal_(other.model.norm.weight)
    other.save_pretrained(root / "others" / "whole")
    for kind in ("whole", "adapter"):
        seal(root / kind)
    return root


@pytest.fixture
def folder(written, tmp_path):
    """A function: a run's folder with that model in final/."""

    def make(kind):
        shutil.copytree(written / kind, tmp_path / "final")
        (tmp_path / "given.yaml").write_text(RUN)
        (tmp_path / "config.yaml").write_text(load_config(tmp_path / "given.yaml").to_yaml())
        return tmp_path

    return make


def commands_on(run, kind):
    """Every command that loads final/, by its name."""
    found = {
        "evaluate": lambda: train_grpo.main(
            ["--config", str(run / "config.yaml"), "--evaluate", str(run / "final")]
        ),
        "ask": lambda: ask.main([str(run), "1+1>2="]),
    }
    if kind == "adapter":
        return found | {"merge": lambda: export.main([str(run), "--merge"])}
    return found | {"gguf": lambda: export.main([str(run), "--gguf"])}


def cut(name):
    return lambda place, others: (place / name).write_bytes((place / name).read_bytes()[:-5])


def other_bit(name):
    def flip(place, others):
        data = bytearray((place / name).read_bytes())
        data[-3] ^= 4
        (place / name).write_bytes(data)

    return flip


def exchanged(name):
    def put(place, others):
        before = (place / name).stat().st_size
        shutil.copy(others / name, place / name)
        assert (place / name).stat().st_size == before  # a size tells nothing

    return put


def renamed(name):
    return lambda place, others: (place / name).rename(place / f"old-{name}")


def edited(name, **changes):
    def edit(place, others):
        values = json.loads((place / name).read_text())
        assert changes.keys() <= values.keys()
        (place / name).write_text(json.dumps(values | changes))

    return edit


def adapter_beside(place, others):
    for file in (others.parent / "adapter").glob("adapter_*"):
        shutil.copy(file, place)


def half_a_manifest(place, others):
    text = (place / "manifest.json").read_text()
    (place / "manifest.json").write_text(text[: len(text) // 2])


DAMAGED = [
    ("whole", cut("model.safetensors"), r"model.safetensors has \d+ bytes, and was written with \d+"),
    ("whole", other_bit("model.safetensors"), r"model.safetensors is not what was written \(another sha256\)"),
    ("whole", exchanged("model.safetensors"), r"model.safetensors is not what was written \(another sha256\)"),
    ("whole", renamed("generation_config.json"), "generation_config.json is missing"),
    ("whole", edited("config.json", rms_norm_eps=0.5), r"config.json has \d+ bytes, and was written with \d+"),
    ("whole", other_bit("tokenizer.json"), r"tokenizer.json is not what was written \(another sha256\)"),
    ("whole", adapter_beside, "adapter_config.json was put there afterwards"),
    ("whole", half_a_manifest, "manifest.json cannot be read"),
    ("adapter", cut("adapter_model.safetensors"), r"adapter_model.safetensors has \d+ bytes, and was written"),
    ("adapter", other_bit("adapter_model.safetensors"), r"adapter_model.safetensors is not what was written"),
    ("adapter", exchanged("adapter_model.safetensors"), r"adapter_model.safetensors is not what was written"),
    ("adapter", renamed("tokenizer_config.json"), "tokenizer_config.json is missing"),
    ("adapter", edited("adapter_config.json", lora_alpha=64), r"adapter_config.json has \d+ bytes, and was wri"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "harm", "words"), DAMAGED)
def test_a_model_that_is_not_what_was_written_is_refused_by_every_command(
    written, folder, capsys, kind, harm, words
):
    run = folder(kind)
    harm(run / "final", written / "others" / kind)
    for command in commands_on(run, kind).values():
        capsys.readouterr()
        assert command() == 2
        said = capsys.readouterr()
        (line,) = said.err.splitlines()
        assert line.startswith(f"{run / 'final'}: ")
        assert line.endswith(REMEDY)
        assert re.search(words, line)
        assert not said.out
    assert not (run / "merged").exists()


def test_without_a_manifest_a_model_is_taken_as_it_is(written, folder, capsys):
    """Written by an earlier version, by another tool, or changed and meant so."""
    run = folder("adapter")
    exchanged("adapter_model.safetensors")(run / "final", written / "others" / "adapter")
    (run / "final" / "manifest.json").unlink()
    for name, command in commands_on(run, "adapter").items():
        assert command() == 0, name


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_what_decides_no_number_may_change(folder, capsys, monkeypatch, kind):
    """Nor does a condemned model decide otherwise: it is what was written."""
    run = folder(kind)
    (run / "tools").mkdir()
    (run / "tools" / "convert_hf_to_gguf.py").write_text(CONVERTER)
    (run / "tools" / "convert_hf_to_gguf.py").chmod(0o755)
    monkeypatch.setenv("PATH", str(run / "tools"))
    final = run / "final"
    (final / "README.md").write_text("edited by hand")
    (final / "notes.txt").write_text("whose this is")
    (final / "model-f16.gguf").write_bytes(b"GGUF")
    condemn(final, "the run diverged from there")
    for name, command in commands_on(run, kind).items():
        assert command() == 0, name


NAMES = {
    "model.safetensors": True,
    "model-00002-of-00002.safetensors": True,
    "model.safetensors.index.json": True,
    "pytorch_model.bin": True,
    "pytorch_model-00001-of-00002.bin": True,
    "pytorch_model.bin.index.json": True,
    "adapter_model.bin": True,
    "adapter_model.safetensors": True,
    "config.json": True,
    "adapter_config.json": True,
    "generation_config.json": True,
    "tokenizer.json": True,
    "tokenizer.model": True,
    "spiece.model": True,
    "vocab.json": True,
    "merges.txt": True,
    "added_tokens.json": True,
    "special_tokens_map.json": True,
    "chat_template.jinja": True,
    "base.json": True,
    "README.md": False,
    "optimizer.pt": False,
    "optimizer.bin": False,
    "scheduler.pt": False,
    "rng_state_0.pth": False,
    "trainer_state.json": False,
    "training_args.bin": False,
    "pytorch_model_fsdp.bin": False,
    "reference/model.safetensors": False,
    "global_step4/zero_pp_rank_0_mp_rank_00_model_states.pt": False,
    "eval.json": False,
    "notes.txt": False,
}


@pytest.mark.parametrize("name", NAMES)
def test_which_files_are_looked_at(tmp_path, name):
    """A checkpoint is measured without what its trainer goes on with; it is not gone on from."""
    for other in NAMES:
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text(other)
    seal(tmp_path)
    assert altered(tmp_path) == ""
    (tmp_path / name).write_text(name.upper())
    found = f"{name} is not what was written (another sha256)"
    assert altered(tmp_path) == (found if NAMES[name] else "")
    if name != "README.md":
        assert damage(tmp_path, parts={}) == found
    (tmp_path / name).unlink()
    assert altered(tmp_path) == (f"{name} is missing" if NAMES[name] else "")


def test_a_checkpoint_with_another_model_card_is_gone_on_from(tmp_path):
    place = made_up_checkpoint(tmp_path, 3)
    (place / "README.md").write_text("as it was")
    seal(place)
    for change in (lambda: (place / "README.md").write_text("by hand"), (place / "README.md").unlink):
        change()
        assert damage(place) == ""


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "model.safetensors"])
def test_weights_that_would_be_taken_first_are_told(tmp_path, name):
    """model.safetensors before parts, an adapter before a whole model. A copy by another name is nobody's business."""
    (tmp_path / "model-00001-of-00001.safetensors").write_text("a part")
    seal(tmp_path)
    (tmp_path / f"old-{name}").write_text("a copy")
    (tmp_path / "model-old.safetensors").write_text("a copy")
    assert altered(tmp_path) == ""
    (tmp_path / name).write_text("of another run")
    assert altered(tmp_path) == f"{name} was put there afterwards"


def test_sizes_are_looked_at_before_anything_is_read(tmp_path):
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (tmp_path / name).write_text(name)
    seal(tmp_path)
    (tmp_path / "model-1.safetensors").write_text("model-I.safetensors")
    (tmp_path / "model-2.safetensors").write_text("model-2")
    assert altered(tmp_path) == "model-2.safetensors has 7 bytes, and was written with 19"


def test_a_folder_is_sealed_again_after_a_kill_in_the_middle_of_it(tmp_path):
    """What was left of the manifest is no file of the model's, and the manifest before stood until then."""
    (tmp_path / "model.safetensors").write_text("weights")
    (tmp_path / "manifest.json.partial").write_text('{"fil')
    seal(tmp_path)
    assert set(json.loads((tmp_path / "manifest.json").read_text())["files"]) == {"model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "manifest.json"}


def test_a_sealed_base_is_looked_at_wherever_it_lies(written, folder, tmp_path, capsys):
    """The adapter's own, or one that --base names; a remedy for a base on another path mentions the manifest."""
    run, base = folder("adapter"), tmp_path / "base"
    shutil.copytree(written / "whole", base)
    edited("adapter_config.json", base_model_name_or_path=str(base))(run / "final", None)
    seal(run / "final")
    commands = commands_on(run, "adapter")
    assert commands["evaluate"]() == 0
    other_bit("model.safetensors")(base, None)
    for command in commands.values():
        capsys.readouterr()
        assert command() == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(
            f"{run / 'final'}: of its base {base}, model.safetensors is not what was written"
        )
        assert line.endswith("; put back the folder that its run wrote")
    assert export.main([str(run), "--merge", "--base", str(base)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"{base}: model.safetensors is not what was written")
    shutil.rmtree(base)
    assert commands["evaluate"]() == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("write where it is now into adapter_config.json, and remove manifest.json")


def sums_of(place):
    """By hand, of every file but the manifest and the model card."""
    files = [
        path
        for path in place.rglob("*")
        if path.is_file() and path.name not in ("manifest.json", "README.md")
    ]
    return {
        str(path.relative_to(place)): {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    }


def is_sealed(place):
    files = json.loads((place / "manifest.json").read_text())["files"]
    files.pop("README.md", None)
    return files == sums_of(place)


def test_a_merged_model_is_sealed_and_its_converter_reads_no_other(written, folder, capsys):
    run = folder("adapter")
    assert commands_on(run, "adapter")["merge"]() == 0
    merged = run / "merged"
    assert is_sealed(merged)
    assert (merged / "README.md").is_file()  # written after that
    AutoModelForCausalLM.from_pretrained(merged)
    other_bit("model.safetensors")(merged, None)
    capsys.readouterr()
    assert export.main([str(run), "--gguf"]) == 2
    assert capsys.readouterr().err.startswith(f"{merged}: model.safetensors is not what was written")


class OfUnsloth:
    """Stands for Unsloth, which needs its GPU: what is saved is another weight than transformers would write."""

    @classmethod
    def from_pretrained(cls, model_name, **options):
        return cls(), None

    def save_pretrained_merged(self, place, tokenizer, save_method):
        Path(place).mkdir()
        save_file({"head": torch.ones(2)}, Path(place) / "model.safetensors")


def test_what_unsloth_merged_is_sealed_and_a_damaged_adapter_is_not_merged(folder, capsys, monkeypatch):
    run = folder("adapter")
    (run / "config.yaml").write_text(
        "model: {loader: unsloth, name: some/model}\ntask: {name: countdown}\nlora: {}\n"
    )
    monkeypatch.setitem(sys.modules, "unsloth", None)
    monkeypatch.setattr("recipes.export.load_config", lambda path: Trained)
    whole = (run / "final" / "adapter_model.safetensors").read_bytes()
    other_bit("adapter_model.safetensors")(run / "final", None)
    assert export.main([str(run), "--merge", "--saver", "unsloth"]) == 2
    assert "adapter_model.safetensors is not what was written" in capsys.readouterr().err
    (run / "final" / "adapter_model.safetensors").write_bytes(whole)
    monkeypatch.setitem(sys.modules, "unsloth", Unsloth)
    place = export.merge_by_unsloth(run)
    assert load_file(place / "model.safetensors")["head"].tolist() == [1.0, 1.0]
    assert is_sealed(place)


class Unsloth:
    FastLanguageModel = OfUnsloth


class Trained:
    class model:
        loader, max_seq_length, load_in_4bit = "unsloth", None, False


def test_a_merged_model_of_another_final_one_is_neither_converted_nor_described(written, folder, capsys):
    """After more steps --gguf converted the merged model of before, and its card had the figures of the new one."""
    run = folder("adapter")
    commands = commands_on(run, "adapter") | {
        "gguf": lambda: export.main([str(run), "--gguf"]),
        "card": lambda: export.main([str(run)]),
    }
    assert commands["merge"]() == 0
    assert commands["card"]() == 0
    card = (run / "merged" / "README.md").read_text()
    exchanged("adapter_model.safetensors")(run / "final", written / "others" / "adapter")
    seal(run / "final")
    for name in ("gguf", "card", "merge"):
        capsys.readouterr()
        assert commands[name]() == 1, name
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {run / 'merged'} ")
        assert line.endswith("; remove it to merge again")
    assert (run / "merged" / "README.md").read_text() == card
    shutil.rmtree(run / "merged")
    assert commands["merge"]() == 0
    assert commands["card"]() == 0


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (SafetensorError("Error while serializing: I/O error: File too large (os error 27)"), "could not be written"),
        (KeyboardInterrupt(), ""),
    ],
    ids=["full", "stopped"],
)  # fmt: skip
def test_a_merge_that_is_cut_off_leaves_nothing_and_begins_again(folder, capsys, monkeypatch, failure, words):
    """A full disk was a traceback; half a folder stood in the way of the next, and was taken for a merged model."""
    run = folder("adapter")
    (run / "merged.unfinished").mkdir()  # of an export that was killed

    def fail(*args, **kwargs):
        raise failure

    with monkeypatch.context() as broken:
        broken.setattr("transformers.modeling_utils.safe_save_file", fail)
        assert export.main([str(run), "--merge"]) == (130 if isinstance(failure, KeyboardInterrupt) else 1)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
    assert "the same command begins again" in line
    assert not list(run.glob("merged*"))
    assert export.main([str(run), "--merge"]) == 0
    assert [place.name for place in run.glob("merged*")] == ["merged"]
