"""Prints by how many MiB private memory rose at most while a base was loaded, for each quantization asked for.

python memory_of_loading.py FOLDER QUANTIZATION...; for test_quantization.py.
"""

import sys
import threading
import time
from pathlib import Path

import torch

from ftune import model as models
from ftune.recipe import ModelSection

torch.set_num_threads(1)


def private_mebibytes() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def load(name: str, quantization: str) -> object:
    settings = ModelSection(base=Path(sys.argv[1]) / name, quantization=quantization)
    return models.load_base(settings, torch.float32, torch.device("cpu"))


def peak_of_loading(quantization: str) -> float:
    samples, is_done = [private_mebibytes()], threading.Event()

    def watch() -> None:
        while not is_done.is_set():
            samples.append(private_mebibytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _kept = load("base", quantization)
    is_done.set()
    watcher.join()
    return max(samples) - samples[0]


load("small", "nf4")  # what is imported on the way is not the base's
for asked in sys.argv[2:]:
    print(peak_of_loading(asked))
