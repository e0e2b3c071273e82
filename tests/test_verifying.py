"""`ftune verify` finds each fault by name, and none where there is none. Numbers: trust cases."""

import json
import shutil

import pytest
from conftest import CHAT_ROWS, ftune, make_tokenizer, run, save_base, write_rows
from merge_kit import make_adapter
from method_kit import SETTINGS
from safetensors.torch import load_file, save_file

from ftune import folder
from ftune.artifacts import files
from ftune.run.afterwards import merge_target
from ftune.run.targets import resolve
from ftune.run.verifying import verify_target


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tied base, an adapter on it and its merge; a run with both."""
    place = tmp_path_factory.mktemp("made")
    base = save_base(place / "base", "llama tied")
    make_adapter(place / "adapter", base, SETTINGS["lora"])
    merge_target(resolve(place / "adapter"), place / "merged", 1.0, overwrite=False)
    write_rows(place / "train.jsonl", CHAT_ROWS)
    run(place, output={"dir": "run", "save": "both"})
    return place


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def weights(path, change_):
    tensors = change_(load_file(path / "model.safetensors"))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def other_template(path):
    make_tokenizer("{{ messages[0].content }}").save_pretrained(path)


def other_vocabulary(path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["word"])
    tokenizer.save_pretrained(path)


def other_special(path):
    make_tokenizer(pad="<unk>").save_pretrained(path)


def other_stop(path):
    change(path / "generation_config.json", eos_token_id=2)


def no_tokenizer(path):
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (path / name).unlink()


def half(path):
    weights(path, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})
    change(path / "config.json", dtype="float16")


def untied(path):
    weights(path, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    change(path / "config.json", tie_word_embeddings=False)


def foreign_key(path):
    weights(path, lambda t: {**t, "model.layers.0.self_attn.q_proj.lora_A.weight": t["model.norm.weight"].clone()})


def missing_shard(path):
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}
    index["weight_map"]["model.norm.weight"] = "model-00002-of-00002.safetensors"
    save_file(tensors, path / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def adapter_inside(path):
    (path / "adapter_config.json").write_text('{"peft_type": "LORA"}')


OF_COMPANIONS = {
    "chat_template": (other_template, "another than was trained with"),
    "tokenizer": (other_vocabulary, "another vocabulary"),
    "tokenizer ": (other_special, "another special tokens"),
    "stops": (other_stop, "does not name <|im_end|> (4)"),
}
OF_A_MODEL = OF_COMPANIONS | {
    "dtype": (half, "the weights are F16 and config.json says float16, but the base is float32"),
    "tied_embeddings": (untied, "they load as two tensors, but were one tensor when trained"),
    "files": (foreign_key, "model.layers.0.self_attn.q_proj.lora_A.weight belongs to an adapter"),
    "load": (missing_shard, "model-00002-of-00002.safetensors"),
    "tokenizer  ": (no_tokenizer, "there is none in this folder any more"),
}


def failed(path, **options):
    found = verify_target(resolve(path, **options))
    assert found["passed"] == all(check["passed"] for check in found["checks"])
    return {check["name"]: check["told"] for check in found["checks"] if not check["passed"]}


def test_what_is_right_passes_with_every_check_told(made):
    for path, names in [
        (made / "adapter", {"base", "keys_loaded", "tokenizer", "chat_template", "stops", "adapter_live", "merge"}),
        (made / "merged", {"files", "dtype", "tied_embeddings", "tokenizer", "chat_template", "stops", "finite"}),
        (made / "run", {"checksums", "base", "stops", "merge", "merged_files", "merged_dtype", "merged_tied_embeddings",
                        "merged_tokenizer", "merged_chat_template", "merged_stops", "merged_folder"}),
        (made / "base", {"files", "tied_embeddings", "finite"}),
    ]:  # fmt: skip
        found = verify_target(resolve(path))
        assert found["passed"], found
        assert {check["name"] for check in found["checks"]} >= names
        assert all(check["told"] for check in found["checks"])


def test_merged_folder_is_compared_with_a_base_that_is_named(made, tmp_path):
    """Case 75."""
    assert failed(made / "merged", base=str(made / "base")) == {}
    other = save_base(tmp_path / "other", "llama tied", seed=1)
    assert failed(made / "merged", base=str(other)) == {"base": "base fingerprint differs: model.safetensors"}
    assert failed(made / "merged", base=str(other), is_forced=True) == {}


@pytest.mark.parametrize("name", OF_A_MODEL)
def test_fault_in_a_merged_folder_is_found(made, tmp_path, name):
    """Cases 5, 60, 76 and 77."""
    fault, told = OF_A_MODEL[name]
    path = shutil.copytree(made / "merged", tmp_path / "merged")
    fault(path)
    assert told in failed(path)[name.strip()]


def test_adapter_inside_a_merged_folder_is_found(made, tmp_path):
    """Case 77: transformers would put it on top. Without its weights, so that the target is no adapter's folder."""
    path = shutil.copytree(made / "run", tmp_path / "run")
    adapter_inside(path / "merged")
    assert "an adapter lies in it too" in failed(path)["merged_files"]


@pytest.mark.parametrize("name", OF_COMPANIONS)
def test_fault_beside_an_adapter_is_found(made, tmp_path, name):
    """Cases 5 and 17."""
    fault, told = OF_COMPANIONS[name]
    path = shutil.copytree(made / "adapter", tmp_path / "adapter")
    fault(path)
    assert told in failed(path)[name.strip()]
    run_ = shutil.copytree(made / "run", tmp_path / "run")
    fault(run_ / "merged")
    found = failed(run_)
    assert told in found[f"merged_{name.strip()}"]
    assert "merged/" in found["checksums"]


def test_adapter_written_before_cards_named_tokenizers_is_compared_with_the_base(made, tmp_path):
    path = shutil.copytree(made / "adapter", tmp_path / "adapter")
    card = folder.read_json(path / files.CARD)
    del card["tokenizer"]
    folder.write_json(path / files.CARD, card)
    assert failed(path) == {}
    other_vocabulary(path)
    assert "another vocabulary" in failed(path)["tokenizer"]


def test_table_and_json_show_each_check(made):
    done = ftune("verify", made / "merged")
    words = " ".join(done.stdout.split())
    assert done.returncode == 0
    assert "tied embeddings ✓ head and embeddings are one tensor, as trained" in words
    assert "stops ✓ an answer ends at <eos> or <|im_end|>" in words
    found = json.loads(ftune("verify", made / "merged", "--json").stdout)
    assert all(check.keys() == {"name", "passed", "told"} for check in found["checks"])
