"""Runs end to end, in process: losses, rates, steps and what the model has learned. Numbers: trust cases."""

import pytest
import torch
from conftest import CHAT_ROWS, chat, make_tokenizer, metrics, run, save_base, write_rows
from safetensors.torch import load_file, save_file

from ftune import folder
from ftune.artifacts import files
from ftune.errors import RunError


def test_non_finite_loss_stops_the_run_and_names_step_and_rows(workspace):
    """Case 46."""
    weights = workspace / "base" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"non-finite loss at step 1, rows \[train.jsonl:"):
        run(workspace, data={"packing": False})
    assert (
        not list((workspace / "run" / "checkpoints").glob("*"))
        if (workspace / "run" / "checkpoints").exists()
        else True
    )


def test_learning_rate_that_explodes_stops_the_run(workspace):
    """Case 46."""
    with pytest.raises(RunError, match="non-finite"):
        run(workspace, training={"learning_rate": 1e20, "max_grad_norm": 1e30, "max_steps": 50, "optimizer": "sgd"})


def test_fewer_rows_than_a_batch_are_one_step(workspace):
    """Case 30."""
    write_rows(workspace / "train.jsonl", CHAT_ROWS[:3])
    _, path = run(workspace, training={"max_steps": None, "epochs": 1, "batch_size": 8})
    [step] = metrics(path)
    assert sorted(step["row_ids"]) == ["train.jsonl:1", "train.jsonl:2", "train.jsonl:3"]
    assert folder.read_json(path / "manifest.json")["changed"]


def test_logged_rates_follow_the_schedule(workspace):
    """Case 41: by optimizer step, however many micro-batches."""
    for tokens in (40, 4000):
        _, path = run(
            workspace, overwrite=True,
            training={"schedule": "linear", "max_steps": 8, "micro_batch_tokens": tokens, "learning_rate": 0.008},
        )  # fmt: skip
        assert [line["learning_rate"] for line in metrics(path)] == pytest.approx(
            [0.008 * (1 - k / 8) for k in range(8)]
        )


def test_gradient_checkpointing_changes_nothing(workspace):
    """Case 43, with and without dropout."""
    for dropout in (0.0, 0.1):
        adapters = []
        for checkpointing in (False, True):
            _, path = run(
                workspace, overwrite=True, method={"name": "lora", "rank": 4, "dropout": dropout},
                training={"gradient_checkpointing": checkpointing, "max_steps": 5},
            )  # fmt: skip
            adapters.append(load_file(path / "adapter" / files.ADAPTER_WEIGHTS))
        torch.testing.assert_close(adapters[0], adapters[1], atol=1e-6, rtol=1e-5)
        assert all(float(tensor.norm()) > 0 for name, tensor in adapters[1].items() if "lora_B" in name)


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_overfitted_model_stops_where_it_was_taught_to(tmp_path, pad):
    """Cases 4 and 5: pad and eos may be one token; generation from saved files ends at the trained end of turn."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = make_tokenizer(pad=pad)
    save_base(tmp_path / "base", tokenizer=tokenizer)
    write_rows(tmp_path / "train.jsonl", [chat("hi", "abc")])
    _, path = run(
        tmp_path,
        method={"name": "full"},
        training={"max_steps": 60, "batch_size": 1, "learning_rate": 0.003, "optimizer": "adamw"},
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in GenerationConfig.from_pretrained(path / "merged").eos_token_id
    saved = AutoTokenizer.from_pretrained(path / "merged")
    prompt = saved.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = AutoModelForCausalLM.from_pretrained(path / "merged").generate(**prompt, max_new_tokens=50)
    assert saved.decode(answer[0, prompt["input_ids"].shape[1] :]) == "abc<|im_end|>"


def test_model_learns_the_next_token_and_not_the_one_after(tmp_path):
    """Case 14: labels are shifted once."""
    save_base(tmp_path / "base", tokenizer=make_tokenizer(None))
    letters = "abcdefghijklmnopqrstuvwxyz"
    write_rows(tmp_path / "train.jsonl", [{"text": (letters * 2)[i : i + 20]} for i in range(26)])
    _, path = run(
        tmp_path,
        method={"name": "full"},
        training={"max_steps": 80, "batch_size": 8, "learning_rate": 0.003, "optimizer": "adamw"},
    )
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path / "merged")
    ids = torch.tensor(make_tokenizer(None)((letters * 2)[5:25])["input_ids"])
    guesses = model(ids[None]).logits[0].argmax(-1)
    assert (guesses[2:-2] == ids[3:-1]).float().mean() > 0.99
    assert (guesses[2:-2] == ids[4:]).float().mean() < 0.05
