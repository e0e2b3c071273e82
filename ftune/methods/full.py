"""Full fine-tuning: every weight of the chosen layers; with `layers: all` also embeddings, norms and head."""

from transformers import PreTrainedModel

from ftune.methods import base
from ftune.model import decoder_layers
from ftune.settings import FullSettings


def attach(model: PreTrainedModel, settings: FullSettings, seed: int = 0) -> None:
    base.freeze(model)
    layers_path, module_list = decoder_layers(model)
    wanted = base.layer_indices(settings.layers, len(module_list))
    for name, parameter in model.named_parameters():
        layer = base.layer_of(name, layers_path)
        parameter.requires_grad_(settings.layers == "all" or layer in wanted)


def merge(model: PreTrainedModel) -> None:
    """Nothing to fold: what was trained is the model."""


METHOD = base.Method(
    attach=attach, set_strength=base.refuse_strength("a fully fine-tuned model"), merge=merge, trains_base=True
)
