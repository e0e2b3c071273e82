"""Several processes train the same run as one: losses, gradients, rates, and what is saved. Numbers: trust cases.

Most tests look at the outcome of two launches, of two processes and of four, which train all recipes one after another.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import CHAT_ROWS, adapter_bytes, ftune, metrics, save_base, write_recipe, write_rows
from safetensors.torch import load_file

from ftune import batches, recipe
from ftune.errors import UserError
from ftune.run import training
from ftune.run.inputs import check_abilities

LORA = {"name": "lora", "rank": 4, "dropout": 0.0, "learning_rate_ratio": 4}
SHARED = {
    "lora": LORA,
    "full": {"name": "full"},
    "dora": {"name": "dora", "rank": 4, "dropout": 0.0},
    "vera": {"name": "vera", "rank": 16, "dropout": 0.0},
    "prefix_tuning": {"name": "prefix_tuning", "virtual_tokens": 3, "projection": True},
    "prompt_tuning": {"name": "prompt_tuning", "virtual_tokens": 3, "depth": "deep"},
    "bottleneck": {"name": "bottleneck", "size": 8},
}
"""Methods that both ways of sharing can do."""
COPIED = {
    "adalora": {"name": "adalora", "initial_rank": 4, "target_rank": 2, "dropout": 0.0},
    "qlora": {"name": "qlora", "rank": 4, "dropout": 0.0},
}
"""Methods of which every process holds the whole model."""
JOBS = {f"{name}-{way}": (method, way) for name, method in SHARED.items() for way in ("ddp", "fsdp")}
JOBS |= {f"{name}-ddp": (method, "ddp") for name, method in COPIED.items()}
LIKE = [
    "training.batch_size=5", "training.max_steps=6", "training.micro_batch_tokens=24", "training.max_grad_norm=0.5",
    "training.schedule=cosine", "training.weight_decay=0.1", "training.checkpoint_every=3",
    "data.validation=test.jsonl", "training.learning_rate=0.001",
]  # fmt: skip
"""Steps of several micro-batches, the last of an epoch smaller; rows that are longer than a micro-batch.

At the default rate of so small a model, Adam makes up to 2e-5 of the last digit of a gradient that is nearly zero.
"""
FEW = ["training.batch_size=1", "training.max_steps=3", "training.checkpoint_every=3"]
"""Steps with fewer rows than processes."""


def launch(count, folder, jobs, timeout=300):
    """Train jobs in so many processes; what became of each, by process and job."""
    out = folder / f"out-{count}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    script = Path(__file__).with_name("several.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    texts = [json.dumps(job) for job in jobs.values()]
    done = subprocess.run(
        [*command, script, folder / "recipe.yaml", out, *texts],
        capture_output=True, text=True, env=environment, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(count)]
    return {name: [found[i] for found in ranks] for i, name in enumerate(jobs)}


def overrides(name, method, way, *more):
    return [f"method={json.dumps(method)}", f"training.parallel={way}", f"output.dir={name}", *more]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    save_base(folder / "base", "qwen2")
    write_rows(folder / "train.jsonl", CHAT_ROWS)
    write_rows(folder / "test.jsonl", CHAT_ROWS[:3])
    write_recipe(folder)
    return folder


@pytest.fixture(scope="module")
def two(place):
    jobs = {name: {"overrides": overrides(name, method, way, *LIKE)} for name, (method, way) in JOBS.items()}
    for way in ("ddp", "fsdp"):
        jobs[f"few-{way}"] = {"overrides": overrides(f"few-{way}", LORA, way, *FEW)}
        dropout = overrides(f"clean-{way}", {**LORA, "dropout": 0.1}, way, *LIKE)
        jobs[f"clean-{way}"] = {"overrides": dropout}
        stopped = [*dropout[: -len(LIKE)][:2], f"output.dir=stopped-{way}", *LIKE]
        jobs[f"stopped-{way}"] = {"overrides": stopped, "stop": 4}
        jobs[f"resumed-{way}"] = {"overrides": stopped, "resume": True}
        moved = overrides(f"moved-{way}", LORA, way, *LIKE)
        jobs[f"moved-{way}"] = {"overrides": moved, "stop": 4}
    jobs["loss-ddp"] = {"overrides": overrides("loss-ddp", LORA, "ddp", *LIKE, "training.learning_rate=1e20")}
    return launch(2, place, jobs)


@pytest.fixture(scope="module")
def four(place, two):
    jobs = {f"four-{way}": {"overrides": overrides(f"four-{way}", LORA, way, *LIKE)} for way in ("ddp", "fsdp")}
    for way in ("ddp", "fsdp"):
        moved = overrides(f"moved-{way}", LORA, way, *LIKE)
        jobs[f"moved-{way}"] = {"overrides": moved, "resume": True}
    return launch(4, place, jobs)


@pytest.fixture(scope="module")
def alone(place):
    """The same runs in this process, made when they are asked for."""

    def trained(name, method, *more):
        if not (place / name).exists():
            training.train_run(recipe.load(place / "recipe.yaml", overrides(name, method, "auto", *more)))
        return place / name

    return trained


def tensors(path):
    folder = path / "adapter" if (path / "adapter").is_dir() else path / "merged"
    return load_file(next(folder.glob("*model.safetensors")))


def assert_same_run(path, reference):
    theirs, ours = metrics(reference), metrics(path)
    for key in ("step", "row_ids", "learning_rate", "supervised_tokens", "tokens", "epoch"):
        assert [line[key] for line in ours] == [line[key] for line in theirs]
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=1e-5)
    torch.testing.assert_close(tensors(path), tensors(reference), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_train_as_one(place, two, alone, name):
    method, _ = JOBS[name]
    assert [found["exit_code"] for found in two[name]] == [0, 0], two[name]
    assert two[name][1]["verdict"] is None, "one process reports"
    assert_same_run(place / name, alone(name.rpartition("-")[0] + "-one", method, *LIKE))


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_four_processes_train_as_one(place, four, alone, way):
    assert_same_run(place / f"four-{way}", alone("lora-one", LORA, *LIKE))


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_step_of_one_row_is_no_more_than_one_row(place, two, alone, way):
    assert_same_run(place / f"few-{way}", alone("few-one", LORA, *FEW))


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_signal_to_one_process_stops_all_and_the_run_goes_on_to_the_byte(place, two, way):
    """Case 85; with dropout."""
    assert [found["exit_code"] for found in two[f"stopped-{way}"]] == [143, 143]
    assert "after step 4 of 6; checkpoint saved" in two[f"stopped-{way}"][0]["error"]
    assert [found["exit_code"] for found in two[f"resumed-{way}"]] == [0, 0]
    assert adapter_bytes(place / f"stopped-{way}") == adapter_bytes(place / f"clean-{way}")
    kept = ("step", "loss", "grad_norm", "learning_rate", "row_ids")
    lines = [[[line[key] for key in kept] for line in metrics(place / f"{n}-{way}")] for n in ("stopped", "clean")]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_run_of_two_processes_goes_on_in_four(place, four, alone, way):
    assert [found["exit_code"] for found in four[f"moved-{way}"]] == [0] * 4, four[f"moved-{way}"]
    assert_same_run(place / f"moved-{way}", alone("lora-one", LORA, *LIKE))


def test_a_loss_that_is_no_number_stops_every_process_with_the_rows(place, two):
    """Case 46."""
    for found in two["loss-ddp"]:
        assert found["exit_code"] == 3
        assert "non-finite" in found["error"]
    assert two["loss-ddp"][0]["error"] == two["loss-ddp"][1]["error"]


def test_the_manifest_tells_how_the_work_was_shared(place, two):
    manifest = json.loads((place / "lora-fsdp" / "manifest.json").read_text())
    assert (manifest["processes"], manifest["parallel"]) == (2, "fsdp")


def test_shares_hold_every_row_once_and_as_many_tokens():
    lengths = [9, 1, 1, 7, 3, 8, 2]
    shares = batches.share(lengths, 3)
    assert sorted(i for share in shares for i in share) == list(range(7))
    tokens = [sum(lengths[i] for i in share) for share in shares]
    assert max(tokens) - min(tokens) <= 2
    assert batches.share([5, 4], 3) == [[0], [1], []]


@pytest.mark.parametrize(
    ("environment", "given", "told"),
    [
        ({}, ["training.parallel=ddp"], "one was started"),
        ({}, ["training.parallel=fsdp"], "one was started"),
        ({"ACCELERATE_USE_FSDP": "true"}, [], "set it to fsdp"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, [], "use_deepspeed=true"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, [], "mixed_precision=bf16"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, [], "2 processes were started"),
    ],
)
def test_what_was_asked_for_and_what_was_started_must_agree(workspace, monkeypatch, environment, given, told):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=told):
        training.train_run(recipe.load(write_recipe(workspace), given))
    assert not (workspace / "run").exists()


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"method": {"name": "adalora"}}, "adalora cannot be shared out"),
        ({"method": {"name": "qlora"}}, "qlora cannot be shared out"),
        ({"model": {"base": "base", "quantization": "int8"}}, "quantized base"),
        ({"training": {"optimizer": "adamw_8bit"}}, "adamw_8bit"),
    ],
)
def test_what_cannot_be_cut_into_parts_is_refused_by_name(workspace, sections, told):
    loaded = recipe.load(write_recipe(workspace, **sections), ["training.parallel=fsdp"])
    with pytest.raises(UserError, match=told):
        check_abilities(loaded)


def test_what_one_process_does_is_refused_to_several(place, alone, monkeypatch):
    alone("lora-one", LORA, *LIKE)
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = ftune("eval", place / "lora-one")
    assert done.returncode == 2
    assert "only ftune train shares its work" in done.stderr


BIN = Path(sys.executable).parent
ACCELERATE = [BIN / "accelerate", "launch", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no"]
NODE = [BIN / "torchrun", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_id", "7", "--rdzv_backend", "c10d"]


@pytest.mark.parametrize(
    ("launcher", "way", "told"),
    [
        ([*ACCELERATE, "--use_fsdp", "--fsdp_version", "2"], "fsdp", "2 processes, each with a part of the model"),
        ([*ACCELERATE, "--cpu"], "auto", "accelerate launch started one process; several are started with torchrun"),
    ],
)
def test_accelerate_launch_does_what_is_said(place, launcher, way, told):
    """It starts one process on a CPU, whatever the number; the run says so."""
    name = f"accelerate-{way}"
    done = by(launcher, place, name, way).communicate(timeout=120)
    assert told in done[1], done
    assert len(metrics(place / name)) == 2


def test_two_nodes_train_as_one(place, alone):
    """Two agents of torchrun, each with a process of its own."""
    nodes = [by([*NODE, "--rdzv_endpoint", f"127.0.0.1:{PORT}"], place, "nodes", "fsdp") for _ in range(2)]
    for node in nodes:
        _, told = node.communicate(timeout=120)
        assert node.returncode == 0, told
    assert_same_run(place / "nodes", alone("nodes-one", LORA, *SHORT))


SHORT = [*LIKE, "training.max_steps=2"]
PORT = 20000 + os.getpid() % 10000


def by(launcher, place, name, way):
    """A run of two steps that another program starts."""
    command = [*launcher, "-m", "ftune", "train", place / "recipe.yaml", *overrides(name, LORA, way, *SHORT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def started(folder, count, *arguments):
    """The processes of a run, started one by one: each one's exit code can be seen."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(PORT + 1), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "ftune", "train", str(folder / "recipe.yaml"), *arguments]
    return [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("killed", [0, 1])
def test_when_a_process_is_killed_the_other_stops_and_the_run_goes_on(place, killed):
    name = f"killed-{killed}"
    arguments = overrides(name, LORA, "ddp", *LIKE, "training.max_steps=100000", "training.checkpoint_every=2")
    processes = started(place, 2, *arguments)
    waited_until = time.monotonic() + 120
    while not list((place / name / "checkpoints").glob("step-*")):
        assert time.monotonic() < waited_until
        time.sleep(0.05)
    processes[killed].send_signal(signal.SIGKILL)
    _, told = processes[1 - killed].communicate(timeout=60)
    processes[killed].communicate()
    assert processes[1 - killed].returncode == 3, told
    assert "Traceback" not in told
    if killed == 1:
        assert "another process of this run has ended" in told
    checkpoint = max((place / name / "checkpoints").glob("step-*"))
    assert json.loads((checkpoint / "state.json").read_text())["inputs"]["environment"]["processes"] == 2
