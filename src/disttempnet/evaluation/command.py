"""`disttempnet evaluate`: an opened model, what it is evaluated on, and where its results go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from disttempnet import distributed
from disttempnet.config import Config, public_table
from disttempnet.errors import Preempted, UserError
from disttempnet.evaluation.cached import FeatureCache
from disttempnet.evaluation.class_features import kept_class_features
from disttempnet.evaluation.datasets.open import has_data
from disttempnet.evaluation.encoder import checkpoint_hash, make_encoder
from disttempnet.evaluation.evaluator import Evaluator
from disttempnet.evaluation.outputs import ResultsFile, ResultsFolder, ResultsOutput
from disttempnet.evaluation.probes import ProbeRequest, probe_tasks, skipped_probes
from disttempnet.evaluation.results.file import default_place
from disttempnet.evaluation.results.records import PROBE_FILE, RESULTS_FILE, read_records
from disttempnet.evaluation.results.summary import SUMMARY_FILE, Subject
from disttempnet.evaluation.results.tables import probes_table
from disttempnet.evaluation.tasks import VALIDATION_TASK, Task, TaskData, all_tasks, find_task
from disttempnet.evaluation.validation import validation_data
from disttempnet.features.batches import folder_of
from disttempnet.features.cache_key import of_main
from disttempnet.features.store import STORE_ABOUT
from disttempnet.io.files import refuse_unwritable
from disttempnet.io.machine import cores
from disttempnet.losses import Objective
from disttempnet.models import Towers
from disttempnet.models.locks import lock_towers
from disttempnet.models.trunk import TOWER_SIDES, trunk_of
from disttempnet.terminal import console, say

WORKERS_OF_A_GPU = 16  # at most
CACHE_FLAG = "name another folder with --cache-features, or none"
NO_CACHE = "none"  # in place of a folder of cached features


@dataclass(frozen=True)
class OpenedModel:
    """Towers, and what is known of them.

    Attributes:
        title: for a reader; model, pretrained: names of the towers and of their weights.
        folder: that results go below, by `name`.
        config, loss: of a run, the objective on the CPU; objective, step: from its run.json and its checkpoint.
        versions: package → version.
        notes: what a reader of scores has to know of the weights.
    """

    towers: Towers
    title: str
    model: str
    pretrained: str
    folder: Path
    name: str
    config: Config | None = None
    loss: Objective | None = None
    objective: Mapping[str, str] | None = None
    step: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvaluationRequest:
    """Tasks that are wanted, and how they are evaluated.

    Attributes:
        tasks: none = with a data root all that lie below one; else those of the run's config, or all that ship.
        validation: whether the task `validation` of a run is wanted as well.
        root: the data root; results are a folder then, else one JSON file.
        out: that folder or file; None = a place beside the run.
        precision: "" = bf16 on a GPU, else fp32; without a data root always fp32.
        compat: see `load_task`.
        workers: decoding processes of each rank with a data root; None = a GPU's share of the cores, else threads.
        probe: train linear probes of the tasks that have a train split, after the zero-shot evaluation.
        cache_features: folder of cached features; "" = as the run's config has it, `NO_CACHE` = towers are run in full.
    """

    tasks: Sequence[Task] = ()
    validation: bool = False
    root: Path | None = None
    out: Path | None = None
    precision: str = ""
    compat: str = ""
    batch: int = 256
    workers: int | None = None
    cache_features: str = ""
    probe: bool = False

    @property
    def below_root(self) -> Sequence[Task]:
        """Tasks of an evaluation with a data root."""
        return self.tasks or [task for task in all_tasks().values() if task.below_root]


def check_request(request: EvaluationRequest) -> None:
    """Raise UserError where nothing is to be evaluated, or `out` cannot be written: before the model is loaded."""
    root, out = request.root, request.out
    if root is not None and not any(has_data(task, root) for task in request.below_root):
        others = sorted(path.name for path in root.glob("wds_*"))
        there = f"; {others[0]} is no folder of theirs" if others else ""
        count = len(request.below_root)
        raise UserError(f"--data-root {root}: holds none of the {count} tasks (--list says where to get them){there}")
    if out is not None:
        refuse_unwritable(out / SUMMARY_FILE if root is not None else out)


def run_evaluation(model: OpenedModel, request: EvaluationRequest, stopped: Callable[[], object] = bool) -> int:
    """Evaluate, write the results and print them; returns the exit code.

    Args:
        stopped: asked after every batch; see `ResultsOutput`.

    Raises:
        UserError: unknown or missing data, results that cannot be written or are of another model.
        Preempted: a rank was told to stop.
    """
    with distributed.session(timeout_minutes=60.0) as device:
        # Where results go: rank 0 decides, and says why not, with its exit code; a launcher ends the others then.
        output = _folder_output if request.root is not None else _file_output
        sink = output(model, request, device, stopped)
        try:
            distributed.together(lambda: sink.claim() if distributed.is_main() else None)
        except distributed.OtherRankFailed:
            return 0

        # Tasks, longest first; then the evaluator, which hands each result to the sink.
        tasks = sink.unfinished()
        model.towers.module.to(device)
        cache = _feature_cache(model, request, sink)
        evaluator = _evaluator(model, request, device, sink.subject, cache)
        probes = _probe_request(sink, request, stopped)
        probe_failed = False
        try:
            with sink:
                evaluator.run(tasks, sink.load, sink, sink.progress)
            if probes is not None:
                probe_failed = probe_tasks(probes, evaluator)
        except Preempted:
            if not sink.keeps:  # started again it would never end
                raise UserError(sink.after_stop) from None
            if distributed.is_main():
                say(sink.after_stop)
            raise
        if not distributed.is_main():
            return 0  # else a launcher might end rank 0 before its table is printed
        if cache is not None:
            say(cache.describe())
        sink.show(model.title)
        if probes is not None:
            _show_probes(probes)
    return int(sink.failed or probe_failed)


def _probe_request(
    sink: ResultsOutput, request: EvaluationRequest, stopped: Callable[[], object]
) -> ProbeRequest | None:
    """Return the linear probes that are wanted; None where none are."""
    if not request.probe:
        return None
    assert isinstance(sink, ResultsFolder)
    return ProbeRequest(sink.folder, sink.root, sink.subject.compat, sink.tasks, stopped)


def _show_probes(probes: ProbeRequest) -> None:
    """Print the table of all probes in the folder, and which tasks have none."""
    found = read_records(probes.folder / PROBE_FILE)
    if found:
        console().print(probes_table(read_records(probes.folder / RESULTS_FILE), found))
    for line in skipped_probes(probes.tasks, probes.root):
        say(line)
    if found:
        say(f"linear probes: {probes.folder / PROBE_FILE}")


def _feature_cache(model: OpenedModel, request: EvaluationRequest, sink: ResultsOutput) -> FeatureCache | None:
    """Return the features of locked towers that a run's config or the request names; None = towers are run in full.

    Of a run they are those that its training read, of another model the embeddings of both towers.
    """
    config, given = model.config, request.cache_features
    if given == NO_CACHE or not (given or (config is not None and config.train.cache_features)):
        return None
    folder = folder_of(config) if config is not None and not given else Path(given)
    if not given and not of_main(lambda: _is_writable(folder)):  # a colleague's
        if distributed.is_main():
            say(f"{folder} cannot be written to: towers are run in full (--cache-features names another folder)")
        return None
    sides: Sequence[str] = config.cached_sides if config is not None else ()
    if config is not None and sides and config.train.freeze != "towers":
        lock_towers(model.towers.module, config.model)
    else:
        model.towers.module.requires_grad_(False)
    trunks = {side: trunk_of(model.towers, side) for side in sides or TOWER_SIDES}
    dtype = config.train.cache_dtype if config is not None else "float32"
    return FeatureCache(trunks, folder, dtype, request.workers or 0, CACHE_FLAG, sink.aside)


def _is_writable(folder: Path) -> bool:
    try:
        refuse_unwritable(folder / STORE_ABOUT)
    except UserError:
        return False
    return True


def _evaluator(
    model: OpenedModel, request: EvaluationRequest, device: torch.device, subject: Subject, cache: FeatureCache | None
) -> Evaluator:
    """Return the evaluator; with a data root class features are kept on disk, by weights and precision of the texts."""
    if request.root is None:
        return Evaluator(model.towers, device, batch=request.batch, cache=cache)
    text_dtype = make_encoder(model.towers, device, subject.precision, False, 1).text_dtype
    known = kept_class_features(subject.checkpoint, text_dtype)
    workers = _default_workers(device) if request.workers is None else request.workers
    return Evaluator(model.towers, device, subject.precision, request.batch, workers, known, cache=cache)


def _default_workers(device: torch.device) -> int:
    """Return decoding processes for each rank: with a GPU its share of the cores, without one none: threads do it."""
    if device.type != "cuda":
        return 0
    from disttempnet.distributed.launcher import local_processes

    return max(1, min(WORKERS_OF_A_GPU, cores() // local_processes() - 1))


def _folder_output(
    model: OpenedModel, request: EvaluationRequest, device: torch.device, stopped: Callable[[], object]
) -> ResultsOutput:
    """Return the sink of an evaluation below a data root."""
    run = {}
    if model.config is not None:
        table = public_table(model.config)
        run = {"name": model.config.name, "config": table, "objective": model.objective, "step": model.step}
    subject = Subject(
        model=model.model,
        pretrained=model.pretrained,
        checkpoint=checkpoint_hash(model.towers),
        precision=request.precision or ("bf16" if device.type == "cuda" else "fp32"),
        compat=request.compat,
        versions=model.versions,
        parameters=sum(parameter.numel() for parameter in model.towers.module.parameters()),
        run=run,
        notes=model.notes,
    )
    folder = request.out or _default_folder(model)
    refuse_unwritable(folder / SUMMARY_FILE)
    assert request.root is not None
    return ResultsFolder(folder, request.root, request.below_root, subject, device, request.batch, stopped)


def _default_folder(model: OpenedModel) -> Path:
    """Return RUN/evaluation/STEP; of a run that cannot be written to, such as a colleague's, a folder here."""
    folder = model.folder / "evaluation" / model.name
    try:
        refuse_unwritable(folder / SUMMARY_FILE)
    except UserError:
        if model.config is None:
            raise
        _say_elsewhere(model)
        return Path("evaluation") / f"{model.config.name}-{model.name}"
    return folder


def _say_elsewhere(model: OpenedModel) -> None:
    if distributed.is_main():
        say(f"{model.folder} cannot be written to: results go to the current folder")


def _file_output(
    model: OpenedModel, request: EvaluationRequest, device: torch.device, stopped: Callable[[], object]
) -> ResultsOutput:
    """Return the sink of an evaluation on data that ships, is your own, or is named by the run's config."""
    config = model.config
    subject = Subject(model.title, checkpoint=checkpoint_hash(model.towers), notes=model.notes)
    out = request.out
    if config is not None and out is None:
        out = default_place(model.folder, config.name, model.name, subject)
        if model.folder not in out.parents:
            _say_elsewhere(model)
    root = config.eval.data_root if config is not None else ""
    data_root = Path(root) if root else None
    return ResultsFile(out, lambda: _tasks(config, request), data_root, subject, device, request.batch, stopped)


def _tasks(config: Config | None, request: EvaluationRequest) -> list[str | TaskData]:
    """Return the tasks of an evaluation without a data root; every rank calls this."""
    names: list[str | TaskData] = [task.name for task in request.tasks]
    validation = request.validation
    if config is not None and not names and not validation:
        names, validation = list(config.eval.tasks), bool(config.data.validation)
    held_out = validation_data(config.data) if config is not None and validation else None
    if validation and held_out is None:
        find_task(VALIDATION_TASK)  # raises: there is none
    if held_out is not None:
        return [*names, held_out]
    return names or [name for name, task in all_tasks().items() if not task.below_root and not task.is_built]
