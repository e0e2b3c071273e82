"""Bases in 4 and 8 bits through bitsandbytes, and qlora. Numbers: trust cases."""

import subprocess
import sys

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import modules as bitsandbytes_modules
from conftest import REPOSITORY, SHAPES, make_model, make_tokenizer, save_base
from method_kit import randomize
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ftune import classifier, comparing, quantized
from ftune import model as models
from ftune.artifacts import distance, files
from ftune.classifier import Classes
from ftune.errors import UserError
from ftune.methods import METHODS
from ftune.methods.base import trainable
from ftune.methods.head import method_of
from ftune.recipe import ModelSection
from ftune.run.inputs import hashes
from ftune.settings import (
    METHOD_NAMES,
    AdaloraSettings,
    BitfitSettings,
    BottleneckSettings,
    DoraSettings,
    Ia3Settings,
    LinearProbeSettings,
    LoraSettings,
    PrefixTuningSettings,
    PromptTuningSettings,
    VeraSettings,
)

CPU = torch.device("cpu")
ROWS = comparing.proof_rows(96, 512)
QUANTIZED = [("nf4", True), ("nf4", False), ("fp4", True), ("int8", True)]
LORA, DORA = LoraSettings(rank=4, alpha=8, dropout=0.0), DoraSettings(rank=4, alpha=8, dropout=0.0)
METHOD_SETTINGS = {
    "lora": LORA,
    "lora, pissa": LoraSettings(rank=4, alpha=8, dropout=0.0, init="pissa"),
    "dora": DORA,
    "adalora": AdaloraSettings(initial_rank=4, target_rank=2),
    "vera": VeraSettings(rank=8),
    "ia3": Ia3Settings(),
    "bitfit": BitfitSettings(),
    "bottleneck": BottleneckSettings(size=8),
    "bottleneck, parallel": BottleneckSettings(size=8, placement="parallel"),
    "prefix": PrefixTuningSettings(virtual_tokens=3),
    "prefix, projection": PrefixTuningSettings(virtual_tokens=3, projection=True),
    "prompt": PromptTuningSettings(virtual_tokens=3),
    "prompt, deep": PromptTuningSettings(virtual_tokens=3, depth="deep"),
    "linear probe": LinearProbeSettings(),
}


@pytest.fixture(params=QUANTIZED, ids=lambda form: f"{form[0]}{', double' * form[1]}")
def form(request):
    return {"quantization": request.param[0], "double_quantization": request.param[1]}


def load(path, **form):
    return models.load_base(ModelSection(base=path, **form), torch.float32, CPU)


def reference(path, **form):
    """A plain float32 model that holds the dequantized weights."""
    model = load(path)
    for name, layer in quantized.layers(load(path, **form)):
        plain = model.get_submodule(name)
        W = quantized.matrix(layer)
        plain.weight.data = (W if isinstance(plain, torch.nn.Linear) else W.T).contiguous()
    return model


def logits(model):
    return comparing.logits_of(model, ROWS)


def same(ours, theirs, within=1e-5):
    assert comparing.max_difference(ours, theirs) <= within


def gradients(model):
    model.train()
    model.zero_grad()
    model(torch.tensor([ROWS[1]]), use_cache=False).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in trainable(model).items()}


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


# Reading weights back


def test_weights_that_bitsandbytes_lays_out_anew_cannot_be_read_back():
    """The trap: what its layers do to themselves in the first evaluation on a CPU with AVX512-BF16."""
    torch.manual_seed(0)
    W = torch.randn(256, 128)
    weight = bitsandbytes.nn.Params4bit(W.clone(), quant_type="nf4", requires_grad=False).to("cpu")
    dequantize = bitsandbytes.functional.dequantize_4bit
    before = dequantize(weight.data, weight.quant_state)
    assert relative(before, W) == pytest.approx(0.09, abs=0.01)
    packed, state = bitsandbytes_modules._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    assert relative(dequantize(packed, state).float(), W) > 1.4
    back, state = bitsandbytes_modules._convert_weight_packed_for_cpu_inverse(packed, state)
    assert relative(dequantize(back, state).float(), before) > 1e-4, "its own way back is not exact either"


def test_loaded_layers_are_never_laid_out_anew(tmp_path, monkeypatch):
    """Evaluate, train, evaluate on a CPU that says it has AVX512-BF16: the same bytes, the same matrix."""
    monkeypatch.setattr(bitsandbytes_modules, "has_avx512bf16", lambda: True)
    model = load(save_base(tmp_path / "base"), quantization="nf4")
    before, found = hashes(model), {path: quantized.matrix(layer) for path, layer in quantized.layers(model)}
    for mode in (False, True, False):
        model.train(mode)
        with torch.no_grad():
            model(torch.tensor([ROWS[1]]))
    assert hashes(model) == before
    assert {name.rpartition(".")[2] for name in before} >= {"weight", "absmax", "nested_absmax"}
    assert all(torch.equal(quantized.matrix(layer), found[path]) for path, layer in quantized.layers(model))


@pytest.mark.parametrize("kind", SHAPES)
def test_matrix_is_what_the_layer_multiplies_by(tmp_path, kind, form):
    model, plain = load(save_base(tmp_path / "base", kind), **form), make_model(kind)
    errors = {"nf4": 0.10, "fp4": 0.13, "int8": 0.01}
    for path, layer in quantized.layers(model):
        W = plain.get_submodule(path).weight
        W = W if W.shape == (layer.out_features, layer.in_features) and kind != "gpt2" else W.T
        eye, bias = torch.eye(layer.in_features), 0 if layer.bias is None else layer.bias
        for mode in (False, True):
            torch.testing.assert_close((layer.train(mode)(eye) - bias).T, quantized.matrix(layer), atol=1e-6, rtol=0)
        assert relative(quantized.matrix(layer), W) < errors[form["quantization"]]
    ours = logits(model)
    quantized.dequantize(model)
    same(logits(model), ours, 1e-6)


# Training over them


@pytest.mark.parametrize("settings", [LORA, DORA], ids=["lora", "dora"])
@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_trains_and_merges_as_a_float32_model_of_the_dequantized_weights(tmp_path, form, settings, is_checkpointed):
    """Case 79, with evaluations between the steps, and a merge after them."""
    base = save_base(tmp_path / "base")
    pair = load(base, **form), reference(base, **form)
    for model in pair:
        METHODS[settings.name].attach(model, settings, seed=3)
        randomize(model)
        if is_checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
    before = hashes(pair[0])
    for _ in range(2):
        same(*map(logits, pair))
        ours, theirs = map(gradients, pair)
        for name, gradient in theirs.items():
            assert float(gradient.norm()) > 0
            assert relative(ours[name], gradient) <= 1e-3, name
        for model in pair:
            torch.optim.SGD(trainable(model).values(), lr=0.1).step()
    changed = {name for name, value in hashes(pair[0]).items() if value != before[name]}
    assert changed == set(trainable(pair[0]))
    tuned = logits(pair[0])
    for model in pair:
        METHODS[settings.name].merge(model)
        same(logits(model), tuned)
    assert next(quantized.layers(pair[0]), None) is None


@pytest.mark.parametrize("settings", [LORA, DORA], ids=["lora", "dora"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_trains_and_merges_in_bfloat16_as_a_plain_bfloat16_model(tmp_path, settings, quantization):
    """Evaluate, train, evaluate, train, merge: the layers must keep computing with the weights that can be read."""
    section = ModelSection(base=save_base(tmp_path / "base"), quantization=quantization, dtype="bfloat16")
    pair = [models.load_base(section, torch.bfloat16, CPU) for _ in range(2)]
    quantized.dequantize(pair[1])
    for model in pair:
        METHODS[settings.name].attach(model, settings, seed=3)
        randomize(model)
    within = comparing.tolerance(pair[1], logits(pair[1]))
    for _ in range(2):
        same(*map(logits, pair), within)
        ours, theirs = map(gradients, pair)
        # bfloat16 products of the factors: 1 to 3 % from float32. Weights read wrongly are off by more than 100 %.
        assert max(relative(ours[name], theirs[name]) for name in theirs) <= 0.06
        for model in pair:
            torch.optim.SGD(trainable(model).values(), lr=0.1).step()
    tuned = logits(pair[0])
    for model in pair:
        METHODS[settings.name].merge(model)
        same(logits(model), tuned, within)


@pytest.mark.parametrize("name", METHOD_SETTINGS)
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_every_method_works_over_a_quantized_base_as_over_its_dequantized_weights(tmp_path, name, quantization):
    """Case 79 for all of them: start, gradients, logits, reload, generation with a cache, merge."""
    settings, path = METHOD_SETTINGS[name], save_base(tmp_path / "base", "qwen2")
    method, form = METHODS[settings.name], {"quantization": quantization}
    ours, theirs = load(path, **form), reference(path, **form)
    base = logits(ours)
    for model in (ours, theirs):
        method.attach(model, settings, seed=3)
    if not hasattr(settings, "virtual_tokens"):
        same(logits(ours), base, 1e-6)
    copy_trained(theirs, randomize(ours))
    wanted = gradients(theirs)
    for parameter, gradient in gradients(ours).items():
        assert float(gradient.norm()) > 0, parameter
        assert relative(gradient, wanted[parameter]) <= 1e-3, parameter
    tuned = logits(ours.eval())
    same(tuned, logits(theirs))
    assert comparing.max_difference(tuned, base) > 1e-3

    files.save_adapter(tmp_path / "a", ours, make_tokenizer(), settings, str(path), {"method": settings.model_dump()})
    again = load(path, **form)
    files.load_adapter(again, tmp_path / "a")
    same(logits(again), tuned, 1e-6)
    assert torch.equal(greedy(ours, use_cache=True), greedy(ours, use_cache=False))
    assert torch.equal(greedy(ours, use_cache=True), greedy(theirs.eval(), use_cache=True))
    if METHOD_NAMES[settings.name].abilities.merging:
        method.merge(ours)
        same(logits(ours), tuned)


def copy_trained(model, source):
    for name, parameter in trainable(model).items():
        parameter.data.copy_(trainable(source)[name])


def greedy(model, use_cache):
    ids = torch.tensor([ROWS[1]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=use_cache, **options)


@pytest.mark.parametrize("name", ["lora", "ia3", "prefix", "bottleneck", "linear probe"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_classifiers_stand_on_quantized_bases_too(tmp_path, name, quantization):
    """The head stays plain, is trained and saved with the rest, and the merge equals what was trained."""
    settings, path, classes = METHOD_SETTINGS[name], save_base(tmp_path / "base"), Classes(("a", "b", "c"), 0)
    ours, theirs = (classifier.build(model, classes, 1) for model in
                    (load(path, quantization=quantization), reference(path, quantization=quantization)))  # fmt: skip
    method = method_of(settings.name, ours)
    for model in (ours, theirs):
        method.attach(model, settings, seed=3)
    assert not quantized.is_quantized(ours.score)
    assert "score.weight" in trainable(ours)
    copy_trained(theirs, randomize(ours))
    wanted, found = gradients(theirs), gradients(ours)
    assert all(relative(found[name], wanted[name]) <= 1e-3 for name in trainable(ours))
    tuned = logits(ours)
    same(tuned, logits(theirs))
    files.save_adapter(tmp_path / "a", ours, make_tokenizer(), settings, str(path), {"method": settings.model_dump()})
    again = classifier.build(load(path, quantization=quantization), files.read_classes(tmp_path / "a"))
    files.load_adapter(again, tmp_path / "a")
    same(logits(again), tuned, 1e-6)
    if METHOD_NAMES[settings.name].abilities.merging:
        method.merge(ours)
        same(logits(ours), tuned)


def test_a_quantized_module_is_not_trained_in_full(tmp_path):
    base = save_base(tmp_path / "base")
    with pytest.raises(UserError, match="quantized and cannot be trained in full"):
        METHODS["lora"].attach(
            load(base, quantization="nf4"), LoraSettings(target_modules="attention", modules_to_save=["up_proj"])
        )
    METHODS["lora"].attach(load(base, quantization="nf4"), LoraSettings(modules_to_save=["lm_head"]))


# Loading


@pytest.mark.parametrize("kind", SHAPES)
def test_head_and_embeddings_stay_plain_and_the_plan_knows_the_bytes(tmp_path, kind, form):
    """Case 78."""
    settings = ModelSection(base=save_base(tmp_path / "base", kind), **form)
    model = load(settings.base, **form)
    for module in (model.get_output_embeddings(), model.get_input_embeddings()):
        assert module.weight.dtype == torch.float32
    told = form if form["quantization"] != "int8" else {**form, "double_quantization": None}
    assert quantized.describe(model, settings) == {**told, "compute_dtype": "float32"}
    held = [
        *model.parameters(),
        *(c for _, layer in quantized.layers(model) for c in quantized.constants(layer).values()),
    ]
    assert quantized.weight_bytes(make_model(kind), settings) == sum(t.numel() * t.element_size() for t in held)


def test_computes_in_the_dtype_that_was_asked_for(tmp_path):
    """Case 78; DoRA reads its norms through the layer, in that dtype."""
    settings = ModelSection(base=save_base(tmp_path / "base"), quantization="nf4", dtype="bfloat16")
    model = models.load_base(settings, models.base_dtype(settings, CPU, False), CPU)
    assert quantized.describe(model, settings)["compute_dtype"] == "bfloat16"
    assert {quantized.matrix(layer).dtype for _, layer in quantized.layers(model)} == {torch.bfloat16}
    METHODS["dora"].attach(model, DORA)
    tuned = logits(randomize(model))
    METHODS["dora"].merge(model)
    same(logits(model), tuned, comparing.tolerance(model, tuned))


def test_a_quantized_head_is_refused(tmp_path, monkeypatch):
    """Case 78: with a skip list of its own, transformers forgets to protect the head."""
    plain = quantized.configuration

    def forgetful(settings, dtype):
        found = plain(settings, dtype)
        found.llm_int8_skip_modules = ["nothing"]
        return found

    monkeypatch.setattr(quantized, "configuration", forgetful)
    with pytest.raises(UserError, match="quantized: the output head"):
        load(save_base(tmp_path / "base"), quantization="nf4")


def test_missing_weights_are_named_here_too(tmp_path):
    weights = save_base(tmp_path / "base") / "model.safetensors"
    tensors = load_file(weights)
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing keys: model\.layers\.0\.mlp\.up_proj\.weight"):
        load(tmp_path / "base", quantization="nf4")


def test_base_that_is_stored_quantized_is_used_as_it_is_or_refused(tmp_path):
    """Case 78."""
    from transformers import BitsAndBytesConfig

    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    stored = AutoModelForCausalLM.from_pretrained(save_base(tmp_path / "base"), quantization_config=asked)
    stored.save_pretrained(tmp_path / "stored")
    make_tokenizer().save_pretrained(tmp_path / "stored")
    same(logits(load(tmp_path / "stored", quantization="nf4")), logits(load(tmp_path / "base", quantization="nf4")))
    for form in ({}, {"quantization": "fp4"}, {"quantization": "nf4", "double_quantization": False}):
        with pytest.raises(UserError, match="this base is stored in nf4 with double_quantization"):
            load(tmp_path / "stored", **form)
    assert not distance.is_measurable(ModelSection(base=tmp_path / "stored", quantization="nf4"))


@pytest.mark.slow
def test_loading_holds_the_quantized_weights_and_one_layer(tmp_path):
    """Private memory, sampled in a process of its own; all plain weights would be 256 MiB."""
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "num_key_value_heads": 4}
    model = make_model(**shape)
    one_layer = sum(p.numel() for p in model.model.layers[0].parameters()) * 4 / 2**20
    forms = [ModelSection(base=tmp_path / "base", quantization=name) for name in ("nf4", "int8")]
    held = [quantized.weight_bytes(model, form) / 2**20 for form in forms]
    model.bfloat16().save_pretrained(tmp_path / "base")
    save_base(tmp_path / "small")
    script = [sys.executable, REPOSITORY / "tests" / "memory_of_loading.py", tmp_path, "nf4", "int8"]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    for peak, size in zip(done.stdout.split(), held, strict=True):
        assert float(peak) <= size + one_layer + 16
