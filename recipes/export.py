"""What a run leaves for use elsewhere: merged and verified weights, a model card, GGUF.

    python -m recipes.export runs/llama3.2_1b_gsm8k --merge            final/ (an adapter) -> merged/
    python -m recipes.export runs/llama3.2_1b_gsm8k --merge --gguf     and merged.gguf, by llama.cpp's converter
    python -m recipes.export runs/llama3.1_8b_gsm8k --merge --saver unsloth     by Unsloth's own saver (on its GPU)

After training on a quantised base, `--base` names the weights that it was quantised from.

`--merge` checks two things and prints the figures: the merged weights differ from the base, and the merged model's
logits are those of base plus adapter. A model that fails either check is not left in the folder. Merging and proof are
computed in float32, a layer at a time. What Unsloth saves is Unsloth's, and not checked.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from recipes.config.load import load_config
from recipes.config.unsloth import MAX_SEQ_LENGTH
from recipes.models.checkpoint import (
    REMEDY,
    is_adapter,
    put_on,
    require_as_written,
    require_base,
    require_own_base,
    whole_base,
    with_adapter,
)
from recipes.models.generation_config import settle_generation_config
from recipes.models.manifest import MANIFEST, note_base, other_base, seal
from recipes.models.parts import in_float32, merged_once_rounded
from recipes.models.saved import readable, unusable
from recipes.output import lasting_output
from recipes.problems import EXIT_STATUS, ConfigError, visible
from recipes.report.model_card import model_card
from recipes.stops import leave, stopped_in_a_line
from recipes.tracking.files import naming_what_failed
from recipes.tracking.terminal import silence_bars

# As a share of the largest logit, by the dtype that the merged weights are rounded to.
LOGITS_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}
_UNFINISHED = ".unfinished"  # ends the name of a folder that is still being merged into
_AGAIN = "the same command begins again"
_CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf.py")


class ExportError(RuntimeError):
    """The export cannot be made, or is faulty; the message says why and what to do."""


def merge(run: Path, base: str | None = None) -> dict[str, Any]:
    """Merge `run/final` into `run/merged`. Returns the proof's figures.

    base: hub id or path of the weights to merge into, in place of those that the adapter names.

    Raises ExportError: no adapter there, NaN in it, weights equal to the base, or logits that differ; ConfigError: not
    whole.
    """
    from transformers import AutoTokenizer

    final, place = run / "final", run / "merged"
    if not is_adapter(final):
        raise ExportError(f"{final} holds no adapter to merge; a run without lora has its whole model there")
    if place.exists():
        raise ExportError(f"{place} exists; remove it to merge again")
    with readable("tokenizer", str(final), REMEDY):
        tokenizer = AutoTokenizer.from_pretrained(final, trust_remote_code=False)
    model = _with_adapter(final, base)
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        raise ExportError("the base is quantised; name the unquantised one that it was made from with --base")
    before = {name: _digest(weight) for name, weight in _adapted(model)}
    try:
        merged = merged_once_rounded(model)
    except ValueError as error:  # NaN in a merged weight
        raise ExportError(f"{final} cannot be merged: {error}") from error
    after = dict(merged.named_parameters())
    changed = sum(_digest(after[name].detach()) != digest for name, digest in before.items())
    dtype = str(merged.dtype).removeprefix("torch.")
    if mended := settle_generation_config(merged, base or str(final)):
        print(mended, file=sys.stderr)
    with _merged_whole(final, place) as aside:
        with naming_what_failed(place, _AGAIN):
            merged.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
        tokens = ordinary_tokens(tokenizer, merged.config.get_text_config().vocab_size)
        del model, merged, after  # the proof has one model at a time in memory
        wanted, without = _wanted(final, base, tokens)
        proof = {
            "adapted_weights": len(before),
            "changed_weights": changed,
            # of the model as it will be loaded, from the disk
            "logits_error": _relative(_logits(_reload(aside), tokens), wanted),
            "adapter_effect": _relative(without, wanted),
            "allowed": LOGITS_TOLERANCE[dtype],
        }
        if fault := _fault(proof):
            raise ExportError(f"{fault}; {place} was removed ({json.dumps(proof)})")
    return proof


@contextmanager
def _merged_whole(final: Path, place: Path) -> Iterator[Path]:
    """A folder to merge into: where the body ends well it is sealed and becomes `place`, else nothing is left of it.

    It notes which `final` it is of, where that one is sealed. Raises CannotWrite.
    """
    aside = place.with_name(f"{place.name}{_UNFINISHED}")
    shutil.rmtree(aside, ignore_errors=True)  # of an export that was killed
    try:
        yield aside
        with naming_what_failed(place, _AGAIN):
            if (final / MANIFEST).is_file():
                note_base(aside, final)
            seal(aside)
            aside.rename(place)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(aside, ignore_errors=True)
        raise


def require_merged_of_final(run: Path) -> None:
    """Raises ExportError where `run/merged` is of another model than `run/final` is now, as after more steps."""
    place = run / "merged"
    if found := other_base(place, run / "final"):
        raise ExportError(
            f"{place} was merged from another {run / 'final'} ({found}); remove it to merge again"
        )


def merge_by_unsloth(run: Path) -> Path:
    """Merge `run/final` into 16-bit weights in `run/merged`, by the loader that trained it. Returns the folder.

    Raises ExportError: another loader, no Unsloth here, or no GPU for it; ConfigError: another base than the adapter's.
    """
    config, final, place = load_config(run / "config.yaml"), run / "final", run / "merged"
    if config.model.loader != "unsloth":
        raise ExportError(f"{run} was trained by model.loader: {config.model.loader}; leave --saver out")
    if place.exists():
        raise ExportError(f"{place} exists; remove it to merge again")
    if is_adapter(final):
        require_own_base(final, Path(require_base(final)))  # which Unsloth loads by the path on record
    try:
        from unsloth import FastLanguageModel
    except (ImportError, NotImplementedError, RuntimeError) as error:
        raise ExportError(f"Unsloth does not start here: {error}; leave --saver out") from error
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(final),
        max_seq_length=config.model.max_seq_length or MAX_SEQ_LENGTH,
        load_in_4bit=config.model.load_in_4bit,
    )
    with _merged_whole(final, place) as aside, naming_what_failed(place, _AGAIN):
        model.save_pretrained_merged(str(aside), tokenizer, save_method="merged_16bit")
    return place


def _with_adapter(final: Path, base: str | None) -> Any:
    """The model of an adapter, on its own base or on another one with the same weights unquantised."""
    if base is None:
        return with_adapter(final)
    remedy = "give --base a whole model"
    require_as_written(Path(base), remedy)
    with readable("model", base, remedy):
        unquantised = whole_base(base, remedy)
    with readable("adapter", str(final), REMEDY):
        return put_on(unquantised, final)


def ordinary_tokens(tokenizer: Any, vocabulary: int) -> torch.Tensor:
    """(1, 32) int64 spread over the vocabulary, without what was added to it, as far as there is anything else.

    Control tokens in a row are nothing that a model has learnt to read, so what it says behind them proves little.
    """
    added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    own = [token for token in range(vocabulary) if token not in added] or list(range(vocabulary))
    return torch.tensor([[own[place * len(own) // 32] for place in range(32)]])


def _fault(proof: dict[str, Any]) -> str:
    """What is wrong with a merge, or ""."""
    if not proof["changed_weights"]:
        return (
            "the merged weights equal the base: the adapter has not learnt, or half precision rounds it away"
        )
    if not proof["logits_error"] <= proof["allowed"]:  # NaN too
        return "the merged model's logits are not those of base and adapter"
    return ""


def _digest(weight: torch.Tensor) -> bytes:
    """Of the bits: a copy of every adapted weight would be most of a second model."""
    bits = weight.contiguous().flatten().view(torch.uint8).cpu()
    return hashlib.sha256(bits.numpy().data).digest()


def _wanted(final: Path, base: str | None, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with the adapter, and without."""
    model = _with_adapter(final, base)
    wanted = _logits(model, tokens)
    with model.disable_adapter():
        return wanted, _logits(model, tokens)


@torch.no_grad()
def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Computed in float32: what a forward pass in half precision rounds can be as large as a fault of the merge."""
    with in_float32(model.eval()):
        logits: torch.Tensor = model(input_ids=tokens.to(model.device)).logits.float().cpu()
    return logits


def _reload(place: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(place, dtype="auto", trust_remote_code=False)


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference of a token's logits, of (1, T, V), as a share of the largest logit; the tokens' median.

    Rounding a weight can turn an attention between two equals around, at a token or two: a fault shows at most of them.
    """
    if not found.isfinite().all():
        return math.inf
    by_token = (found - wanted).abs().amax(-1)
    return float(by_token.median() / wanted.abs().max().clamp_min(1e-30))


def _adapted(model: Any) -> list[tuple[str, torch.Tensor]]:
    """The base weights that carry an adapter, by the names that they have after merging."""
    found = []
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "parameter_name"):  # experts in one parameter; several are wrapped one in another
            place = name.replace(".base_layer", "")
            found.append((f"{place}.{module.parameter_name}", module.get_param().detach()))
        elif hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            found.append((f"{name}.weight", module.base_layer.weight.detach()))
    return found


def gguf(run: Path, outtype: str = "f16") -> Path:
    """Convert the merged, or the whole final, model by llama.cpp's converter.

    Raises ExportError without one, or for a merged model of another final one; ConfigError for a folder that is not
    whole, or not what was written.
    """
    require_merged_of_final(run)
    source = run / "merged" if (run / "merged").is_dir() else run / "final"
    if is_adapter(source):
        raise ExportError(f"{source} is an adapter; add --merge")
    converter = next((path for name in _CONVERTERS if (path := shutil.which(name))), None)
    if converter is None:
        raise ExportError(
            f"--gguf needs llama.cpp's {_CONVERTERS[0]} on the PATH: clone llama.cpp and add its folder; pip install "
            "sentencepiece, which it imports. Its requirements.txt would bring another torch and transformers"
        )
    target = run / f"{source.name}.gguf"
    call = [sys.executable, converter, str(source), "--outfile", str(target), "--outtype", outtype]
    if subprocess.run(call, check=False).returncode or not target.is_file():
        raise ExportError(f"{converter} failed on {source}; its own message is above")
    return target


@lasting_output()
@stopped_in_a_line
def main(arguments: list[str]) -> int:
    """Run from the command line. Exit status: 0 done, 1 not possible, 2 a folder that is not one of a run's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--merge", action="store_true", help="merge the adapter into its base, and prove it")
    parser.add_argument(
        "--base", help="with --merge: the weights to merge into; default: the adapter's own base"
    )
    parser.add_argument(
        "--saver", choices=["peft", "unsloth"], default="peft", help="with --merge: whose code merges"
    )
    parser.add_argument("--gguf", action="store_true", help="convert for llama.cpp")
    options = parser.parse_args(arguments)
    if options.base and not (options.merge and options.saver == "peft"):
        parser.error("--base: names weights to merge into; add --merge, and leave --saver unsloth out")
    if options.saver == "unsloth" and not options.merge:
        parser.error("--saver: says whose code merges; add --merge")
    silence_bars()
    try:
        if not (options.run / "final").is_dir():
            raise unusable(str(options.run), "holds no folder final", "give the folder of a finished run")
        if options.merge and options.saver == "unsloth":
            print(merge_by_unsloth(options.run))
        elif options.merge:
            print(json.dumps(merge(options.run, options.base), indent=2))
        require_merged_of_final(options.run)  # or its card would have the figures of another model
        places = [place for name in ("final", "merged") if (place := options.run / name).is_dir()]
        for place in places:
            card = place / "README.md"
            card.write_text(model_card(options.run), encoding="utf-8")
            if not (options.merge or options.gguf):
                print(card)
        if options.gguf:
            print(gguf(options.run))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_STATUS
    except (ExportError, OSError) as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
