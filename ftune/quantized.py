"""A base held in 4 or 8 bits through bitsandbytes: asking for it, checking what came, and reading its weights back.

    4 bits: W ~ c[q] * a, one a for 64 weights (itself in 8 bits when double)    Dettmers et al. 2023 (arXiv 2305.14314)
    8 bits: W ~ q * a / 127, one a for each output                               Dettmers et al. 2022 (arXiv 2208.07339)

Only weights are rounded here, never activations: a quantized layer computes with exactly the matrix that `matrix`
gives, while training, evaluating and proving alike.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ftune.errors import UserError
from ftune.recipe import ModelSection

BLOCK = 64
"""Weights that share one constant in 4 bits; double quantization joins 256 of these constants."""


M_MMAP_THRESHOLD = -3
"""mallopt's name in glibc for the size from which freed memory goes back to the system at once."""


@contextmanager
def returning_memory() -> Iterator[None]:
    """While a base is quantized layer by layer, let each plain layer's memory go back to the system.

    glibc raises its threshold to 32 MiB as it goes and then keeps what was freed in pieces: loading 134M weights in nf4
    peaked at 207 MiB, and at 132 MiB with this (the quantized base takes 67, one layer 64).
    """
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**25)


def configuration(settings: ModelSection, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers must be told. Its own defaults (fp4, one pass, float32) are not QLoRA's, so all is said."""
    if settings.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.quantization,
        bnb_4bit_use_double_quant=settings.double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )


def _stored(config: Any) -> tuple[str, bool] | None:
    """How a base's own files are quantized: (nf4, double); None for plain weights."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    found: dict[str, Any] = stored if isinstance(stored, dict) else stored.to_dict()
    if found.get("load_in_4bit"):
        return str(found.get("bnb_4bit_quant_type", "fp4")), bool(found.get("bnb_4bit_use_double_quant"))
    return ("int8" if found.get("load_in_8bit") else str(found.get("quant_method", "unknown"))), True


def is_stored_quantized(config: Any) -> bool:
    return _stored(config) is not None


def stored_form(config: Any) -> dict[str, Any]:
    """The keys of `model` that mean how a base's own files are quantized; empty for plain weights."""
    quantization, is_double = _stored(config) or ("none", True)
    if quantization not in ("nf4", "fp4", "int8"):
        return {}
    return {"quantization": quantization, "double_quantization": is_double}


def check_stored(settings: ModelSection, config: Any) -> None:
    """A base whose files are quantized already is used as it is, or refused: it cannot be quantized in another way."""
    stored = _stored(config)
    if stored is None or _same(stored, settings):
        return
    quantization, is_double = stored
    told = quantization + (" with double_quantization" if is_double and quantization in ("nf4", "fp4") else "")
    can = quantization in ("nf4", "fp4", "int8")
    keys = f"quantization: {quantization}" + (
        f" and double_quantization: {str(is_double).lower()}" if quantization in ("nf4", "fp4") else ""
    )
    raise UserError(
        f"this base is stored in {told}, and the recipe asks for {settings.quantization}",
        "model.quantization",
        f"write {keys}, or name the base in full precision" if can else "name the base in full precision",
    )


def _same(stored: tuple[str, bool], settings: ModelSection) -> bool:
    quantization, is_double = stored
    is_same_double = quantization == "int8" or is_double == settings.double_quantization
    return quantization == settings.quantization and is_same_double


class _TimesFrozen(torch.autograd.Function):
    """x W^T, with W made anew from 8 bits in the backward pass rather than kept for it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: "Int8Linear") -> torch.Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.matrix())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.layer.matrix(), None


class Int8Linear(nn.Linear):
    """The weights of a `Linear8bitLt`, multiplied by inputs that are not rounded.

    bitsandbytes' own layer rounds inputs to 8 bits too: on a CPU when evaluating but not when training.
    """

    scale: torch.Tensor

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.compute_dtype = layer.in_features, layer.out_features, dtype
        self.weight = nn.Parameter(layer.weight.data, requires_grad=False)
        self.register_buffer("scale", layer.weight.SCB / 127)
        self.bias = layer.bias

    def matrix(self) -> torch.Tensor:
        """(out, in) in the compute dtype."""
        return (self.weight * self.scale[:, None]).to(self.compute_dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h: torch.Tensor = _TimesFrozen.apply(x.to(self.compute_dtype), self)  # type: ignore[no-untyped-call]
        return (h if self.bias is None else h + self.bias).to(x.dtype)


def settle(model: PreTrainedModel, settings: ModelSection, dtype: torch.dtype) -> None:
    """Check that what was loaded is what was asked for, and make its layers compute with `matrix` exactly."""
    import bitsandbytes

    for path, layer in list(model.named_modules()):
        if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            model.set_submodule(path, Int8Linear(layer, dtype))
        elif isinstance(layer, bitsandbytes.nn.Linear4bit):
            # With AVX512-BF16, bitsandbytes would lay the weights out anew in the first evaluation and multiply in
            # bfloat16 whatever was asked for; nothing can read them afterwards (dequantized: relative error 1.44).
            layer.support_avx512bf16_for_cpu = False
            layer.compute_dtype, layer.compute_type_is_set = dtype, True
            layer.weight.quant_state.dtype = dtype
    kept = {"the output head": model.get_output_embeddings(), "the embeddings": model.get_input_embeddings()}
    problems = [name for name, module in kept.items() if module is not None and is_quantized(module)]
    found = {_form(layer) for _, layer in layers(model)}
    if not found:
        problems.append(f"no layer of {type(model).__name__}")
    if problems or not all(_same(form, settings) for form in found):
        told = f"quantized: {' and '.join(problems)}" if problems else f"the layers came as {sorted(found)}"
        raise UserError(
            f"the base cannot be quantized as asked ({told})", "model.quantization", "use quantization: none"
        )


def _form(layer: Any) -> tuple[str, bool]:
    if isinstance(layer, Int8Linear):
        return "int8", True
    return layer.weight.quant_state.quant_type, layer.weight.quant_state.nested


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer's weight cannot be read directly."""
    weight = getattr(module, "weight", None)
    return isinstance(module, Int8Linear) or hasattr(weight, "quant_state") or hasattr(weight, "SCB")


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every quantized layer, by path; a list first, so that they can be replaced on the way."""
    return iter([(path, module) for path, module in model.named_modules() if is_quantized(module)])


@torch.no_grad()
def matrix(layer: Any) -> torch.Tensor:
    """A quantized layer's weight as (out, in), in the dtype it computes in."""
    if isinstance(layer, Int8Linear):
        return layer.matrix()
    import bitsandbytes

    state = layer.weight.quant_state
    assert not getattr(state, "packing_format_for_cpu", False), "bitsandbytes laid this weight out anew"
    plain: torch.Tensor = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)
    return plain


def constants(layer: Any) -> dict[str, torch.Tensor]:
    """What belongs to the weight's numbers but is no parameter."""
    if isinstance(layer, Int8Linear):
        return {"scale": layer.scale}
    state = layer.weight.quant_state
    return {"absmax": state.absmax} | ({"nested_absmax": state.state2.absmax} if state.nested else {})


@torch.no_grad()
def plain(layer: Any, values: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    """A layer of torch's own in place of a quantized one: values (out, in) are rounded to the compute dtype."""
    has_bias = layer.bias is not None
    made = nn.Linear(layer.in_features, layer.out_features, bias=has_bias, device="meta")
    made.weight = nn.Parameter(values.to(layer.compute_dtype).contiguous(), requires_grad=False)
    if has_bias:
        made.bias = nn.Parameter((layer.bias if bias is None else bias).to(layer.bias.dtype), requires_grad=False)
    return made.train(layer.training)


def dequantize(model: PreTrainedModel) -> None:
    """Make every quantized layer a plain one of the same values, in place."""
    for path, layer in layers(model):
        model.set_submodule(path, plain(layer, matrix(layer)))


def forget(model: PreTrainedModel) -> None:
    """A model whose layers are plain again says so, else transformers would save it as a quantized one."""
    for owner, names in (
        (model.config, ("quantization_config",)),
        (model, ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")),
    ):
        for name in names:
            if name in vars(owner):
                delattr(owner, name)


def describe(model: PreTrainedModel, settings: ModelSection) -> dict[str, Any]:
    """How the base is held, as it came out: for the manifest."""
    found = [layer for _, layer in layers(model)]
    is_four_bit = settings.quantization in ("nf4", "fp4")
    dtype = found[0].compute_dtype if found else model.get_input_embeddings().weight.dtype
    return {
        "quantization": _form(found[0])[0] if found else "none",
        "double_quantization": _form(found[0])[1] if is_four_bit else None,
        "compute_dtype": str(dtype).removeprefix("torch."),
    }


def weight_bytes(model: PreTrainedModel, settings: ModelSection) -> int:
    """Bytes of a plain model's weights once quantized, from shapes alone: every linear layer but the head, no more."""
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, Conv1D | nn.Linear) and m is not head]
    plain_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    saved = (m.weight.numel() * m.weight.element_size() - _quantized_bytes(m, settings) for m in linear)
    return int(plain_bytes - sum(saved))


def _quantized_bytes(layer: nn.Linear | Conv1D, settings: ModelSection) -> int:
    weight: torch.Tensor = layer.weight
    if settings.quantization == "int8":
        return weight.numel() + 4 * weight.shape[1 if isinstance(layer, Conv1D) else 0]
    blocks = -(-weight.numel() // BLOCK)
    constants_bytes = blocks + 4 * -(-blocks // 256) if settings.double_quantization else 4 * blocks
    return -(-weight.numel() // 2) + constants_bytes
