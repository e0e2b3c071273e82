"""Adapters as if trained, on disk beside their base: what the tests of merging share."""

import torch
from method_kit import randomize

from ftune import classifier
from ftune import model as models
from ftune.artifacts import files
from ftune.methods.base import trainable
from ftune.methods.head import method_of
from ftune.recipe import ModelSection

CPU = torch.device("cpu")


def load(path, classes=None, dtype=torch.float32):
    return classifier.load(ModelSection(base=path), dtype, CPU, classes)


def make_adapter(path, base, settings, seed=0, classes=None):
    """An adapter folder, every parameter moved; on a card as a run writes it. Returns the folder."""
    model = load(base, classes)
    method_of(settings.name, model).attach(model, settings)
    randomize(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.02 * seed * torch.randn(parameter.shape, generator=generator))
    card = {
        "base": models.fingerprint(ModelSection(base=base)),
        "base_name": str(base),
        "method": settings.model_dump(mode="json"),
    }
    tokenizer = models.load_tokenizer(ModelSection(base=base))
    files.save_adapter(path, model, tokenizer, settings, str(base), card)
    return path


def with_adapter(base, adapter):
    """The base with the adapter beside its layers."""
    model = load(base, files.read_classes(adapter))
    files.load_adapter(model, adapter)
    return model
