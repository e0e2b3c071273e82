"""Trackers: a run's figures, sent to TensorBoard, Weights & Biases or MLflow as well, through accelerate.

metrics.jsonl and report.json stay the record; a tracker that fails loses figures and never the run.
"""

import importlib.util
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ftune import folder, stored
from ftune.console.streams import note, warn
from ftune.errors import Interrupted, RunError, UserError
from ftune.folder import RunFolder
from ftune.recipe import Recipe, dump

FOLDERS = stored.TRACKERS
"""Each tracker's own files in the run folder. They may grow after the run, so the manifest has no checksums of them."""
MEMORY = "trackers.json"
"""Which runs of the trackers this is, and up to which step they were told: what resuming needs."""
REPORTED = ("task", "forgetting", "artefact", "cost")
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""A server that is gone holds training up once, and not for minutes."""
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ALLOW_FILE_STORE": "true", "WANDB_ERROR_REPORTING": "false"}


def check(names: tuple[str, ...]) -> None:
    """Raise UserError for trackers that are not installed: accelerate would leave them out and say nothing."""
    if missing := [name for name in names if not _is_installed(name)]:
        is_one = len(missing) == 1
        what = f"{' and '.join(missing)} {'is' if is_one else 'are'} not installed here"
        raise UserError(what, "output.trackers", "pip install 'ftune[trackers]', or leave it out")


def _is_installed(name: str) -> bool:
    """A mere folder of that name where the command is typed, such as wandb's own, is no package."""
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None


@contextmanager
def following(recipe: Recipe, run: RunFolder, resume: bool, is_main: bool) -> Iterator["Trackers"]:
    """The trackers of a run, ended in the way the run ends."""
    trackers = Trackers(recipe, run, resume, recipe.output.trackers if is_main else ())
    try:
        yield trackers
    except BaseException as error:
        trackers.end("stopped" if isinstance(error, Interrupted) else "failed")
        raise
    trackers.end("finished")


class Trackers:
    """Those that one run is told to; all of them are told the same."""

    def __init__(self, recipe: Recipe, run: RunFolder, resume: bool, names: tuple[str, ...]) -> None:
        self.recipe, self.run, self.names = recipe, run, names
        self.open: dict[str, Any] = {}
        self.failed: dict[str, str] = {}
        memory = run.path / MEMORY
        known = folder.read_json(memory) if resume and names and memory.is_file() else {}
        lines = folder.read_json_lines(run.metrics) if known and run.metrics.is_file() else []
        # A resumed run gives the same figures again. The last line may not have been sent any more: it is sent again.
        heard = max([line["step"] for line in lines], default=0) - 1
        self.ids: dict[str, str] = {name: known[name]["id"] for name in names if name in known}
        self.heard = {name: max(known[name]["heard"], heard) if name in known else -1 for name in names}

    def start(self, step: int) -> None:
        """Open all, `step` steps being done; raises RunError for one that cannot be, before anything is trained."""
        for name in self.names:
            is_new = name not in self.ids
            if name == "tensorboard" and not is_new:
                self.heard[name] = step  # what it heard beyond is taken back
            if is_new:
                self.ids[name] = secrets.token_hex(8)
            try:
                self.open[name] = STARTS[name](self, is_new)
                if is_new:
                    self._tell_recipe(name)
            except Exception as error:  # whatever its network or its files do
                hint = "make it reachable, or leave it out of output.trackers"
                raise RunError(f"{name} cannot be started: {_told(error)}", "output.trackers", hint) from error
        if self.names:
            kept = {name: {"id": self.ids[name], "heard": self.heard[name]} for name in self.names}
            folder.write_json(self.run.path / MEMORY, kept)

    def _tell_recipe(self, name: str) -> None:
        if name == "tensorboard":
            text = "\n".join(f"    {line}" for line in dump(self.recipe).splitlines())
            self.open[name].log({"recipe": text}, step=0)
        else:
            self.open[name].store_init_configuration(flat(self.recipe.model_dump(mode="json"), "."))

    def line(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl: a step, or an evaluation."""
        kind = "training" if "loss" in line else "evaluation"
        figures = {key: value for key, value in flat(line, "/").items() if key != "step" and is_figure(value)}
        told = {f"{kind}/{key}": value for key, value in figures.items()}
        if told:
            self._each(lambda name, tracker: line["step"] > self.heard[name] and tracker.log(told, step=line["step"]))

    def report(self, document: Mapping[str, Any], step: int) -> None:
        """The figures of report.json, at the run's last step."""
        chosen = {key: document[key] for key in REPORTED if document.get(key)}
        told = {f"report/{key}": value for key, value in flat(chosen, "/").items() if is_figure(value)}
        self._each(lambda name, tracker: tracker.log(told, step=step))

    def end(self, how: str) -> None:
        self._each(lambda name, tracker: ENDS[name](tracker, how))
        self.open = {}

    def as_dict(self) -> dict[str, str]:
        """For the manifest: how each went."""
        return {name: self.failed.get(name, "followed to the end") for name in self.names}

    def _each(self, action: Callable[[str, Any], object]) -> None:
        for name, tracker in list(self.open.items()):
            try:
                action(name, tracker)
            except Exception as error:  # whatever its network or its files do: the run is worth more
                self.failed[name] = f"failed: {_told(error)}"
                del self.open[name]
                warn(f"{name} {self.failed[name]}; the run goes on and tells it nothing more, metrics.jsonl has all")


def _told(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def is_figure(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def flat(values: Mapping[str, Any], separator: str, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, `task/gain`; lists as their text, as no tracker takes them."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, separator, f"{prefix}{key}{separator}")
        else:
            found[prefix + key] = str(value) if isinstance(value, list | tuple) else value
    return found


def _start_tensorboard(trackers: Trackers, is_new: bool) -> Any:
    from accelerate.tracking import TensorBoardTracker

    # Readers forget what an earlier process of this run wrote at and after the step that is made next.
    purge = {} if is_new else {"purge_step": trackers.heard["tensorboard"] + 1}
    tracker = TensorBoardTracker("tensorboard", trackers.run.path, **purge)
    tracker.start()
    return tracker


def _start_wandb(trackers: Trackers, is_new: bool) -> Any:
    os.environ.update({key: value for key, value in QUIET.items() if key not in os.environ})
    import wandb
    from accelerate.tracking import WandBTracker

    mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
    tracker = WandBTracker(
        os.environ.get("WANDB_PROJECT", "ftune"),
        name=trackers.recipe.name,
        id=trackers.ids["wandb"],
        resume="allow",
        dir=str(trackers.run.path),
        mode=mode,
        # What is written to the terminal stays ftune's, and no code is sent anywhere.
        settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
    )
    tracker.start()
    if mode == "offline" and is_new:
        note(f"wandb keeps this run in {trackers.run.path / 'wandb'}; `wandb sync` sends it")
    elif mode == "online":
        note(f"wandb: {tracker.run.url}")
    return tracker


def _start_mlflow(trackers: Trackers, is_new: bool) -> Any:
    os.environ.update({key: value for key, value in (QUIET | PATIENCE).items() if key not in os.environ})
    import mlflow
    from accelerate.tracking import MLflowTracker

    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri((trackers.run.path / "mlflow").as_uri())
    tracker = MLflowTracker("ftune", run_id=None if is_new else trackers.ids["mlflow"], run_name=trackers.recipe.name)
    tracker.start()
    trackers.ids["mlflow"] = tracker.active_run.info.run_id
    return tracker


def _end_mlflow(tracker: Any, how: str) -> None:
    import mlflow

    mlflow.end_run({"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[how])


STARTS: dict[str, Callable[[Trackers, bool], Any]] = {
    "tensorboard": _start_tensorboard,
    "wandb": _start_wandb,
    "mlflow": _start_mlflow,
}
ENDS: dict[str, Callable[[Any, str], None]] = {
    "tensorboard": lambda tracker, how: tracker.finish(),
    "wandb": lambda tracker, how: tracker.run.finish(exit_code=0 if how == "finished" else 1),
    "mlflow": _end_mlflow,
}


def is_tracker_file(name: str) -> bool:
    """Whether a file of the run folder, by its relative name, is a tracker's own."""
    return Path(name).parts[0] in FOLDERS
