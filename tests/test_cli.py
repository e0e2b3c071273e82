"""The console script from outside: exit codes, streams, files. Numbers in docstrings are those of the trust cases."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import CHAT_ROWS, REPOSITORY, chat, ftune, save_base, write_recipe, write_rows
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftune import comparing
from ftune.artifacts import files
from ftune.recipe import load, starter
from ftune.settings import METHOD_NAMES


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def broken_line(workspace):
    (workspace / "train.jsonl").write_text(f"{json.dumps(CHAT_ROWS[0])}\n{{bad\n")


def wrong_role(workspace):
    rows = [CHAT_ROWS[0], {"messages": [{"role": "user", "content": "q"}, {"role": "asistant", "content": "a"}]}]
    write_rows(workspace / "train.jsonl", rows)


MISTAKES = {
    "misspelt key": (["training.learning_rat=1"], None, ["learning_rat", "learning_rate"]),
    "missing file": (["data.train=nowhere.jsonl"], None, ["no such file", "nowhere.jsonl"]),
    "missing base": (["model.base=./nowhere"], None, ["no such model folder", "nowhere"]),
    "broken line": ([], broken_line, ["train.jsonl, line 2", "not valid JSON"]),
    "empty file": ([], lambda w: (w / "train.jsonl").write_text(""), ["0 usable examples", "train.jsonl"]),
    "empty answer": ([], lambda w: write_rows(w / "train.jsonl", [chat("q", "")]), ["train.jsonl, line 1", "empty"]),
    "wrong role": ([], wrong_role, ["train.jsonl, line 2", "asistant"]),
    "wrong target": (["method.target_modules=[nope]"], None, ["'nope' matches no linear module", "q_proj"]),
    "half precision on a CPU": (["model.dtype=float16"], None, ["float16", "bfloat16"]),
    "a kernel for packed rows": (
        ["model.attention=flex_attention", "data.packing=false"],
        None,
        ["model.attention", "packed rows"],
    ),
    "gate without a test set": (["gates.min_score=0.5"], None, ["gates.min_score", "data.test"]),
    "unknown option": (["--nonsense"], None, ["--nonsense"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_exits_2_names_its_place_and_writes_nothing(workspace, name):
    """Cases 23, 28, 29, 36, 45, 54."""
    arguments, prepare, told = MISTAKES[name]
    recipe = write_recipe(workspace)
    if prepare:
        prepare(workspace)
    before = tree(workspace)
    done = ftune("train", recipe, *arguments)
    assert done.returncode == 2, done.stderr
    assert tree(workspace) == before
    assert not done.stdout
    message = " ".join(done.stderr.split())
    assert all(part in message for part in told), message
    assert "Traceback" not in message


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with test set and probe: (its folder, what `train --json` printed)."""
    folder = tmp_path_factory.mktemp("finished")
    save_base(folder / "base")
    write_rows(folder / "train.jsonl", CHAT_ROWS)
    write_rows(folder / "test.jsonl", CHAT_ROWS[:3])
    write_rows(folder / "probe.jsonl", [{"suite": "s", **chat(f"q{i}", "a")} for i in range(4)] + [{"text": "words"}])
    recipe = write_recipe(
        folder, data={"test": "test.jsonl"}, evaluation={"few_shot": 2, "probe": "probe.jsonl", "max_new_tokens": 4}
    )
    done = ftune("train", recipe, "--json")
    assert done.returncode == 0, done.stderr
    return folder / "run", done


def test_json_is_one_document_on_stdout_and_progress_goes_to_stderr(finished):
    path, done = finished
    assert json.loads(done.stdout) == json.loads((path / "report.json").read_text())
    assert "step 4/4" in done.stderr


def test_gate_that_fails_exits_1(finished):
    path, _ = finished
    done = ftune("train", path.parent / "recipe.yaml", "gates.min_score=0.9", "output.dir=gated", "--json")
    assert done.returncode == 1, done.stderr
    [gate] = [gate for gate in json.loads(done.stdout)["gates"] if gate["name"] == "min_score"]
    assert (gate["limit"], gate["passed"]) == (0.9, False)


def test_eval_of_a_run_measures_what_training_measured(finished):
    """Cases 47 and 101: the same artefact, loaded again, scores the same."""
    path, done = finished
    again = ftune("eval", path, "--json")
    assert again.returncode == 0, again.stderr
    trained, measured = json.loads(done.stdout), json.loads(again.stdout)
    assert measured["task"] == trained["task"]
    assert measured["forgetting"] == trained["forgetting"]
    assert ftune("verify", path).returncode == 0


def test_adapter_folder_alone_is_evaluated_on_a_recipe(finished):
    path, done = finished
    measured = ftune("eval", path / "adapter", "--recipe", path / "recipe.yaml", "--json")
    assert measured.returncode == 0, measured.stderr
    assert json.loads(measured.stdout)["task"] == json.loads(done.stdout)["task"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapter_that_peft_made_is_evaluated_and_merged(finished, tmp_path):
    """Case 65: its folder has neither tokenizer nor card of ours."""
    base = finished[0].parent / "base"
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    done = ftune("eval", tmp_path / "theirs", "--recipe", finished[0] / "recipe.yaml", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["artefact"]["keys_loaded"] == "8/8"
    done = ftune("merge", tmp_path / "theirs", "--output", tmp_path / "merged", "--json")
    assert done.returncode == 0, done.stderr
    merged, rows = AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), comparing.proof_rows(96, None)
    assert comparing.max_difference(comparing.logits_of(merged, rows), comparing.logits_of(theirs, rows)) <= 1e-5


def copy_run(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def change_weights(path, change):
    weights = path / "adapter" / "adapter_model.safetensors"
    save_file({name: change(name, tensor) for name, tensor in load_file(weights).items()}, weights)


def test_adapter_without_effect_is_told(finished, tmp_path):
    """Case 101: B = 0."""
    path = copy_run(finished, tmp_path)
    change_weights(path, lambda name, tensor: tensor * 0 if "lora_B" in name else tensor)
    done = ftune("eval", path / "adapter", "--recipe", path / "recipe.yaml", "--json")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["artefact"]["adapter_live"] is False
    assert (report["task"]["gain"], report["forgetting"]["worst_drop"], report["forgetting"]["kl_to_base"]) == (0, 0, 0)
    assert ftune("merge", path / "adapter", "--output", tmp_path / "merged").returncode == 3
    assert not (tmp_path / "merged").exists()


def test_verify_finds_a_changed_file_and_a_changed_base(finished, tmp_path):
    """Cases 75 and 82."""
    path = copy_run(finished, tmp_path)
    change_weights(path, lambda name, tensor: tensor * 1.001)
    done = ftune("verify", path)
    assert done.returncode == 1
    assert "checksum mismatch: adapter/adapter_model.safetensors" in " ".join((done.stdout + done.stderr).split())
    other = tmp_path / "base"
    shutil.copytree(finished[0].parent / "base", other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1e-3
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    done = ftune("merge", finished[0] / "adapter", "--base", other, "--output", tmp_path / "merged")
    assert done.returncode == 2
    assert "base fingerprint differs: model.safetensors" in " ".join(done.stderr.split())


def test_merged_folder_is_plain_transformers_and_equals_the_adapter(finished, tmp_path):
    """Cases 72, 74 and 77."""
    path = finished[0]
    for name in ("merged", "again"):
        done = ftune("merge", path, "--output", tmp_path / name, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["merged_max_diff"] <= 1e-5
    assert tree(tmp_path / "merged") == tree(tmp_path / "again")
    assert ftune("merge", path, "--output", tmp_path / "merged").returncode == 2
    base = load(path / "recipe.yaml").model
    tuned = AutoModelForCausalLM.from_pretrained(base.base)
    files.load_adapter(tuned, path / "adapter")
    rows = comparing.proof_rows(96, None)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any("lora" in name for name in merged.state_dict())
    assert comparing.max_difference(comparing.logits_of(merged, rows), comparing.logits_of(tuned, rows)) <= 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    done = ftune("merge", path / "adapter", "--base", tmp_path / "merged", "--output", tmp_path / "twice")
    assert done.returncode == 2
    assert "already contains adapter" in done.stderr
    assert ftune("verify", tmp_path / "merged").returncode == 0


def test_generate_answers_and_report_is_rebuilt_to_the_same_bytes(finished):
    path, _ = finished
    assert ftune("generate", path, "say a", "--max-new-tokens", 3).returncode == 0
    before = (path / "report.html").read_bytes()
    assert ftune("report", path).returncode == 0
    assert (path / "report.html").read_bytes() == before


def test_inspect_prints_the_training_collators_tokens(workspace):
    """Cases 10, 13 and 20, by the surface that the trust cases assume."""
    done = ftune("inspect", write_recipe(workspace), "--json")
    document = json.loads(done.stdout)
    row = document["rows"][1]
    assert {"row_id", "input_ids", "labels", "position_ids", "segment_ids", "text"} <= row.keys()
    assert row["position_ids"] == list(range(len(row["input_ids"])))
    assert set(row["segment_ids"]) == {1}
    answer = "".join(t for t, label in zip(row["tokens"], row["labels"], strict=True) if label != -100)
    assert answer == "bb<|im_end|>"
    assert document["data"]["rows_in"] == document["data"]["rows_used"] == len(document["rows"]) == 24


def test_check_tells_every_problem_at_once(workspace):
    recipe = write_recipe(workspace, data={"test": "nowhere.jsonl"}, method={"target_modules": ["nope"]})
    broken_line(workspace)
    done = ftune("check", recipe, "--json")
    assert done.returncode == 2
    told = json.dumps(json.loads(done.stdout)["problems"])
    assert all(part in told for part in ("nowhere.jsonl", "nope", "line 2"))


def test_plan_needs_neither_weights_nor_data(workspace):
    (workspace / "base" / "model.safetensors").unlink()
    (workspace / "train.jsonl").unlink()
    done = ftune("plan", write_recipe(workspace), "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["steps"] is None
    assert plan["parameters"]["trainable"] == 2 * 4 * (64 * 4 + 32 * 2 + 64 * 2 + (64 + 128) * 3)
    every = json.loads(ftune("plan", write_recipe(workspace), "--methods", "all", "--json").stdout)["plans"]
    assert [plan["method"] for plan in every] == list(METHOD_NAMES)
    assert {plan["method"]: plan["problem"] for plan in every if "problem" in plan} == {
        "bitfit": "0 trainable parameters: LlamaForCausalLM has no biases in these layers"
    }


def test_killed_process_is_resumed_to_the_same_bytes(workspace):
    """Case 80, from outside: kill -9 in the middle of training."""
    training = {"training": {"max_steps": 400, "checkpoint_every": 10, "optimizer": "adamw"}}
    adapter = Path("adapter") / "adapter_model.safetensors"
    clean = write_recipe(workspace, output={"dir": "clean"}, **training)
    assert ftune("train", clean).returncode == 0
    killed = write_recipe(workspace, output={"dir": "killed"}, **training)
    process = subprocess.Popen([sys.executable, "-m", "ftune", "train", str(killed)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((workspace / "killed" / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (workspace / "killed" / "adapter").exists()
    done = ftune("train", killed, "--resume")
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stderr
    assert (workspace / "killed" / adapter).read_bytes() == (workspace / "clean" / adapter).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_exits_with_its_code(workspace, number):
    """Case 85."""
    recipe = write_recipe(workspace, training={"max_steps": 100_000})
    process = subprocess.Popen([sys.executable, "-m", "ftune", "train", str(recipe)], stderr=subprocess.PIPE, text=True)
    metrics = workspace / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    told = " ".join(process.communicate()[1].split())
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert "checkpoint saved" in told
    assert "Traceback" not in told


@pytest.mark.parametrize("arguments", [["--help"], ["init"], ["schema"], ["methods"], ["train", "bad.yaml"]])
def test_light_commands_import_nothing_heavy(tmp_path, arguments):
    """Not torch, and rich only where there is something to print in colour."""
    heavy = {"torch", "transformers"} | ({"rich"} if arguments[0] in ("--help", "schema") else set())
    (tmp_path / "bad.yaml").write_text("model: base\nmethod: lora\ndata: {train: x}\ntraining: {learning_rat: 1}\n")
    code = (
        "import sys; sys.argv = ['ftune', *sys.argv[1:]]\n"
        "from ftune.__main__ import main\n"
        "try: main()\n"
        f"finally: assert not {heavy} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "Assertion" not in done.stderr
    assert done.returncode == (2 if "bad.yaml" in arguments else 0)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_starter_recipe_is_accepted_by_check(workspace, method):
    (workspace / "recipe.yaml").write_text(starter(method, "chat"))
    done = ftune("check", workspace / "recipe.yaml", "model.base=./base", "data.train=train.jsonl", "data.test=null")
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.mark.parametrize("recipe", sorted((REPOSITORY / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_passes_its_check(recipe):
    done = ftune("check", recipe)
    assert done.returncode == 0, done.stderr + done.stdout
