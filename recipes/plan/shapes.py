"""The sizes of a model, counted on the model itself: built on the meta device, where a tensor has a shape and no bytes.

    shape, trained = sizes(model_config(config), config.lora.peft_config())

So any architecture that transformers knows is counted exactly, with its adapters as PEFT attaches them. All it needs is
the model's config.json: in a local folder, in the hub's cache, or in model_shapes.yaml. It never uses the network.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from recipes.config.load import RunConfig
from recipes.models.foreign import no_foreign_code, require_own_attention
from recipes.models.published import require_trainable
from recipes.problems import ConfigError, Problem, one_of

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PretrainedConfig, PreTrainedModel

_TABLE = Path(__file__).with_name("model_shapes.yaml")
# Architectures whose layers formulas.layer_bytes describes, as counted in tests/recipes/plan: those like a Llama's, and
# those with queries and keys normed per head as well.
_LLAMAS = {"llama", "mistral", "qwen2", "granite", "smollm3"}
_HEAD_NORMS = {"qwen3"}
_UNLIMITED = 2**20  # tokens, for models whose config names no longest sequence
_PROBE = 3  # tokens that go through the model to see what its cache keeps


@dataclass(frozen=True)
class CacheLayer:
    """What one layer keeps of a sequence during generation, in elements.

    width: per token (keys and values). window: the most tokens kept, None for all. fixed: per sequence of any length,
    such as a recurrent state.
    """

    width: int
    window: int | None = None
    fixed: int = 0

    def elements(self, length: int) -> int:
        """Of a sequence of `length` tokens."""
        return self.fixed + self.width * (length if self.window is None else min(length, self.window))


@dataclass(frozen=True)
class LayerShape:
    """A transformer layer like a Llama's. head_norms: queries and keys are normed, each head by itself."""

    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    head_norms: bool = False

    @property
    def attention_width(self) -> int:
        """All query heads side by side."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """All key heads side by side, or all value heads."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class ModelShape:
    """A model's sizes. `dtype` and `quantised` are the checkpoint's: torch's name, and Precision.quantised.

    parameters: all of them, a tied head once. linear: those of them that quantisation takes.
    cache: by layer, None if it could not be seen. layer: None if no formula covers what a layer keeps for the backward.
    """

    kind: str
    vocab: int
    hidden: int
    layers: int
    positions: int
    parameters: int
    linear: int
    cache: tuple[CacheLayer, ...] | None
    layer: LayerShape | None
    dtype: str = "float32"
    quantised: str = ""

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelShape:
        """Counted on a model on any device, which is not changed."""
        text = model.config.get_text_config()
        vocab, hidden = model.get_output_embeddings().weight.shape
        return cls(
            kind=text.model_type,
            vocab=vocab,
            hidden=hidden,
            layers=text.num_hidden_layers,
            positions=getattr(text, "max_position_embeddings", None) or _UNLIMITED,
            parameters=sum(p.numel() for p in model.parameters()),
            linear=sum(module.weight.numel() for module in _quantised_modules(model)),
            cache=_cache_layers(model),
            layer=_layer_shape(text),
            dtype=_name(model.dtype),
            quantised=cls.quantised_as(model.config),
        )

    @staticmethod
    def quantised_as(config: PretrainedConfig) -> str:
        """Precision.quantised of a checkpoint's configuration; "" if it is not, or not by bitsandbytes."""
        return _quantised(getattr(config, "quantization_config", None))


@dataclass(frozen=True)
class Trained:
    """Parameters that get a gradient: `adapters`, and `whole` ones (all, or those of lora.modules_to_save).

    adapted: weights that carry an adapter. head: the head's weight is trained itself.
    """

    adapters: int
    whole: int
    adapted: int
    head: bool

    @classmethod
    def of(cls, model: PreTrainedModel, lora: LoraConfig | None) -> Trained:
        """Counted after PEFT has put the adapters on the model; None trains every weight.

        Raises ConfigError if PEFT refuses, for layers that the model does not have.
        """
        if lora is None:
            return cls(adapters=0, whole=sum(p.numel() for p in model.parameters()), adapted=0, head=True)
        from peft import get_peft_model

        lora.init_lora_weights = False  # nothing to fill on the meta device, and it takes a second
        try:
            with warnings.catch_warnings():  # about what PEFT corrects by itself: a plan prints only the plan
                warnings.simplefilter("ignore")
                adapted = get_peft_model(model, lora, low_cpu_mem_usage=True)
        except ValueError as error:
            remedy = "name layers that the model has, or write all-linear"
            raise ConfigError([Problem("lora.target_modules", str(error), remedy=remedy)]) from error
        # PEFT adapts the others in silence.
        if absent := _absent(adapted.get_base_model(), lora.target_modules or ()):
            remedy = f"remove {one_of(absent)}, name layers that the model has, or write all-linear"
            raise ConfigError(
                [Problem("lora.target_modules", "has a layer that the model has not", absent, remedy)]
            )
        if model.config.tie_word_embeddings and hasattr(adapted.get_input_embeddings(), "lora_embedding_A"):
            message = "adapts the embedding, which is tied to the head: the merged head would be another one"
            targets = sorted(lora.target_modules or ())
            tied = [name for name in targets if name.rpartition(".")[2] in _embedding_name(adapted)]
            raise ConfigError(
                [Problem("lora.target_modules", message, targets, f"remove {one_of(tied)} from it")]
            )
        return cls.counted(adapted)

    @classmethod
    def counted(cls, model: Any) -> Trained:
        """By what gets a gradient, on a model with its adapters on it, if it has any."""
        trained = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
        adapters = sum(size for name, size in trained if ".lora_" in name)
        return cls(
            adapters=adapters,
            whole=sum(size for _, size in trained) - adapters,
            adapted=sum(_under(module).numel() for module in model.modules() if hasattr(module, "lora_A")),
            head=model.get_output_embeddings().weight.requires_grad,
        )


def _absent(model: PreTrainedModel, targets: Iterable[str]) -> list[str]:
    """Those of the layers that the model does not have. For all-linear PEFT has put their names in."""
    layers = [f".{name}" for name, _ in model.named_modules()]
    return sorted(name for name in targets if not any(layer.endswith(f".{name}") for layer in layers))


def sizes(config: PretrainedConfig, lora: LoraConfig | None) -> tuple[ModelShape, Trained]:
    """A model's sizes and what is trained of it, from its configuration.

    Raises ConfigError: see Trained.of; and for a configuration that no model can be made by.
    """
    from transformers import AutoModelForCausalLM

    require_own_attention("model.name", config.name_or_path, config)
    dtype = _name(config.dtype or torch.float32)
    with torch.device("meta"):  # in bfloat16, the only dtype that grouped experts take there
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        except Exception as error:
            raise _not_a_model(config.name_or_path, error) from error
    return replace(ModelShape.of(model), dtype=dtype), Trained.of(model, lora)


def model_config(config: RunConfig, *, network: bool = False) -> PretrainedConfig:
    """transformers' configuration of the run's model: made from scratch, local, in the hub's cache, or in the table.

    network: also fetch it from the hub.

    Raises ConfigError if it is nowhere, needs code of its own, or transformers does not know its architecture.
    """
    from transformers import AutoConfig

    if config.model.loader == "scratch":
        return _scratch(config, network)
    name = config.model.name or ""
    try:
        with no_foreign_code("model.name", name):
            own = AutoConfig.from_pretrained(
                name, revision=config.model.revision, local_files_only=not network, trust_remote_code=False
            )
        if config.model.attn_implementation in ("eager", "sdpa"):
            own._attn_implementation = config.model.attn_implementation
        if config.model.loader == "transformers":
            require_trainable(own, config.model, config.lora)
        return own
    except OSError:
        pass
    except ConfigError:
        raise
    except Exception as error:  # of a file that says nonsense, whatever comes of it
        raise _not_a_model(name, error) from error
    table = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    if name in table:
        return AutoConfig.for_model(**table[name])
    remedy = f"fetch it: hf download {name} config.json, or give a local folder"
    raise ConfigError([Problem("model.name", "no config.json of it on this machine", name, remedy)])


def _not_a_model(name: str, error: Exception) -> ConfigError:
    message = str(error).strip().partition("\n")[0] or type(error).__name__
    if "attn_implementation" in message or "FlashAttention" in message:
        remedy = "set it to sdpa"
        return ConfigError(
            [Problem("model.attn_implementation", f"as in the model's config.json: {message}", None, remedy)]
        )
    if message.startswith("Unrecognized configuration class"):
        message = "is no causal language model: transformers has none of its architecture"
    return ConfigError(
        [Problem("model.name", message, name, "name a causal language model that transformers knows")]
    )


def _scratch(config: RunConfig, network: bool) -> PretrainedConfig:
    """The configuration of the model that will be made."""
    from recipes.config.schema import ScratchConfig
    from recipes.models.load import scratch_config
    from recipes.tasks import get_task

    made = config.model.scratch or ScratchConfig()
    if config.model.tokenizer == "bpe":
        vocab = made.vocabulary
    elif config.model.tokenizer is not None:
        vocab = len(_tokenizer(config, config.model.tokenizer, network))
    else:
        vocab = len(get_task(config.task.name).characters) + 3  # <pad>, <eos>, <unk>
    return scratch_config(made, vocab, eos_token_id=None)


def _tokenizer(config: RunConfig, name: str, network: bool) -> Any:
    from recipes.models.prompts import tokenizer_here

    try:
        return tokenizer_here(config, name, network=network)
    except (OSError, ValueError) as error:
        remedy = f"fetch it: hf download {name}, or give a local folder with a tokenizer"
        problem = Problem("model.tokenizer", "cannot be loaded on this machine", name, remedy)
        raise ConfigError([problem]) from error


def _layer_shape(text: PretrainedConfig) -> LayerShape | None:
    """None for layers that formulas.layer_bytes does not describe."""
    if text.model_type not in _LLAMAS | _HEAD_NORMS or text.hidden_act != "silu":
        return None
    return LayerShape(
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        head_norms=text.model_type in _HEAD_NORMS,
    )


def _quantised_modules(model: PreTrainedModel) -> list[Any]:
    """The linears that bitsandbytes replaces: all but the head. Fused experts are not linears, and stay."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [
        module
        for module in model.modules()
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and module is not head
    ]


def _cache_layers(model: PreTrainedModel) -> tuple[CacheLayer, ...] | None:
    """What each layer of the cache holds after a few tokens; None for a model that cannot run without its weights."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    if _by_unsloth(model):
        return _cache_of_formula(cache.layers, _layer_shape(model.config.get_text_config()))
    tokens = torch.zeros(1, _PROBE, dtype=torch.long, device=model.device)
    try:
        with torch.no_grad():
            model(tokens, past_key_values=cache, use_cache=True)
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        return None
    return tuple(_cache_layer(layer) for layer in cache.layers)


def _by_unsloth(model: PreTrainedModel) -> bool:
    """Whether Unsloth's code stands in these classes: on the meta device its kernels would read at address 0."""
    kinds = {type(module) for module in model.modules()}
    return any((getattr(kind.forward, "__module__", "") or "").startswith("unsloth") for kind in kinds)


def _cache_of_formula(layers: list[Any], shape: LayerShape | None) -> tuple[CacheLayer, ...] | None:
    """Of layers like a Llama's, not run: keys and values of every head, within the window that the cache will keep."""
    if shape is None:
        return None
    return tuple(replace(_cache_layer(layer), width=2 * shape.kv_width) for layer in layers)


def _cache_layer(layer: Any) -> CacheLayer:
    grown = [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None]
    states = [
        tensor
        for name in ("conv_states", "recurrent_states")
        for tensor in getattr(layer, name, {}).values()
        if tensor is not None
    ]
    window = getattr(layer, "sliding_window", None)
    return CacheLayer(
        width=sum(t.numel() // t.shape[-2] for t in grown),  # (1, heads, tokens, head_dim)
        window=None if window is None else window - 1,  # beside the token in hand
        fixed=sum(t.numel() for t in states),
    )


def _embedding_name(model: Any) -> list[str]:
    """The parts of the dotted name of a model's input embedding."""
    embedding = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is embedding).split(".")


def _under(adapter: Any) -> torch.Tensor:
    """The weight that an adapter of PEFT's lies on: a linear's, or one of fused experts."""
    return adapter.get_param() if hasattr(adapter, "get_param") else adapter.get_base_layer().weight


def _name(dtype: torch.dtype) -> str:
    """As torch names it: bfloat16."""
    return str(dtype).removeprefix("torch.")


def _quantised(written: Any) -> str:
    """Precision.quantised of a checkpoint's quantization_config; "" if there is none, or not bitsandbytes'."""
    if written is None:
        return ""
    options = written if isinstance(written, dict) else written.to_dict()
    if options.get("load_in_4bit"):
        return "4bit-double" if options.get("bnb_4bit_use_double_quant") else "4bit"
    return "8bit" if options.get("load_in_8bit") else ""
