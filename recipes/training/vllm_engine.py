"""vLLM inside the training process, with adapters handed over as adapters.

TRL merges a LoRA into the base weights before every rollout and subtracts it afterwards. In half precision that leaves
a rest: the base drifts, and a resumed run, which loads it anew, goes on with another model. Here vLLM keeps a base of
its own, from the same files, and each sync hands it the adapter alone, under a new name. Without a LoRA every weight is
sent, as TRL does it; a vLLM server gets merged weights, as TRL does it too.

    with engine(config):
        trainer = GRPOTrainer(...)      whose vllm_generation is then an AdapterGeneration
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from recipes.config.load import RunConfig
from recipes.problems import ConfigError, Problem

if TYPE_CHECKING:
    from trl.generation.vllm_generation import VLLMGeneration as _Generation
else:
    _Generation = object

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # for which vLLM has room
_NEW_BASES = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
    "eva",
)  # ways to begin an adapter that change the weights below it
_OTHER_ADAPTERS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)  # PEFT's, which vLLM does not read: it would compute a plain adapter
_IN_MEMORY = Path("/dev/shm")  # a file system in memory, on Linux: adapters are read again at once
_KEPT = 1  # adapters that vLLM holds: a new one takes the place of the one before


@contextmanager
def engine(config: RunConfig) -> Iterator[None]:
    """While TRL's trainer is made inside: its vLLM takes `model.vllm_engine`, and adapters alone where it can.

    Raises ConfigError for adapters that vLLM does not take.
    """
    if (
        not config.grpo["use_vllm"]
        or config.grpo["vllm_mode"] != "colocate"
        or config.model.loader == "unsloth"
    ):
        yield
        return
    from trl.generation import vllm_generation
    from trl.trainer import grpo_trainer

    generation, llm = grpo_trainer.VLLMGeneration, getattr(vllm_generation, "LLM", _not_installed)
    options = dict(config.model.vllm_engine or {})
    if config.lora is not None:
        options |= engine_of_adapter(config)
        grpo_trainer.VLLMGeneration = with_adapter(generation)

    def made(**given: Any) -> Any:
        found = llm(**{**given, **options})
        return found if config.lora is None else EngineWithAdapter(found)

    vllm_generation.LLM = made
    try:
        yield
    finally:
        grpo_trainer.VLLMGeneration = generation
        vllm_generation.LLM = llm


def _not_installed(**_: Any) -> Any:
    raise ImportError("vLLM is not installed")


def engine_of_adapter(config: RunConfig) -> dict[str, Any]:
    """Arguments of vLLM's LLM that an adapter needs; the base is the one that the trainer has loaded."""
    assert config.lora is not None
    refuse(config.lora.peft_config())
    found: dict[str, Any] = {
        "enable_lora": True,
        "max_lora_rank": next(rank for rank in RANKS if rank >= config.lora.r),
        "max_loras": _KEPT,
        "max_cpu_loras": _KEPT,
    }
    if config.model.revision is not None:
        found["revision"] = config.model.revision
    if config.model.dtype != "auto":
        found["dtype"] = config.model.dtype
    return found


def refuse(adapter: Any) -> None:
    """Raises ConfigError, a line for each thing about a peft.LoraConfig that vLLM would drop or refuse."""
    begun = adapter.init_lora_weights
    wrong = {
        "lora.use_dora": (adapter.use_dora, "vLLM has no DoRA"),
        "lora.bias": (adapter.bias != "none" and adapter.bias, "vLLM takes no biases of an adapter"),
        "lora.lora_bias": (adapter.lora_bias, "vLLM takes no biases of an adapter"),
        "lora.modules_to_save": (adapter.modules_to_save, "vLLM takes adapters alone"),
        "lora.r": (adapter.r > RANKS[-1] and adapter.r, f"vLLM takes ranks of {RANKS[-1]} at most"),
        "lora.rank_pattern": (adapter.rank_pattern, "vLLM takes one rank"),
        "lora.alpha_pattern": (adapter.alpha_pattern, "vLLM takes one scale"),
        "lora.init_lora_weights": (
            isinstance(begun, str) and begun.lower().startswith(_NEW_BASES) and begun,
            "changes the base, of which vLLM has its own",
        ),
    }
    wrong |= {
        f"lora.{name}": (getattr(adapter, name, None), "vLLM computes plain adapters alone")
        for name in _OTHER_ADAPTERS
    }
    remedy = "remove it, or set grpo.use_vllm: false"
    found = [Problem(key, message, value, remedy) for key, (value, message) in wrong.items() if value]
    if found:
        raise ConfigError(found)


def with_adapter(generation: type) -> type:
    """TRL's VLLMGeneration with :class:`AdapterGeneration` before it."""
    return type("AdapterVLLMGeneration", (AdapterGeneration, generation), {})


class AdapterGeneration(_Generation):
    """In the place of TRL's VLLMGeneration, for a model with one LoRA."""

    llm: EngineWithAdapter

    def _init_vllm(self) -> None:
        refuse(self.model.peft_config[self.model.active_adapter])
        super()._init_vllm()

    def sync_weights(self) -> None:
        """Hands over the adapter as it is now. The model's tensors are read, and none is written."""
        if self.enable_sleep_mode:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
            self._llm_weights_sleeping = False
        adapters = [p for name, p in self.model.named_parameters() if self.model.prefix in name]
        with self._dist.gather_params(adapters):  # of ZeRO-3
            self.llm.hand_over(self.model)


class EngineWithAdapter:
    """vLLM's LLM, which completes every prompt with the adapter that was handed over last."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._request: Any = None
        self._numbers = itertools.count(1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def hand_over(self, model: Any) -> None:
        """Under a new name and number: what vLLM has cached of prompts belongs to a name."""
        from vllm.lora.request import LoRARequest

        number = next(self._numbers)
        with tempfile.TemporaryDirectory(dir=_IN_MEMORY if _IN_MEMORY.is_dir() else None) as place:
            write_adapter(model, Path(place), self._llm.llm_engine.model_config.dtype)
            self._request = LoRARequest(f"adapter-{number}", number, place)
            self._llm.llm_engine.add_lora(self._request)  # reads it now, and lets go of the one before

    def generate(self, prompts: Any, **options: Any) -> Any:
        """vLLM's method."""
        if self._request is None:
            raise RuntimeError("vLLM was asked for completions before it had an adapter")
        return self._llm.generate(prompts, lora_request=self._request, **options)

    def sleep(self, level: int = 1) -> None:
        """Level 2, which TRL asks for, would drop the base; level 1 keeps it in main memory, to the bit."""
        self._llm.sleep(level=1)


def write_adapter(model: Any, place: Path, dtype: torch.dtype) -> None:
    """The active adapter in PEFT's format, in vLLM's dtype, to which vLLM would round it anyway."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    name = model.active_adapter
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    whole = {  # FSDP2 gives each process its part
        key: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for key, tensor in tensors.items()
    }
    save_file(
        {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in whole.items()},
        place / "adapter_model.safetensors",
    )
    model.peft_config[name].save_pretrained(place)
