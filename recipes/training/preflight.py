"""What a run needs from this machine, checked before anything is loaded: one line for each thing that is missing.

preflight.check(config)     ConfigError: key, what is missing, value, the command that helps
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

from packaging.version import Version

from recipes.config.load import RunConfig
from recipes.config.schema import ModelConfig
from recipes.config.unsloth import import_unsloth, set_for_its_loss
from recipes.machine import why_no_gpu
from recipes.models.checkpoint import read_object
from recipes.models.saved import without_weights
from recipes.problems import ConfigError, Problem, place_of, see
from recipes.processes import spread
from recipes.tracking.reporters import missing as missing_tracker

CUDA_SET = "install it: pip install -r requirements-cuda.lock"
_ATTENTION = {  # attn_implementation -> (its package, how to get it)
    "flash_attention_2": ("flash_attn", "pip install flash-attn --no-build-isolation"),
    "flash_attention_3": ("flash_attn_3", "build flash_attn_3 from its repository"),
}
_OPTIMIZERS_OF_BITSANDBYTES = ("8bit", "paged")  # parts of transformers' names for them
_OPTIMIZERS = {  # how transformers' names for others begin -> the package, and what pip installs it by
    "adamw_torch_4bit": ("torchao", "torchao"),
    "adamw_torch_8bit": ("torchao", "torchao"),
    "galore": ("galore_torch", "git+https://github.com/jiaweizzhao/GaLore"),
    "apollo": ("apollo_torch", "git+https://github.com/zhuhanqing/APOLLO"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "adalomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
}
OLDEST_VLLM = "0.21.0"  # that TRL 1.15 supports
BITSANDBYTES_LEFT_VLLM = "0.28.0"  # from here on it is vllm-bnb-plugin that reads 4-bit weights
_LOOKED_FOR = (
    *("unsloth", "vllm", "vllm_bnb_plugin", "bitsandbytes", "flash_attn", "flash_attn_3"),
    *(package for package, _ in _OPTIMIZERS.values()),
)


@dataclass(frozen=True)
class Machine:
    """What the machine has: a CUDA device, whether it computes in bfloat16, which packages, how many processes.

    no_gpu: why there is no CUDA device, in words that follow "needs a GPU, and".
    """

    cuda: bool
    bfloat16: bool
    packages: frozenset[str]
    vllm: str | None = None  # its version, where it is known
    deepspeed: bool = False  # asked for by accelerate's launcher
    processes_here: int = 1  # as the launcher announces them
    gpus: int = 1
    no_gpu: str = "there is none"

    @classmethod
    def here(cls) -> Machine:
        """This machine."""
        import torch

        cuda = torch.cuda.is_available()
        return cls(
            cuda=cuda,
            bfloat16=not cuda or torch.cuda.is_bf16_supported(including_emulation=False),
            packages=frozenset(name for name in _LOOKED_FOR if importlib.util.find_spec(name) is not None),
            vllm=_version("vllm"),
            processes_here=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            deepspeed=spread() == "DeepSpeed",
            gpus=torch.cuda.device_count(),
            no_gpu="" if cuda else why_no_gpu(torch.version.cuda),
        )


def check(config: RunConfig, machine: Machine | None = None) -> None:
    """Raises ConfigError with everything that is missing or that TRL refuses. machine: None for this one."""
    machine = machine or Machine.here()
    problems = [
        *_processes(config, machine),
        *_deepspeed(config, machine),
        *missing(config, machine),
        *missing_tracker(config.tracking.report_to),
        *_checkpoints(config.model),
        *_upload(config),
    ]
    if problems:
        if not machine.cuda and machine.no_gpu != Machine.no_gpu:  # there is one, out of reach
            problems.append(Problem("", f"{machine.no_gpu}; {see('driver-cuda-and-vllm')}"))
        raise ConfigError(problems)
    config.grpo_config("checkpoints")  # TRL's own refusals, before there is a run folder


def missing(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """What the machine lacks for this configuration."""
    yield from _unsloth(config, machine)
    yield from _quantised(config.model, machine)
    yield from _attention(config.model, machine)
    yield from _compiled(config, machine)
    yield from _vllm(config, machine)
    yield from _optimizer(config, machine)
    yield from _head(config, machine)
    if config.model.dtype == "bfloat16" and not machine.bfloat16:
        yield Problem("model.dtype", "this GPU has no bfloat16", "bfloat16", "set it to float16 or auto")


def _processes(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """What several processes cannot do."""
    if config.processes == 1:
        return
    if config.model.loader == "unsloth":
        remedy = "set model.loader: transformers, or start one process: python train_grpo.py --config …"
        message = f"with Unsloth {config.processes} processes have not been tried"
        yield Problem("model.loader", message, "unsloth", remedy)
    if machine.cuda and not config.grpo["use_cpu"] and machine.processes_here > machine.gpus:
        message = (
            f"the launcher starts {machine.processes_here} processes here, and there are {machine.gpus} GPUs"
        )
        yield Problem(
            "", message, remedy=f"start as many: torchrun --nproc-per-node {machine.gpus} train_grpo.py …"
        )


def _deepspeed(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """What a run by DeepSpeed cannot do, or has not been seen to."""
    if not machine.deepspeed:
        return
    for key in ("load_in_4bit", "load_in_8bit"):
        if getattr(config.model, key):
            message = "quantised weights have not been tried under DeepSpeed"
            yield Problem(f"model.{key}", message, True, "set it to false, or start it by torchrun")
    if config.grpo["cache_implementation"] == "static":
        message = "DeepSpeed gathers weights while it samples, which a compiled step cannot"
        yield Problem("grpo.cache_implementation", message, "static", "leave it out")
    if config.grpo["fp16"] or config.model.dtype == "float16" or not machine.bfloat16:
        message = "DeepSpeed looks for the scale of float16 by steps that overflow, which end a run here"
        yield Problem("grpo.fp16", message, remedy="compute in bfloat16, or start it by torchrun")


def _unsloth(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Whether it can be imported, and whether its trainer will call memhead."""
    if config.model.loader != "unsloth":
        return
    if "unsloth" not in machine.packages:
        remedy = f"{CUDA_SET}, or set model.loader: transformers"
        yield Problem("model.loader", "Unsloth is not installed", "unsloth", remedy)
        return
    try:
        import_unsloth(config.model.vllm_standby)
    except ValueError as error:
        yield Problem("", str(error))
        return
    except (ImportError, NotImplementedError, RuntimeError) as error:
        remedy = "mend what it names, or set model.loader: transformers"
        cause = f" ({error.__context__})" if error.__context__ is not None else ""
        yield Problem("model.loader", f"Unsloth does not start here: {error}{cause}", "unsloth", remedy)
        return
    if not config.unsloths_step:
        for variable in set_for_its_loss():
            yield Problem(
                "", f"{variable} changes the loss of Unsloth's own step alone; unset it, or step.impl: packed"
            )
    if config.head.impl != "trl":
        from memhead.integrations.unsloth import refuse_bypasses

        try:
            refuse_bypasses(SimpleNamespace(**config.grpo) if config.unsloths_step else None)
        except ValueError as error:
            yield Problem("", str(error))


def _quantised(model: ModelConfig, machine: Machine) -> Iterator[Problem]:
    for key in ("load_in_4bit", "load_in_8bit"):
        if not getattr(model, key):
            continue
        if not machine.cuda:
            remedy = f"run it where there is an NVIDIA GPU, or set model.{key}: false"
            yield Problem(f"model.{key}", f"needs a GPU, and {machine.no_gpu}", True, remedy)
        elif "bitsandbytes" not in machine.packages:
            yield Problem(f"model.{key}", "bitsandbytes is not installed", True, CUDA_SET)


def _attention(model: ModelConfig, machine: Machine) -> Iterator[Problem]:
    chosen = model.attn_implementation
    if chosen not in _ATTENTION:
        return
    package, command = _ATTENTION[chosen]
    if not machine.cuda:
        remedy = "set it to sdpa"
        yield Problem("model.attn_implementation", f"needs a GPU, and {machine.no_gpu}", chosen, remedy)
    elif package not in machine.packages:
        remedy = f"{command}; or set it to sdpa"
        yield Problem("model.attn_implementation", f"{package} is not installed", chosen, remedy)


def _compiled(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """On a CPU compiling takes longer than it saves; several processes have not been tried."""
    key, remedy = "model.compile_layers", "set it to false"
    if not config.model.compile_layers:
        return
    if not machine.cuda or config.grpo["use_cpu"]:
        yield Problem(key, f"needs a GPU, and {machine.no_gpu or 'grpo.use_cpu keeps off it'}", True, remedy)
    if config.processes > 1:
        yield Problem(key, f"with {config.processes} processes it has not been tried", True, remedy)


def _vllm(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """vLLM inside this process. A server's client is made of its package too, and hands weights over by NCCL."""
    if config.model.fast_inference:
        key = "model.fast_inference"
    elif config.grpo["use_vllm"]:
        key = "grpo.use_vllm"
    else:
        return
    if not machine.cuda:
        remedy = f"run it where there is an NVIDIA GPU, or set {key}: false"
        yield Problem(key, f"vLLM needs a GPU, and {machine.no_gpu}", True, remedy)
    elif "vllm" not in machine.packages:
        yield Problem(key, "vLLM is not installed", True, f"{CUDA_SET}, or set {key}: false")
    elif _older(machine.vllm, OLDEST_VLLM):
        message = f"vLLM {machine.vllm} is too old for TRL, which needs {OLDEST_VLLM}"
        yield Problem(key, message, True, f"{CUDA_SET}, or set {key}: false")
    elif (
        config.model.load_in_4bit
        and "vllm_bnb_plugin" not in machine.packages
        and not _older(machine.vllm, BITSANDBYTES_LEFT_VLLM)
    ):
        message = "vLLM reads 4-bit weights by vllm-bnb-plugin, which is not installed"
        yield Problem(
            key, message, True, "pip install vllm-bnb-plugin==0.0.3, or set model.load_in_4bit: false"
        )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _older(version: str | None, than: str) -> bool:
    """Whether this release came before. An unknown one is taken for new."""
    return version is not None and Version(version).release < Version(than).release


def _optimizer(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    name = config.grpo["optim"]
    others = next((of for begins, of in _OPTIMIZERS.items() if name.startswith(begins)), None)
    if others is not None:
        package, installed = others
        if package not in machine.packages:
            remedy = f"pip install {installed}, or set it to adamw_torch_fused"
            yield Problem("grpo.optim", f"{package} is not installed", name, remedy)
        return
    if not any(part in name for part in _OPTIMIZERS_OF_BITSANDBYTES):
        return
    remedy = "or set it to adamw_torch_fused"
    if not machine.cuda:
        yield Problem("grpo.optim", f"needs a GPU, and {machine.no_gpu}", name, remedy.removeprefix("or "))
    elif "bitsandbytes" not in machine.packages:
        yield Problem("grpo.optim", "bitsandbytes is not installed", name, f"{CUDA_SET}, {remedy}")


def _head(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Triton, without which the first step would fail. Unsloth's own head (`impl: trl` there) does not need it."""
    if machine.cuda:
        return
    if config.head.impl == "trl" and config.model.loader != "unsloth":
        yield Problem(
            "head.impl", f"TRL's needs a GPU, and {machine.no_gpu}", "trl", "set it to memhead or full"
        )
    if config.head.backend == "triton":
        yield Problem(
            "head.backend", f"needs a GPU, and {machine.no_gpu}", "triton", "set it to torch or null"
        )


def _checkpoints(model: ModelConfig) -> Iterator[Problem]:
    """The model, and a tokenizer of another name: each a local folder, in the hub's cache, or on the hub."""
    if model.name is not None:
        yield from _checkpoint("model.name", model.name, model.revision, "config.json")
    if model.tokenizer not in (None, "bpe"):
        revision = model.revision_of(model.tokenizer)
        yield from _checkpoint("model.tokenizer", model.tokenizer, revision, "tokenizer_config.json")


def _checkpoint(key: str, name: str, revision: str | None, file: str) -> Iterator[Problem]:
    place = place_of(key, name)
    if place.exists():
        if not (place / file).is_file():
            yield Problem(key, f"holds no {file}", name, "give the folder of a saved model, or a hub id")
            return
        try:
            read_object(place / file)
        except ConfigError:
            message = f"holds a {file} that is no JSON object: it was cut off or overwritten"
            yield Problem(key, message, name, "give the folder of a saved model, or a hub id")
            return
        if key == "model.name" and (missing := without_weights(place)):
            yield Problem(key, f"holds {missing}", name, "give the folder of a whole model, or a hub id")
    elif place.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        yield Problem(key, "there is no such folder", name, "give a local folder that exists, or a hub id")
    else:
        yield from _on_the_hub(key, name, revision, file)


def _on_the_hub(key: str, name: str, revision: str | None, file: str) -> Iterator[Problem]:
    """Asks the hub once, unless its cache has the file. Nothing is downloaded."""
    from httpx import HTTPError  # what huggingface_hub asks with
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if not isinstance(try_to_load_from_cache(name, file, revision=revision), str):
            get_hf_file_metadata(hf_hub_url(name, file, revision=revision))
    except HFValidationError:
        yield Problem(key, "is neither a local folder nor a hub id", name, "write it as owner/name")
    except (HTTPError, OSError) as error:
        message, remedy = explain(error, name, revision, file)
        yield Problem(key, message, name, f"{remedy}, or give a local folder")


def _upload(config: RunConfig) -> Iterator[Problem]:
    """Whether what `grpo.push_to_hub` asks for can be done: it would fail after the run, or hours into it."""
    if not config.grpo["push_to_hub"]:
        return
    from httpx import HTTPError
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import OfflineModeIsEnabled

    key, remedy = "grpo.push_to_hub", "log in with a token that may write: hf auth login; or set it to false"
    if get_token() is None:
        yield Problem(key, "nobody is logged in to the hub", True, remedy)
        return
    try:
        user = HfApi().whoami()
    except OfflineModeIsEnabled:
        yield Problem(key, "the hub is switched off", True, "unset HF_HUB_OFFLINE, or set it to false")
        return
    except (HTTPError, OSError) as error:
        refused = getattr(getattr(error, "response", None), "status_code", None) == 401
        message = "the hub does not know the token" if refused else f"the hub cannot be reached ({error})"
        yield Problem(key, message, True, remedy if refused else "mend the connection, or set it to false")
        return
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        yield Problem(key, "the token may only read", True, remedy)
    owner, _, name = (config.grpo["hub_model_id"] or "").rpartition("/")
    names = [user.get("name"), *(org.get("name") for org in user.get("orgs", []))]
    if owner and name and owner not in names:
        remedy = f"name one of {', '.join(filter(None, names))}, or leave the owner out"
        yield Problem("grpo.hub_model_id", "is of an owner you are not", config.grpo["hub_model_id"], remedy)


def explain(error: Exception, name: str, revision: str | None, file: str) -> tuple[str, str]:
    """What the hub's answer means to someone who wants this file of this model, and the remedy."""
    from huggingface_hub import errors as hub

    if isinstance(error, hub.GatedRepoError):
        return "is gated, and you have no access", "accept its licence on its page and log in: hf auth login"
    if isinstance(error, hub.RevisionNotFoundError):
        return f"has no revision {revision!r}", "set model.revision to a branch, tag or commit that it has"
    if isinstance(error, hub.RepositoryNotFoundError):
        return "the hub knows no such model", "check the spelling; if it is private, log in: hf auth login"
    if isinstance(error, hub.EntryNotFoundError):
        return f"has no {file} on the hub", "name a model in transformers' format"
    if isinstance(error, hub.OfflineModeIsEnabled):
        remedy = f"unset HF_HUB_OFFLINE, fetch it first: hf download {name}"
        return "is not in the cache, and the hub is switched off", remedy
    remedy = f"mend the connection, fetch it elsewhere: hf download {name}"
    return f"is not in the cache, and the hub cannot be reached ({error})", remedy
