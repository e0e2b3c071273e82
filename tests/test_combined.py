"""Several adapters in one model folder: PEFT's exact sum, any methods, classifiers, refusals. Numbers: trust cases."""

import pytest
import torch
from conftest import make_model, make_tokenizer, save_base
from merge_kit import load, make_adapter, with_adapter
from method_kit import SETTINGS, assert_same, logits
from peft import PeftModel
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ftune import comparing, folder
from ftune.artifacts import combining, files
from ftune.artifacts.combined import RECORD
from ftune.artifacts.combining import Combination
from ftune.classifier import Classes
from ftune.errors import RunError, UserError
from ftune.methods.head import method_of
from ftune.run.afterwards import merge_target
from ftune.run.combination import merge_several
from ftune.run.targets import resolve
from ftune.run.verifying import verify_target
from ftune.settings import BitfitSettings, LinearProbeSettings, LoraSettings

SMALL = LoraSettings(rank=4, alpha=8)
LARGE = LoraSettings(rank=6, alpha=6, target_modules="attention")


@pytest.fixture
def pair(tmp_path):
    """Two LoRA adapters of unequal rank and modules on one base."""
    base = save_base(tmp_path / "base")
    return base, [make_adapter(tmp_path / n, base, s, i) for i, (n, s) in enumerate([("a", SMALL), ("b", LARGE)])]


def combine(adapters, output, kind="linear", weights="0.7,0.3", **options):
    how = combining.combination(len(adapters), weights, kind, **options)
    return merge_several([resolve(path) for path in adapters], output, how, overwrite=False)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own
def test_linear_gives_the_logits_of_pefts_exact_sum(pair, tmp_path):
    base, adapters = pair
    told = combine(adapters, tmp_path / "both")
    judge = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters[0], adapter_name="a")
    judge.load_adapter(adapters[1], adapter_name="b")
    judge.add_weighted_adapter(["a", "b"], [0.7, 0.3], "both", combination_type="cat")
    judge.set_adapter("both")
    ours = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "both"))
    assert_same(ours, logits(judge.eval()))
    for adapter, parent in zip(adapters, told["adapters"], strict=True):
        alone = logits(with_adapter(base, adapter))
        away = comparing.max_difference(ours, alone)
        assert away > 1e-3
        assert away > 0.5 * parent["distance"]["max_difference"] > 0
        assert parent["distance"]["kl"] > 0


MIXED = [
    ("llama tied", {"dora": SETTINGS["dora"], "vera": SETTINGS["vera"], "probe": LinearProbeSettings()}),
    ("gpt2", {"ia3": SETTINGS["ia3"], "bitfit": BitfitSettings(), "lora": SMALL}),
    ("qwen2", {"adalora": SETTINGS["adalora"], "bitfit": BitfitSettings(), "full head": SMALL.model_copy(
        update={"modules_to_save": ("lm_head",)})}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "methods"), MIXED, ids=lambda value: value if isinstance(value, str) else "")
def test_linear_adds_the_changes_of_any_methods(tmp_path, kind, methods):
    """W = W_0 + sum w_i (W_i - W_0), each W_i from its own merged folder; and those folders' tensors bound it."""
    base = save_base(tmp_path / "base", kind, scale=2.0)
    adapters = [make_adapter(tmp_path / name, base, settings) for name, settings in methods.items()]
    told = combine(adapters, tmp_path / "all", weights="0.5,0.4,0.3")
    assert [parent["method"] for parent in told["adapters"]] == [settings.name for settings in methods.values()]
    for adapter in adapters:
        merge_target(resolve(adapter), adapter.with_name(f"{adapter.name} merged"), 1.0, overwrite=False)
    plain = load(base).state_dict()
    alone = [load(adapter.with_name(f"{adapter.name} merged")).state_dict() for adapter in adapters]
    found = load(tmp_path / "all").state_dict()
    assert found.keys() == plain.keys()
    for name, tensor in plain.items():
        wanted = tensor + sum(w * (one[name] - tensor) for w, one in zip((0.5, 0.4, 0.3), alone, strict=True))
        torch.testing.assert_close(found[name], wanted, atol=1e-6, rtol=1e-5)
    stored = load_file(tmp_path / "all" / "model.safetensors")
    assert ("lm_head.weight" in stored) == (kind != "gpt2")
    verified = verify_target(resolve(tmp_path / "all"))
    assert verified["passed"], verified
    assert {check["name"] for check in verified["checks"]} >= {
        "files",
        "dtype",
        "tied_embeddings",
        "tokenizer",
        "stops",
    }


@pytest.mark.parametrize(("kind", "options"), [("ties", {"density": 0.3}), ("ties", {}), ("dare", {"seed": 4})])
def test_ties_and_dare_act_on_every_changed_tensor_and_leave_the_rest(pair, tmp_path, kind, options):
    base, adapters = pair
    told = combine(adapters, tmp_path / "both", kind, "1,1", **options)
    density = options.get("density", {"ties": 0.2, "dare": 0.5}[kind])
    assert (told["combine"], told["density"], told["seed"]) == (kind, density, options.get("seed"))
    plain = load(base).state_dict()
    merged = [with_adapter(base, adapter) for adapter in adapters]
    for model in merged:
        method_of("lora", model).merge(model)
    alone, found = [model.state_dict() for model in merged], load(tmp_path / "both").state_dict()
    for name, tensor in plain.items():
        deltas = [one[name] - tensor for one in alone]
        if not any(bool(delta.any()) for delta in deltas):
            assert torch.equal(found[name], tensor)
            continue
        if kind == "ties":
            wanted = merge_utils.ties(deltas, torch.ones(2), density)
        else:
            digests = [files.adapter_digest(adapter) for adapter in adapters]
            drawn = [
                torch.bernoulli(
                    torch.full_like(d, 0.5, dtype=torch.float64), generator=combining.generator_of(4, digest, name)
                )
                for d, digest in zip(deltas, digests, strict=True)
            ]
            wanted = sum(delta * mask / 0.5 for delta, mask in zip(deltas, drawn, strict=True)).float()
        torch.testing.assert_close(found[name], tensor + wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("kind", "options"), [("linear", {}), ("ties", {}), ("dare", {})])
def test_combining_twice_gives_the_same_bytes(pair, tmp_path, kind, options):
    """Case 74."""
    for name in ("once", "again"):
        combine(pair[1], tmp_path / name, kind, **options)
    assert folder.checksums(tmp_path / "once") == folder.checksums(tmp_path / "again")
    combine(pair[1], tmp_path / "other", kind, **({"seed": 1} if kind == "dare" else {}), weights="0.6,0.3")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "other")]
    assert weights[0] != weights[1]


def test_card_and_record_tell_what_is_in_it_and_it_goes_into_no_base_again(pair, tmp_path):
    _, adapters = pair
    told = combine(adapters, tmp_path / "both", "dare", seed=3)
    card, record = files.read_card(tmp_path / "both"), folder.read_json(tmp_path / "both" / RECORD)
    digests = [files.adapter_digest(adapter) for adapter in adapters]
    assert card["contains_adapters"] == digests
    parts = card["combination"]["adapters"]
    assert [(part["sha256"], part["weight"], part["method"]) for part in parts] == [
        (digests[0], 0.7, "lora"),
        (digests[1], 0.3, "lora"),
    ]
    assert (card["combination"]["combine"], card["combination"]["density"], card["combination"]["seed"]) == (
        "dare",
        0.5,
        3,
    )
    assert {"output": str(tmp_path / "both"), **record} == told
    for adapter in adapters:
        with pytest.raises(UserError, match="already contains adapter"):
            merge_target(resolve(adapter, str(tmp_path / "both")), tmp_path / "twice", 1.0, overwrite=False)
    targets = [resolve(adapter, str(tmp_path / "both")) for adapter in adapters]
    with pytest.raises(UserError, match="already contains adapter"):
        merge_several(targets, tmp_path / "twice", Combination("linear", (1.0, 1.0)), overwrite=False)
    assert not (tmp_path / "twice").exists()


def test_half_precision_base_is_combined_in_float32_and_written_in_its_own(tmp_path):
    """Case 76."""
    make_model(scale=2.0).bfloat16().save_pretrained(tmp_path / "base")

    make_tokenizer().save_pretrained(tmp_path / "base")
    adapters = [make_adapter(tmp_path / name, tmp_path / "base", SMALL, i) for i, name in enumerate("ab")]
    told = combine(adapters, tmp_path / "both")
    assert 0 < told["combined_max_diff"] <= told["tolerance"]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "both"))
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: t.dtype for name, t in before.items()}


# Classifiers


def test_classifiers_of_the_same_labels_are_combined_head_and_all(tmp_path):
    base, classes = save_base(tmp_path / "base", "qwen2"), Classes(("neg", "pos"), 0)
    adapters = [make_adapter(tmp_path / n, base, SMALL, i, classes) for i, n in enumerate("ab")]
    heads = [with_adapter(base, adapter).score.weight.detach() for adapter in adapters]
    for kind in ("linear", "ties", "dare"):
        combine(adapters, tmp_path / kind, kind)
        found = load_file(tmp_path / kind / "model.safetensors")["score.weight"]
        torch.testing.assert_close(found, 0.7 * heads[0] + 0.3 * heads[1])
    other = make_adapter(tmp_path / "other", base, SMALL, 2, Classes(("pos", "neg"), 0))
    with pytest.raises(UserError, match=r"a classifier of pos, neg, and .* is a classifier of neg, pos"):
        combine([adapters[0], other], tmp_path / "mixed")
    language = make_adapter(tmp_path / "language", base, SMALL, 3)
    with pytest.raises(UserError, match="a language model's"):
        combine([adapters[0], language], tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


# What is refused


def test_adapters_that_do_not_belong_together_are_refused(pair, tmp_path):
    base, (one, other) = pair
    elsewhere = make_adapter(tmp_path / "elsewhere", save_base(tmp_path / "base 2", seed=1), SMALL)
    with pytest.raises(UserError, match="is not that of"):
        combine([one, elsewhere], tmp_path / "both")
    how, targets = Combination("linear", (0.5, 0.5)), [resolve(path, str(base)) for path in (one, elsewhere)]
    with pytest.raises(UserError, match=r"base fingerprint differs: model\.safetensors"):
        merge_several(targets, tmp_path / "both", how, False)
    with pytest.raises(UserError, match="the same adapter as"):
        combine([one, other, one], tmp_path / "both", weights="1,1,1")
    prompt = make_adapter(tmp_path / "prompt", base, SETTINGS["prompt"])
    with pytest.raises(UserError, match="an adapter of prompt_tuning cannot be merged"):
        combine([one, prompt], tmp_path / "both")
    with pytest.raises(UserError, match="this is a whole model"):
        combine([one, base], tmp_path / "both")
    with pytest.raises(UserError, match="name the folder to write"):
        combine([one, other], None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="exists already"):
        combine([one, other], tmp_path / "full")
    assert not (tmp_path / "both").exists()


def test_adapters_of_other_templates_are_refused(pair, tmp_path):
    _, (one, other) = pair
    make_tokenizer("{{ messages[0].content }}").save_pretrained(other)
    with pytest.raises(UserError, match="trained with another chat template than"):
        combine([one, other], tmp_path / "both")
    make_tokenizer("{{ messages[0].content }}").save_pretrained(one)
    with pytest.raises(RunError, match="chat_template: another than was trained with"):
        combine([one, other], tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_forced_base_is_the_first_ones_and_is_marked(pair, tmp_path):
    _, (one, _) = pair
    elsewhere = make_adapter(tmp_path / "elsewhere", save_base(tmp_path / "base 2", seed=1), SMALL, 5)
    how = Combination("linear", (0.5, 0.5))
    told = merge_several([resolve(p, is_forced=True) for p in (one, elsewhere)], tmp_path / "both", how, False)
    assert told["forced_base"] == files.read_card(tmp_path / "both")["forced_base"] == ["model.safetensors"]


def test_changes_that_cancel_out_are_refused(pair, tmp_path):
    base, (one, _) = pair
    negative = make_adapter(tmp_path / "negative", base, SMALL)

    tensors = load_file(one / files.ADAPTER_WEIGHTS)
    flipped = {name: -tensor if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(flipped, negative / files.ADAPTER_WEIGHTS)
    with pytest.raises(RunError, match="no effect"):
        combine([one, negative], tmp_path / "both", weights="1,1")
    assert not (tmp_path / "both").exists()
