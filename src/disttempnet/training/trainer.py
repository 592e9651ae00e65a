"""The training loop, for one process or many.

A step: Batch(images, tokens, ids) → towers → loss(features, ids), which gathers what it needs → backward → optimizers.
DDP wraps the encoder alone (gradients.py). Per-sample state is saved in `state_dict()` and never broadcast.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from disttempnet import distributed
from disttempnet.config import Config, dump_config
from disttempnet.data import Batch, Skip, lost_workers_named, open_training_data
from disttempnet.distributed import fsdp
from disttempnet.errors import Preempted, UserError
from disttempnet.evaluation.cached import FeatureCache
from disttempnet.evaluation.encoder import FeatureEncoder, evaluation_mode
from disttempnet.evaluation.evaluator import TaskResult, evaluate, load_tasks
from disttempnet.evaluation.scores import Scores
from disttempnet.evaluation.tasks import VALIDATION_TASK, TaskData, task_title
from disttempnet.evaluation.validation import validation_data
from disttempnet.features.batches import CachedData, folder_of, with_cached_features
from disttempnet.io.files import write_atomically
from disttempnet.io.machine import memory_named
from disttempnet.losses import Features, GlobalContrastiveLoss, LossOutput, normaliser_errors
from disttempnet.models import Towers, load_model
from disttempnet.models.activations import checkpoint_activations
from disttempnet.models.locks import prepare_towers
from disttempnet.models.lora import Adapters
from disttempnet.training import atomic_folder, checkpoint, optim, run_folder, run_info, run_log, trackers
from disttempnet.training.gradients import InChunks, WholeBatch
from disttempnet.training.model import (
    CachedEncoder,
    Contrast,
    ContrastiveModel,
    DualEncoder,
    build_objective,
    compile_failure_named,
    compile_towers,
    refuse_if_no_normaliser,
    refuse_if_nothing_is_trained,
    refuse_without_compiler,
    resolved,
)
from disttempnet.training.nan_check import NanCheck
from disttempnet.training.reference import Reference, open_reference, refuse_reference
from disttempnet.training.signals import LONGEST_WAIT, StopSignal
from disttempnet.training.weight_average import WeightAverage

MEMORY = (
    "set train.checkpoint_activations=true, raise train.accumulate (the same batch in chunks), or lower "
    "data.global_batch, data.workers or model.name's size"
)


class Trainer:
    """A run from its config to its last checkpoint.

    Args:
        config: the resolved config; the run folder is `config.folder`.
        device: of this rank, from `distributed.session()`.
        resume: `auto` continues from the last checkpoint if there is one, `never` refuses a folder that holds a run,
            and a path continues from that checkpoint.
        report: receives the progress in place of the console; see `RunLog`.

    Raises:
        UserError: a config, folder, checkpoint, data set or weights that cannot be used, in one line.
    """

    def __init__(
        self, config: Config, device: torch.device, resume: str = "never", report: run_log.Report | None = None
    ) -> None:
        # Check what fails fast: the config, the folder, the compiler.
        given, config = config, resolved(config, bounds=resume == "never")
        self.device, self.folder, self.report = device, config.folder, report
        distributed.together(lambda: self._refuse_unusable_outputs(config) if distributed.is_main() else None)
        if config.train.compile:
            refuse_without_compiler(device)

        # Find the checkpoint to continue from, if any.
        self._contents = run_folder.contents(self.folder)
        found, self._passed_over = run_folder.starting_point(self.folder, resume)
        if found:
            config = resolved(checkpoint.continued_from(found, given), bounds=False)
        self.config = config
        checkpoint.refuse_out_of_bounds(config, found)
        torch.manual_seed(config.train.seed)

        # Load and lock the towers, then check that something is left to train before any shard is read.
        pretrained = "" if found else run_folder.weights_folder(config.model.pretrained)
        data_root = Path(config.eval.data_root) if config.eval.data_root else None
        load_tasks(config.eval.tasks, data_root)  # checks that they exist
        self.towers = self._load_towers(found, pretrained)
        self.frozen = config.train.freeze == "towers"
        self._lock_towers(found)
        module = self.towers.module
        objective = build_objective(config, 1, self.towers.embed_dim, bounds=False)
        refuse_if_nothing_is_trained(config, module, objective)
        refuse_if_no_normaliser(config, objective)
        refuse_reference(config, objective)

        # Open the data: the source with its N samples, the epoch plan, the loader of this rank, the validation task.
        self.data = open_training_data(
            config.data, config.train.seed, self.towers, distributed.rank(), distributed.world_size()
        )
        validation = validation_data(config.data, self.data.source)
        self.tasks: list[str | TaskData] = [*config.eval.tasks, *([validation] if validation else [])]
        rows = config.data.global_batch // distributed.world_size()
        if config.train.accumulate > rows:
            raise UserError(f"train.accumulate = {config.train.accumulate} is more than the {rows} rows of a process")

        # Place the towers: whole on this device, or sharded over all ranks.
        if config.train.shard:
            fsdp.shard(module, device)
        else:
            module.to(device)

        # Build the objective with its per-sample state [N], the optimizers, and the average of the weights.
        self.loss = build_objective(config, len(self.data.source), self.towers.embed_dim, bounds=False).to(device)
        self.optimizers = optim.build_optimizers(self.towers.module, self.loss, config.optim)
        trained = [p for p in module.parameters() if p.requires_grad]
        self._moves = bool(trained)
        self.average = WeightAverage(module, config.train.ema) if config.train.ema else None
        self._clipped = trained or [p for p in self.loss.parameters() if p.requires_grad]

        # Count the steps.
        self.steps_per_epoch = self.data.plan.steps
        self.total_steps = config.train.epochs * self.steps_per_epoch
        self.still_steps = config.train.warm_statistics * self.steps_per_epoch
        self.last_step = min(config.train.stop_after_steps or self.total_steps, self.total_steps)

        # Restore the checkpoint. The warm-up is fixed when a run begins: a resumed one keeps it.
        state = checkpoint.TrainState()
        if found is not None:
            state = checkpoint.load_checkpoint(found, **self._restorable())
        self.step, self.best = state.step, dict(state.best)
        self.optim = optim.with_warmup_steps(config.optim, self.total_steps - self.still_steps)
        if state.warmup_steps is not None:
            self.optim = config.optim.model_copy(update={"warmup_steps": state.warmup_steps})
        usable = int(self.data.source.usable_counts.sum())
        self.skipped = run_log.Skipped(len(self.data.source), min(usable, config.data.limit or usable), state.skipped)

        # Compute the features of locked towers, or find them on disk: batches hold them from here on.
        self.cache: FeatureCache | None = None
        encoder: nn.Module = DualEncoder(self.towers, self._autocast(), self.frozen)
        if config.train.cache_features:
            with run_folder.claimed(self.folder):  # a second start is refused before hours of work
                self.data, trunks = with_cached_features(config, self.data, self.towers, device, self._autocast())
                self.cache = FeatureCache(trunks, folder_of(config), config.train.cache_dtype, config.data.workers)
                plain = FeatureEncoder(self.towers, device, config.eval.batch)
                self.cache.prepare(load_tasks(self.tasks, data_root), plain)
            encoder = CachedEncoder(self.towers, trunks, self._autocast())

        # Load the reference model, if the objective is steered by one.
        self.reference: Reference | None = None
        if config.reference.model:
            with run_folder.claimed(self.folder):
                self.reference = open_reference(config, self.data, self.towers, device, self._autocast())

        # Wrap towers and objective into the model whose gradient a step takes, at once or in chunks.
        if config.train.compile:
            compile_towers(self.towers)
        model = ContrastiveModel(encoder, Contrast(self.loss, self._autocast()))
        chunks, half = config.train.accumulate, config.train.exchange == "bf16"
        self.gradients = WholeBatch(model, device, half) if chunks == 1 else InChunks(model, device, chunks, half)

        # Start the bookkeeping of the loop.
        self._unnamed: list[Skip] = []
        self._clock = run_info.Clock()
        self._finite, self._norm = NanCheck(self.folder), torch.tensor(math.nan)
        self._metrics: dict[str, Tensor] = {}
        self._scores: dict[str, Scores] = {}  # of this step, where it was evaluated
        self._stopped, self._ask_every = 0, 1  # how long a step takes is not known yet

    def _refuse_unusable_outputs(self, config: Config) -> None:
        """Raise UserError if the folder cannot be written, or a tracker is not installed. Only rank 0 calls this."""
        run_folder.refuse_unwritable_folder(self.folder)
        trackers.refuse_missing(config)

    def _load_towers(self, found: Path | None, pretrained: str) -> Towers:
        """Return the towers of the checkpoint `found`, which also says how pixels are normalised; else of `[model]`."""
        wanted = self.config.model
        if found is not None:
            return load_model(wanted.name, str(found), head=wanted.head, context_length=wanted.context_length)
        return load_model(
            wanted.name,
            pretrained,
            image_pretrained=wanted.image_pretrained,
            text_pretrained=wanted.text_pretrained,
            resize_positions=wanted.resize_positions,
            context_length=wanted.context_length,
            head=wanted.head,
        )

    def _lock_towers(self, found: Path | None) -> None:
        """Freeze or lock the towers, in place, and put adapters on them, new or those of the checkpoint `found`."""
        module = self.towers.module
        module.train(not self.frozen).requires_grad_(not self.frozen)
        if not self.frozen:
            wanted, adapted = self.config.model, bool(self.config.lora.rank)
            locks = wanted.model_copy(update={"lock_image": True, "lock_text": True}) if adapted else wanted
            prepare_towers(module, locks, self.config.train.accumulate)
        self.adapters = Adapters(module, self.config.lora, found) if self.config.lora.rank else None
        if self.config.train.checkpoint_activations:
            checkpoint_activations(module)
        # The objective owns temperature and bias; open_clip's own are written at export (save_model).
        for exported in (module.logit_scale, getattr(module, "logit_bias", None)):
            if exported is not None:
                exported.requires_grad_(False)

    def run(self) -> bool:
        """Train to the end, or to a stop signal; returns whether the end was reached.

        Raises:
            Preempted: SIGUSR1 stopped it; everything is saved.
            UserError: another process trains this run.
        """
        with run_folder.claimed(self.folder):
            return self._run()

    def _run(self) -> bool:
        # Write config.toml and run.json, open the logs, print what is ahead.
        self._describe()
        main = distributed.is_main()
        opened = trackers.open_trackers(self.config, self.step) if main else []
        log = self.log = run_log.RunLog(self.folder, self.last_step, self.step, main, self.report, opened)
        for tracker in opened:
            if tracker.place:
                log.say(tracker.place)
        for line in self._opening_lines():
            log.say(line)

        # Train epoch by epoch. A stop signal ends the run early, with a checkpoint.
        try:
            with StopSignal() as stop, lost_workers_named():
                while self.step < self.last_step:
                    if not self._run_epoch(stop):
                        log.say(f"stopped at step {self.step}: continue with --resume auto")
                        if self._stopped == Preempted.code:
                            raise Preempted
                        return False
            if self.step < self.total_steps:
                log.say(
                    f"stopped at step {self.step} of {self.total_steps} (train.stop_after_steps): "
                    "continue with a larger one, or 0, and --resume auto"
                )
            elif self.loss.current_rate() == 0 < self.loss.own_rate:
                log.say("the temperature network never started: its τ stays where it began (docs/objectives.md)")
            if main:
                saved = run_folder.list_checkpoints(self.folder)
                for line in run_info.closing_lines(self.config, self.step, self.best, saved, self._scores):
                    log.say(line)
        finally:
            log.close()

        # Add the time of the end to run.json.
        if distributed.is_main():
            run_info.write_facts(self.config, self.device, self.data, self.towers, finished=self._clock.now())
        return True

    def _opening_lines(self) -> Iterator[str]:
        """Lines for the console before the first step: ranks, checkpoint, towers, plan, data, shortened schedules."""
        yield distributed.describe(self.device, self.config.train.timeout_minutes)
        yield from self._passed_over
        yield from run_info.opening_weights(self.towers)
        yield from self.towers.notes
        yield run_info.plan_line(self.config, self.data, self.step)
        if isinstance(self.data, CachedData):
            yield self.data.describe()
        if self.cache is not None and self.tasks:
            yield self.cache.describe()
        yield from run_info.about_data(run_info.data_facts(self.data.source, self.config.data.limit))
        if self.adapters is not None:
            yield self.adapters.describe()
        if self.average is not None:
            yield f"train.ema = {self.average.decay:g}: evaluation, checkpoints and exports have averaged weights"
        if line := optim.settings_line(self.optimizers[0], self.config.optim):
            yield line
        if 0 < self.optim.warmup_steps < self.config.optim.warmup_steps:
            yield (
                f"optim.warmup_steps = {self.config.optim.warmup_steps} would take up the whole run of "
                f"{self.total_steps - self.still_steps} steps: shortened to {self.optim.warmup_steps}, a tenth of it"
            )
        if self.loss.own_rate and not self.loss.rate_at(self.config.train.epochs - 1):
            yield "the temperature network waits longer than the run lasts (loss.tau_start_epoch): τ stays"

    def _run_epoch(self, stop: StopSignal) -> bool:
        """Train the rest of the current epoch; return False if a stop signal ended it (everything is saved then)."""
        epoch, first = divmod(self.step, self.steps_per_epoch)
        self.loss.set_epoch(epoch)
        every = self.config.train.checkpoint_every
        waited_since = clock = time.perf_counter()
        wait, logged = 0.0, self.step
        for batch in self.data.loader_from(epoch, first):
            # One step on this rank's b rows of the global batch.
            wait += time.perf_counter() - waited_since
            output = self.train_step(batch)
            self._unnamed += batch.skipped

            # Measure normalisers where an evaluation follows. Log, with the mean time of the steps since the last line.
            epoch_ends = self.step % self.steps_per_epoch == 0
            now, done = time.perf_counter(), self.step - logged
            measured = self._measure_normalisers(epoch + 1) if epoch_ends and self._due(epoch + 1) else {}
            if self.step % self.config.train.log_every == 0 or self.step == self.last_step or measured:
                self._log(output, (now - clock) / done, wait / done, measured)
                clock, wait, logged = now, 0.0, self.step

            # Evaluate and save at the end of an epoch, save every so many steps within it.
            save_due = bool(every) and self.step % every == 0
            if epoch_ends or self.step == self.last_step:
                save_due = self._end_epoch(epoch + 1, evaluated=epoch_ends) or save_due
            if save_due:
                self._save()
            if self.step == self.last_step:
                return True

            # Stop where any rank was asked to.
            self._stopped = self._agreed_stop(stop)
            if self._stopped:
                if not save_due:
                    self._save()
                return False
            if epoch_ends:
                return True  # the loader may have read other batches since, for the normalisers
            waited_since = time.perf_counter()
        return True

    def train_step(self, batch: Batch) -> LossOutput:
        """Take one optimisation step.

        Args:
            batch: this rank's b rows of the global batch: images [b, 3, s, s] uint8, tokens [b, L], ids [b].

        Returns:
            The loss and its metrics, averaged over the global batch.
        """
        batch = batch.to(self.device)

        # Set the learning rates: the towers', and that of a temperature with its own schedule.
        # While weights stand still they are 0, and the schedules begin after that.
        still, trained = self.step < self.still_steps, max(0, self.step - self.still_steps)
        self.loss.set_still(still)
        rates = [optim.learning_rate(self.optim, trained, self.total_steps - self.still_steps)]
        if self.loss.own_rate:
            rates.append(optim.temperature_learning_rate(self.optim, trained, self.loss.own_rate))
        if still:
            rates = [0.0] * len(rates)
        for optimizer, rate in zip(self.optimizers, rates, strict=True):
            optim.set_learning_rate(optimizer, rate)
            optimizer.zero_grad(set_to_none=True)

        # Forward and backward; the gradient norm is the towers', or the objective's where nothing of them is trained.
        output = self.gradients(batch.images, batch.tokens, batch.ids, self._referred(batch))
        limit = self.config.optim.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(self._clipped, limit) if self._clipped else output.total.new_zeros(())
        self._norm = fsdp.full_tensor(norm)

        # Check the step before for NaN, so that a GPU is not waited for, and update.
        self._finite.look()
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        if self.average is not None and not still:
            self.average.update(self.towers.module, self.step - self.still_steps)
        self._finite.note(self.step, output, self._norm, batch.ids)
        self._metrics, self.lr = output.metrics, rates[0]
        return output

    def _referred(self, batch: Batch, epoch: int | None = None) -> tuple[Tensor, Tensor] | None:
        """Return the reference's embeddings [b, R] of a batch of an epoch, by default the current one."""
        if self.reference is None:
            return None
        return self.reference(batch, self.step // self.steps_per_epoch if epoch is None else epoch)

    def _measure_normalisers(self, epoch: int) -> dict[str, float]:
        """Return the errors of the objective's normalisers over the first batches of an epoch; empty if not wanted.

        These are the samples that are visited next, with a u as old as any.
        """
        wanted = self.config.eval.normaliser_samples
        if not wanted:
            return {}
        assert isinstance(self.loss, GlobalContrastiveLoss)
        steps = min(-(-wanted // self.config.data.global_batch), self.steps_per_epoch)
        batches = []
        with evaluation_mode(self.gradients.model):
            for batch in islice(self.data.loader_from(epoch), steps):
                batch = batch.to(self.device)
                image, text = self.gradients.model.encoder(batch.images, batch.tokens)
                features = Features.of(image, text, self._referred(batch, epoch))
                batches.append((features.gathered(), distributed.all_gather(batch.ids)))
            return normaliser_errors(self.loss, batches)

    def _log(
        self, output: LossOutput, seconds: float, wait: float, measured: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        """Log the last step.

        Args:
            output: of the step.
            seconds: mean time of a step.
            wait: its part spent waiting for the batch.
            measured: more numbers of this step.
        """
        names = list(output.metrics)
        *values, norm = torch.stack([*(output.metrics[name].float() for name in names), self._norm.float()]).tolist()
        metrics = dict(zip(names, values, strict=True))
        waits, durations = zip(*distributed.gather_objects((wait, seconds)), strict=True)
        self._ask_every = max(1, int(LONGEST_WAIT / max(durations)))
        self._name_skipped()
        rate = self.config.data.global_batch / seconds
        metrics |= {"lr": self.lr, "grad_norm": norm, "samples_per_second": rate, "step_seconds": seconds}
        metrics |= {"data_wait": max(waits), "skipped": self.skipped.total}  # the others wait for the slowest rank
        metrics |= measured
        self.log.step(self.step, self.step / self.steps_per_epoch, metrics)

    def _name_skipped(self) -> None:
        """Count and name what all ranks have skipped since the last call; all ranks call this."""
        unnamed, self._unnamed = distributed.gather_objects(self._unnamed), []
        for line in self.skipped.add(chain.from_iterable(unnamed)):
            self.log.say(line)

    def _end_epoch(self, epochs_done: int, evaluated: bool) -> bool:
        """Evaluate if it is due and the epoch is complete (`evaluated`); return True where a checkpoint is due."""
        self._finite.look()
        self._name_skipped()
        self._scores = {}
        if self.skipped.total:
            self.log.say(self.skipped.summary())
        if self.tasks and evaluated and self._due(epochs_done):
            self._evaluate(epochs_done)
        if epochs_done % self.config.train.checkpoint_epochs == 0 or self.step == self.last_step:
            return True
        # Scores may differ between ranks by rounding, and saving is a collective.
        return bool(distributed.largest(int(self.best.get("step") == self.step), self.device))

    def _due(self, epochs_done: int) -> bool:
        """Return True where an evaluation follows an epoch."""
        return epochs_done % self.config.eval.every_epochs == 0 or epochs_done == self.config.train.epochs

    def _evaluate(self, epochs_done: int) -> None:
        """Evaluate the towers on all tasks; log the scores and note the best step."""
        config = self.config.eval
        root = Path(config.data_root) if config.data_root else None

        # Ranks embed different numbers of batches, and sharded towers would wait for each other: gather them first.
        module = self.towers.module
        with self.average.in_place(module) if self.average else nullcontext():
            towers = replace(self.towers, module=fsdp.full_module(module, self.device))
            results = evaluate(
                towers, self.tasks, device=self.device, batch=config.batch, data_root=root, cache=self.cache
            )
        self.log.evaluation(self.step, self.step / self.steps_per_epoch, results)
        self._scores = results
        if pairs := [result for result in results.values() if isinstance(result, TaskResult)]:
            self._save_temperatures(pairs[0])

        # The best step has the best validation score, or mean score where there is no validation. Towers that stand
        # still score alike: their best checkpoint is the last.
        chosen = [results[VALIDATION_TASK]] if VALIDATION_TASK in results else list(results.values())
        score = float(np.mean([result.headline for result in chosen]))
        if score > self.best.get("mean_recall", -math.inf) and self._moves:
            self.best = {"step": self.step, "mean_recall": score}
        self.log.say(f"{self.folder.name}  epoch {epochs_done}/{self.config.train.epochs}  {_one_line(results)}")

    def _save_temperatures(self, result: TaskResult) -> None:
        """Write τ of an evaluation task's pairs; if only training samples have one, of those that rank 0 keeps."""
        if not distributed.is_main():
            return
        self.loss.eval()
        tau = self.loss.temperatures(result.image_features, result.text_features)
        self.loss.train()
        known = tau is not None and len(result.frequency) > 0
        if tau is None:
            tau = self.loss.tracked_temperatures()
        if tau is None:
            return
        image, text = tau.cpu().numpy()
        folder = self.folder / "temperatures"
        folder.mkdir(exist_ok=True)
        arrays: dict[str, Any] = {"image": image, "text": text}
        if known:
            arrays["frequency"] = result.frequency.cpu().numpy()
        content = io.BytesIO()
        np.savez(content, **arrays)
        write_atomically(folder / f"step-{self.step:08d}.npz", content.getvalue())

    def _save(self) -> None:
        self._finite.look()
        self._name_skipped()
        checkpoint.save_checkpoint(
            self.folder,
            logit_scale=self._logit_scale(),
            logit_bias=self._logit_bias(),
            state=checkpoint.TrainState(self.step, self.best, self.skipped.by_reason(), self.optim.warmup_steps),
            keep=self.config.train.keep,
            adapters=self.adapters,
            **self._restorable(),
        )

    def _logit_scale(self) -> float:
        """Return open_clip's logit scale: one over the mean τ, or CLIP's initial value if there is none."""
        taus = [float(self._metrics[key]) for key in ("tau/image_mean", "tau/text_mean") if key in self._metrics]
        return len(taus) / sum(taus) if taus else 1 / 0.07

    def _logit_bias(self) -> float | None:
        """Return open_clip's logit bias; None if the objective has no bias."""
        bias = getattr(self.loss, "logit_bias", None)
        return None if bias is None else float(bias.detach())

    def _restorable(self) -> dict[str, Any]:
        """Return the arguments that saving and loading a checkpoint have in common."""
        return {
            "towers": self.towers,
            "loss": self.loss,
            "optimizers": self.optimizers,
            "average": self.average,
            "config": self.config,
            "index_digest": self.data.source.digest,
        }

    def _agreed_stop(self, stop: StopSignal) -> int:
        """Return the exit code that any rank was asked for, the same on all ranks; 0 = continue.

        Ranks exchange it when they log, and more often if a step takes long.
        """
        if self.step % self._ask_every and self.step % self.config.train.log_every:
            return 0
        return distributed.largest(stop.code, self.device)

    def _autocast(self) -> torch.dtype | None:
        wanted = self.config.train.precision
        return torch.bfloat16 if wanted == "bf16" or (wanted == "auto" and self.device.type == "cuda") else None

    def _describe(self) -> None:
        """Write config.toml and run.json before the first step."""
        if distributed.is_main():
            if run_folder.contents(self.folder) != self._contents:  # changed before this process held the lock
                raise UserError(f"{self.folder}: another process has just trained this run: start again")
            for folder in (self.folder, run_folder.checkpoint_folder(self.folder)):
                atomic_folder.remove_leftovers(folder)
            write_atomically(self.folder / "config.toml", dump_config(self.config))
            if self.step:
                run_folder.write_best(self.folder, self.best)
            run_info.write_facts(self.config, self.device, self.data, self.towers, started=self._clock.now())
        distributed.barrier()


def train(config: Config, resume: str = "never", report: run_log.Report | None = None) -> bool:
    """Train one run in the processes that the launcher started; returns whether it reached its end.

    Args:
        config, resume, report: see `Trainer`.

    Raises:
        Preempted: SIGUSR1 stopped it; everything is saved.
        UserError: what a user can fix, in one line.
    """
    with (
        distributed.session(config.train.timeout_minutes) as device,
        atomic_folder.full_disk_named(config.folder),
        compile_failure_named(config.train.checkpoint_activations),
        memory_named(MEMORY),
    ):
        return Trainer(config, device, resume, report).run()


def _one_line(results: dict[str, Scores]) -> str:
    shown = ("acc1", "mean_recall", "mean_recall@1")
    return "  ".join(
        f"{task_title(name)}: "
        + " ".join(
            f"{key.replace('_', ' ')} {r.metrics[key]:.3f}"
            + (f" (chance {r.chance[key]:.3f})" if key in r.chance else "")
            for key in shown
            if key in r.metrics
        )
        for name, r in results.items()
    )
