"""The tokenizer and the base, as transformers loads them, and a forward pass in two halves: hidden states and head."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import extract_commit_hash

from ftune import attention, folder, last_layer, quantized, stored, trust
from ftune.batches import MicroBatch
from ftune.errors import UserError
from ftune.loss import Head
from ftune.recipe import ModelSection

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
huggingface_hub.utils.disable_progress_bars()


def _source(settings: ModelSection) -> dict[str, Any]:
    """The arguments that every from_pretrained of this base shares; of a hub id all are of one commit."""
    return {
        "pretrained_model_name_or_path": settings.base,
        "revision": "main" if isinstance(settings.base, Path) else _commit(settings.base, settings.revision),
        "trust_remote_code": settings.trust_remote_code,
    }


@cache
def _commit(base: str, revision: str | None) -> str:
    """The commit that a revision of the hub is at, once for the whole process: it may move while a run goes on.

    Where it cannot be had it is the revision itself, with which the loader then fails and tells why.
    """
    found = trust.find(ModelSection(base=base, revision=revision), "config.json")
    commit = extract_commit_hash(None if found is None else str(found), None)
    return commit or revision or "main"


def _check_folder(settings: ModelSection, file: str) -> None:
    if isinstance(settings.base, Path):
        if not settings.base.is_dir():
            raise UserError("no such model folder", str(settings.base), "relative paths are relative to the recipe")
        if not (settings.base / file).is_file():
            raise UserError(f"no {file} in this model folder", str(settings.base), "name a transformers model folder")


def load_config(settings: ModelSection) -> Any:
    """The model's configuration; raises UserError when the base cannot be found, or comes with code."""
    _check_folder(settings, "config.json")
    trust.check_code(settings)
    with _told("model", settings):
        config = AutoConfig.from_pretrained(**_source(settings))
        if getattr(config, "dtype", None) is None and isinstance(settings.base, Path):
            config.dtype = _dtype_of_files(settings.base)
        trust.check_values(config)
    return config


def _dtype_of_files(base: Path) -> torch.dtype | None:
    """What most weights of a folder are stored in, for a configuration that does not say; None where there are none."""
    counts: Counter[torch.dtype] = Counter()
    for path in sorted(base.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            counts.update(file.get_slice(name)[:0].dtype for name in file.keys())  # noqa: SIM118
    floating = [dtype for dtype, _ in counts.most_common() if dtype.is_floating_point]
    return floating[0] if floating else None


@contextmanager
def _told(what: str, settings: ModelSection) -> Iterator[None]:
    """Whatever transformers makes of a folder that is not as it should be becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise _cannot_load(what, settings, error) from error


def _cannot_load(what: str, settings: ModelSection, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if not isinstance(error, OSError | ValueError | RuntimeError | ImportError):
        reason = f"{type(error).__name__}: {reason}"
    hint = "is it a transformers folder with safetensors weights, or a hub id that can be reached from here?"
    return UserError(f"the {what} cannot be loaded: {reason}", f"model.base: {settings.base}", hint)


def load_tokenizer(settings: ModelSection) -> PreTrainedTokenizerBase:
    """The base's own tokenizer, with the recipe's chat template where it names one."""
    _check_folder(settings, "tokenizer_config.json")
    trust.check_code(settings)
    with _told("tokenizer", settings):
        tokenizer = AutoTokenizer.from_pretrained(**_source(settings))
        tokenizer("a")  # settings of a wrong type show only now
    if not tokenizer.is_fast:
        raise UserError(
            "this tokenizer has no fast version, so its tokens cannot be placed in the text",
            f"model.base: {settings.base}",
            "convert it to tokenizer.json",
        )
    if settings.chat_template is not None:
        if not settings.chat_template.is_file():
            raise UserError("no such file", f"model.chat_template: {settings.chat_template}", "name a Jinja file")
        tokenizer.chat_template = stored.read_text(settings.chat_template)
    return tokenizer


def resolve_dtype(requested: str, device: torch.device, trains_base: bool, stored: torch.dtype) -> torch.dtype:
    """The dtype the base is held in.

    `auto` is the stored one, except where that would harm: float32 for weights that are trained, and on a CPU, unless
    they are stored in bfloat16 and it multiplies that fast. float16 on a CPU is refused.
    """
    if requested == "float16" and device.type == "cpu":
        raise UserError("float16 cannot be trained on a CPU", "model.dtype", "use float32 or bfloat16")
    if requested == "float16" and trains_base:
        what = "float16 is too narrow for weights that are trained"
        raise UserError(what, "model.dtype", "use float32 or bfloat16, or a method that leaves the base as it is")
    if requested != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[requested]
    if device.type == "cpu" and not (stored == torch.bfloat16 and multiplies_bfloat16()):
        return torch.float32
    return torch.float32 if trains_base else stored


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for it. Without them bfloat16 is slower than float32.

    What torch cannot tell is taken for no.
    """
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def stored_dtype(config: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def base_dtype(settings: ModelSection, device: torch.device, trains_base: bool) -> torch.dtype:
    """The dtype a recipe's base is held in on this device; raises UserError for one that cannot be trained there."""
    return resolve_dtype(settings.dtype, device, trains_base, stored_dtype(load_config(settings)))


def is_classifier(model_or_config: Any) -> bool:
    """Whether this is, or a configuration says it is, a model with a classification head."""
    if isinstance(model_or_config, PreTrainedModel):
        return type(model_or_config).__name__.endswith("ForSequenceClassification")
    return any(name.endswith("ForSequenceClassification") for name in model_or_config.architectures or ())


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output head and the embeddings are one tensor."""
    projection = model.get_output_embeddings()
    return projection is not None and projection.weight is model.get_input_embeddings().weight


def load_base(settings: ModelSection, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The base with every weight from its files; raises UserError when one is missing, unexpected or misshapen.

    Quantized weights go to the device one by one, so that the plain ones are never there all at once.
    """
    config = load_config(settings)
    auto_class = AutoModelForSequenceClassification if is_classifier(config) else AutoModelForCausalLM
    quantized.check_stored(settings, config)
    extra: dict[str, Any] = {}
    if settings.quantization != "none":
        extra["device_map"] = {"": device}
        if not quantized.is_stored_quantized(config):
            extra["quantization_config"] = quantized.configuration(settings, dtype)
    trust.check_weights(settings)
    with _told("model", settings), quantized.returning_memory() if extra else nullcontext():
        model, info = auto_class.from_pretrained(
            **_source(settings),
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            attn_implementation=settings.attention if settings.attention in attention.NATIVE else None,
            **extra,
        )
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if told := "; ".join(f"{kind.replace('_', ' ')}: {', '.join(keys[:5])}" for kind, keys in wrong.items() if keys):
        raise UserError(
            f"the weights do not fit the model's configuration: {told}",
            f"model.base: {settings.base}",
            "the folder's config.json and weights must belong together",
        )
    model.made_from = settings
    if settings.quantization == "none":
        return model.to(device)
    quantized.settle(model, settings, dtype)
    return model


def shape_of(settings: ModelSection, dtype: torch.dtype) -> PreTrainedModel:
    """The model from config.json alone; inside FakeTensorMode or on the meta device it takes no memory for weights."""
    config = load_config(settings)
    with _told("model", settings):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=settings.trust_remote_code)
        model.tie_weights()
    model.made_from = settings
    return model


def fingerprint(settings: ModelSection) -> dict[str, str]:
    """sha256 of each file that makes the base what it is; for a hub id, its commit hash."""
    if not isinstance(settings.base, Path):
        return {"commit": _commit(settings.base, settings.revision)}
    code = (".py",) if settings.trust_remote_code else ()
    kinds = (".safetensors", ".json", ".jinja", ".model", ".txt", ".bin", *code)
    return {name: digest for name, digest in folder.checksums(settings.base).items() if name.endswith(kinds)}


def versions() -> dict[str, str]:
    """The versions of what computed the result."""
    import accelerate
    import tokenizers

    from ftune import __version__

    modules = {"torch": torch, "transformers": transformers, "accelerate": accelerate, "tokenizers": tokenizers}
    return {"ftune": __version__} | {name: str(module.__version__) for name, module in modules.items()}


def head(model: PreTrainedModel) -> Head:
    """Hidden states -> logits as the architecture makes them: with scaling (Granite, Cohere) or soft cap (Gemma)."""
    if is_classifier(model):
        score: Head = model.score
        return score
    projection = model.get_output_embeddings()
    config = model.config
    scale = getattr(config, "logit_scale", None) or 1.0
    if divisor := getattr(config, "logits_scaling", None):
        scale = scale / divisor
    softcap = getattr(config, "final_logit_softcapping", None)

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = projection(hidden)
        values = values * scale if scale != 1.0 else values
        return torch.tanh(values / softcap) * softcap if softcap else values

    return logits


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The path and the list of the text model's transformer layers."""
    count = model.config.get_text_config().num_hidden_layers
    decoder = model.get_decoder()
    for path, module in model.named_modules():
        inside = any(module is part for part in decoder.modules())
        if isinstance(module, nn.ModuleList) and len(module) == count and inside:
            return path, module
    raise UserError(
        f"the layers of {type(model).__name__} cannot be found", "model.base", "this architecture is not supported"
    )


def hidden_states(
    model: PreTrainedModel, batch: MicroBatch, packing: bool, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """The last hidden state at `positions`, (n, width), or at every token. With packing, inside `attention.packed`."""
    extra: dict[str, Any] = {"segment_bounds": batch.bounds} if packing else {}
    if packing and positions is not None and last_layer.heeds(model):
        extra[last_layer.KEYWORD] = positions
    output = model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **extra)
    states: torch.Tensor = output.last_hidden_state[0]
    return states if positions is None else states[positions]


@dataclass(frozen=True)
class ModelFacts:
    """What the data stage needs to know of the model before it is loaded."""

    vocab_size: int
    max_positions: int | None
    width: int


def facts(settings: ModelSection) -> ModelFacts:
    config = load_config(settings).get_text_config()
    return ModelFacts(config.vocab_size, getattr(config, "max_position_embeddings", None), config.hidden_size)


def is_linear(module: nn.Module) -> bool:
    """A layer that multiplies by one matrix: torch's, or GPT-2's transposed one."""
    return isinstance(module, nn.Linear | transformers.pytorch_utils.Conv1D)
