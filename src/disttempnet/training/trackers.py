"""Trackers of a run's numbers beside metrics.jsonl: TensorBoard, Weights & Biases and trackio, by their own libraries.

All know a run by one name, which lies in its folder: a resumed run goes on in the same place. Steps that were logged
before a stop, and after the checkpoint, come again with the same numbers.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from disttempnet.config import Config, public_table
from disttempnet.errors import UserError
from disttempnet.io.files import read_object, write_atomically
from disttempnet.sanitize import brief

NAME_FILE = "trackers.json"
LIBRARIES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}  # tracker → module


class Tracker(Protocol):
    """A tracker of one run, on rank 0.

    Attributes:
        place: where its numbers are, in words; empty = nothing to say.
    """

    place: str

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Add numbers of a step."""

    def close(self) -> None:
        """Write what is left."""


def refuse_missing(config: Config) -> None:
    """Raise UserError if the library of a tracker is not installed."""
    for name in config.train.trackers:
        if importlib.util.find_spec(LIBRARIES[name]) is None:
            raise UserError(f"train.trackers: {name} is not installed: python -m pip install 'disttempnet[{name}]'")


def open_trackers(config: Config, start: int) -> list[Tracker]:
    """Open the trackers that a config names. Only rank 0 calls this.

    Args:
        config: of the run; its folder exists.
        start: step that the run continues from.

    Raises:
        UserError: one that cannot start, such as Weights & Biases without a key.
    """
    opened: list[Tracker] = []
    for name in config.train.trackers:
        try:
            opened.append(TRACKERS[name](config, start))
        except Exception as error:  # their libraries raise all kinds, of networks, keys and versions
            for one in opened:
                one.close()
            advice = "; wandb login, or WANDB_MODE=offline" if name == "wandb" else ""
            raise UserError(
                f"train.trackers: {name} cannot start: {brief(error) or type(error).__name__}{advice}"
            ) from None
    return opened


def _run_name(config: Config) -> str:
    """Return the name by which trackers know the run: made once, as other folders may hold runs of the same name."""
    path = config.folder / NAME_FILE
    name = read_object(path).get("name") if path.is_file() else None
    if not isinstance(name, str):
        name = f"{config.name[:100]}-{uuid.uuid4().hex[:8]}"
        write_atomically(path, json.dumps({"name": name}) + "\n")
    return name


class TensorBoard:
    """Scalars in RUN/tensorboard."""

    place = ""

    def __init__(self, config: Config, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(config.folder / "tensorboard"), purge_step=start or None)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb; its own files are in RUN/wandb."""

    def __init__(self, config: Config, start: int) -> None:
        wandb: Any = importlib.import_module("wandb")
        offline = os.environ.get("WANDB_MODE") == "offline"  # there wandb resumes nothing, and warns that it does not
        self._run = wandb.init(
            project=config.train.tracker_project,
            name=config.name,
            id=_run_name(config),
            resume=None if offline else "allow",
            dir=str(config.folder),
            config=public_table(config),
            settings=wandb.Settings(console="off", silent=True),  # the terminal has a display of its own
        )
        # wandb's own count of steps only rises: a resumed run would lose the ones that come again
        self._run.define_metric("*", step_metric="step")
        self.place = f"wandb: {self._run.dir if offline else self._run.url}"

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log({**numbers, "step": step})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio, in its local store unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say otherwise."""

    def __init__(self, config: Config, start: int) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # the terminal has a display of its own
            self._trackio: Any = importlib.import_module("trackio")
            project, name = config.train.tracker_project, _run_name(config)
            settings = public_table(config)
            self._run = self._trackio.init(project=project, name=name, resume="allow", config=settings, embed=False)
        self.place = f"trackio: run {name} of project {project}: trackio show --project {project}"

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.finish()  # of the module: else it would finish the run again, and say so, at exit


TRACKERS: dict[str, Callable[[Config, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}
