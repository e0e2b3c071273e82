"""Linear probe: a new head on frozen features.

    logits = W f(x)      f: the base's body, frozen, in evaluation mode   W: (out, width), float32

Of a classifier W is its own new head, which is trained beside any method, so there is nothing to attach. Of a language
model W is a copy of the output head that starts equal to it and is tied to nothing. As f never changes, its states are
computed once (`features.py`).
"""

from transformers import PreTrainedModel

from ftune.methods import base, saved
from ftune.model import is_classifier
from ftune.settings import LinearProbeSettings


def output_head(model: PreTrainedModel) -> str:
    """The path of a language model's output head."""
    head = model.get_output_embeddings()
    return next(str(path) for path, module in model.named_modules() if module is head)


def attach(model: PreTrainedModel, settings: LinearProbeSettings, seed: int = 0) -> None:
    base.freeze(model)
    if not is_classifier(model):
        saved.attach(model, [output_head(model)])


def merge(model: PreTrainedModel) -> None:
    """The new head is the model's head already; it becomes a plain module of the base's dtype."""
    saved.merge(model)


METHOD = base.Method(attach=attach, set_strength=base.refuse_strength("a head"), merge=merge, trains_head_alone=True)
