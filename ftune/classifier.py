"""A base as a classifier: the body of the base under transformers' own classification head, `score`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from ftune import model as models
from ftune.errors import UserError
from ftune.recipe import ModelSection

HEAD = "score.weight"


@dataclass(frozen=True)
class Classes:
    """What a classifier tells apart: its labels by class id, and the token that pads its rows."""

    labels: tuple[str, ...]
    pad_token_id: int | None


def classes_of(config: Any) -> Classes:
    """What a saved classifier's configuration says."""
    labels = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    return Classes(labels, config.get_text_config().pad_token_id)


def choose_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a padding token that ends no text, if it has one.

    transformers pools at the last token that is not the padding token. Where padding is the end-of-sequence token, or
    missing, rows that end with it would be pooled one token early; a begin-of-sequence token ends no text.
    """
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return
    for name in ("bos_token", "unk_token", "eos_token"):
        token = getattr(tokenizer, name)
        if token is not None and (token != tokenizer.eos_token or name == "eos_token"):
            tokenizer.pad_token = token
            return
    raise UserError(
        "the tokenizer has no token that could pad a batch, and a classifier needs one",
        "model.base",
        "give the tokenizer a pad_token",
    )


def load(
    settings: ModelSection, dtype: torch.dtype, device: torch.device, classes: Classes | None, seed: int = 0
) -> PreTrainedModel:
    """The base with every weight from its files; with `classes`, under a new head."""
    base = models.load_base(settings, dtype, device)
    return base if classes is None else build(base, classes, seed)


def build(base: PreTrainedModel, classes: Classes, seed: int = 0) -> PreTrainedModel:
    """The classifier over a base's body, which it takes over; its head is new, float32, drawn from the seed."""
    config = base.config
    if models.is_classifier(base):
        raise UserError("this base is a classifier already", "model.base", "start from the model it was made from")
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise _no_classifier(base, "transformers has none for it")
    config.num_labels = len(classes.labels)
    config.id2label = dict(enumerate(classes.labels))
    config.label2id = {label: i for i, label in enumerate(classes.labels)}
    if classes.pad_token_id is not None:
        config.get_text_config().pad_token_id = classes.pad_token_id
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    prefix = model.base_model_prefix
    if type(model.base_model) is not type(base.base_model):
        raise _no_classifier(base, f"its body would be {type(model.base_model).__name__}")
    setattr(model, prefix, base.base_model)
    new = {name for name, _ in model.named_parameters() if not name.startswith(prefix + ".")}
    if new != {HEAD}:
        raise _no_classifier(base, f"its head would be {', '.join(sorted(new)) or 'missing'}")
    config.architectures = [type(model).__name__]
    model.config, model.name_or_path = config, base.name_or_path
    model.made_from = getattr(base, "made_from", None)
    model.score = _new_head(model, base.get_input_embeddings().weight.device, config, seed)
    return model.train(base.training)


def _new_head(model: PreTrainedModel, device: torch.device, config: Any, seed: int) -> nn.Linear:
    shape = model.score.weight.shape
    torch.manual_seed(seed)
    head = nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=torch.float32)
    nn.init.normal_(head.weight, std=getattr(config.get_text_config(), "initializer_range", 0.02))
    head.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.weight.dtype),))
    return head


def plain_head(model: PreTrainedModel) -> None:
    """The head as transformers has it: without our hook, in the dtype of the body."""
    trained, dtype = model.score.weight, model.get_input_embeddings().weight.dtype
    head = nn.Linear(trained.shape[1], trained.shape[0], bias=False, device=trained.device, dtype=dtype)
    head.weight.data.copy_(trained.data)
    model.score = head


def _no_classifier(base: PreTrainedModel, why: str) -> UserError:
    return UserError(f"{type(base).__name__} cannot be made a classifier: {why}", "objective.name", "take another base")
