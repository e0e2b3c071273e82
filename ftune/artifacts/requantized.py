"""`ftune merge --quantized`: the adapter folded into the quantized weights that it was trained over, rounded again.

    W4' = Q(dequant(W4) + s B A)

Rounding may cost more than the adapter changes: NF4's error on a typical weight is as large as a typical update. So
both are measured, a layer's mean |W4' - (dequant(W4) + s B A)| over its mean |s B A|, and the KL from what was trained.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.pytorch_utils import Conv1D

from ftune import classifier, comparing, quantized
from ftune import model as models
from ftune.artifacts import checks, companions, distance, files, proof
from ftune.artifacts.checks import Check
from ftune.errors import RunError, UserError
from ftune.methods import saved
from ftune.methods.adapted import AdaptedLinear
from ftune.methods.base import check_merging, modules_of
from ftune.methods.head import method_of
from ftune.recipe import ModelSection


@dataclass(frozen=True)
class QuantizedMerge:
    """What was written, and what rounding did to it."""

    output: Path
    form: str
    keys_loaded: str
    reload_max_diff: float
    """Between the written files and the model they were written from."""
    error_over_change: float
    """Mean |rounding error| over mean |change|, of all weights that were adapted."""
    distance: distance.Distance
    """From the adapter over the quantized base."""
    checks: tuple[Check, ...] = ()
    """What held of the folder besides its logits."""
    forced_base: tuple[str, ...] = ()
    """The files in which the base is not the one trained on."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "merged_into": self.form,
            "trained_over": self.form,
            "keys_loaded": self.keys_loaded,
            "reload_max_diff": self.reload_max_diff,
            "checks": [check.as_dict() for check in self.checks],
            **({"forced_base": list(self.forced_base)} if self.forced_base else {}),
            "error_over_change": self.error_over_change,
            "distance_to_trained": {"quantized": self.distance.max_difference},
            "kl_to_trained": {"quantized": self.distance.kl},
        }


def merge(
    settings: ModelSection,
    adapter: Path,
    output: Path,
    strength: float,
    tokenizer: Tokenizer,
    device: torch.device,
    is_forced: bool = False,
) -> QuantizedMerge:
    """Write the merge quantized as the base was; raises UserError where the adapter was not trained over such a one."""
    check_merging(files.read_settings(adapter).name)
    if settings.quantization == "none":
        what = "this adapter was trained over a base in full precision, which a quantized merge would not be"
        raise UserError(what, "--quantized", "merge without it")
    base_card = files.read_card(settings.base) if isinstance(settings.base, Path) else {}
    fingerprint, digest = models.fingerprint(settings), files.adapter_digest(adapter)
    adapter_card = files.read_card(adapter)
    forced = files.check_base(adapter_card, fingerprint, digest, base_card, is_forced)
    model = classifier.load(settings, torch.float32, device, files.read_classes(adapter))
    base, was_tied = distance.reference(model), models.is_tied(model)
    loaded = files.load_adapter(model, adapter)
    method = method_of(loaded.method, model)
    method.set_strength(model, strength)
    trained = distance.reference(model)
    if comparing.max_difference(trained, base) == 0:
        raise RunError("the adapter has no effect, so there is nothing to merge", str(adapter), "was it trained?")
    before = {path: layer.matrix() for path, layer in modules_of(model, AdaptedLinear)}
    expected = proof.expected_of(settings, adapter_card, tokenizer, None)
    is_tied = was_tied and not saved.unties(model)
    method.merge(model)
    wanted = {path: matrix_of(model.get_submodule(path)) for path in before}
    again = requantize(model, settings, output)
    card = {
        "base": fingerprint,
        "contains_adapters": [*base_card.get("contains_adapters", []), digest],
        "strength": strength,
        "trained_over": settings.quantization,
        **({"forced_base": forced} if forced else {}),
    }
    difference = 0.0
    held: list[Check] = []
    found = trained

    def prove(folder_: Path) -> None:
        nonlocal difference, found
        companions.copy_processors(settings.base, folder_)
        held.extend(checks.of_files(folder_, expected))
        checks.require(held, output)
        quantized.settle(again, settings, torch.float32)
        written = models.load_base(
            settings.model_copy(update={"base": folder_, "revision": None}), torch.float32, device
        )
        held.extend(checks.of_ties(folder_, written, is_tied))
        checks.require(held, output)
        found = distance.reference(written)
        difference = comparing.max_difference(found, distance.reference(again))
        if not difference <= comparing.tolerance(written, found):
            raise RunError(f"the written model's logits differ by {difference:.3g}", str(output), "nothing was written")

    files.save_model(output, again, tokenizer, card, prove)
    ratio = error_over_change(before, wanted, {path: quantized.matrix(again.get_submodule(path)) for path in before})
    lost = distance.between(found, trained)
    return QuantizedMerge(
        output, settings.quantization, loaded.keys_loaded, difference, ratio, lost, tuple(held), tuple(forced)
    )


def matrix_of(layer: Any) -> torch.Tensor:
    """A merged layer's weight, (out, in) float32."""
    assert isinstance(layer, nn.Linear), "what was quantized is a layer of torch's own once merged"
    return layer.weight.detach().float()


def error_over_change(*matrices: dict[str, torch.Tensor]) -> float:
    """Of the weights before, as wanted, and as found after rounding: mean |found - wanted| / mean |wanted - before|."""
    before, wanted, found = matrices
    error = sum(float((found[path].float() - wanted[path]).abs().sum()) for path in wanted)
    change = sum(float((wanted[path] - before[path].float()).abs().sum()) for path in wanted)
    return error / change if change else 0.0


def requantize(model: PreTrainedModel, settings: ModelSection, output: Path) -> PreTrainedModel:
    """A merged model, whose other layers are quantized still, as transformers quantizes and saves it."""
    quantized.dequantize(model)
    quantized.forget(model)
    tensors = plain_tensors(model, settings)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise RunError(f"non-finite values in {name}", str(output), "nothing was written")
    auto_class = AutoModelForSequenceClassification if models.is_classifier(model) else AutoModelForCausalLM
    dtype, device = models.stored_dtype(models.load_config(settings)), model.get_input_embeddings().weight.device
    with tempfile.TemporaryDirectory() as plain:
        model.save_pretrained(plain, state_dict=tensors)
        again: PreTrainedModel = auto_class.from_pretrained(
            plain,
            dtype=dtype,
            quantization_config=quantized.configuration(settings, dtype),
            device_map={"": device},
            use_safetensors=True,
        )
    return again


def plain_tensors(model: PreTrainedModel, settings: ModelSection) -> dict[str, torch.Tensor]:
    """The model's tensors as its architecture stores them: GPT-2's layers are transposed, quantized ones are not."""
    with torch.device("meta"):
        shape = models.shape_of(distance.full_precision(settings), torch.float32)
    transposed = {f"{path}.weight" for path, module in shape.named_modules() if isinstance(module, Conv1D)}
    return {name: t.T.contiguous() if name in transposed else t for name, t in model.state_dict().items()}
