"""open_clip's training main, and FastCLIP's: their flags, and the settings that they become."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

from disttempnet.config import OptimConfig
from disttempnet.errors import UserError, unknown_name
from disttempnet.migrate.first_code import note_unset, origin, run_name, set_batch
from disttempnet.migrate.flags import SEVERAL, Flag, Values, switch, table_of
from disttempnet.migrate.settings import RunSettings

MODULES = ("open_clip_train.main", "training.main", "src.training.main")
FILES = ("open_clip_train/main.py", "training/main.py")
ALWAYS = "always so here: the contrast is of the global batch, with its exact gradient"
LAUNCHERS = "launchers say it: docs/cluster.md"
OWN_ARCHITECTURE = "no key: a JSON file with your architecture as model.name (docs/models.md)"
COCA = "CoCa's caption loss is not trained here"

OPEN_CLIP_FLAGS = table_of(
    Flag("--train-data", "data.train", "shards, listings, and A::B for several"),
    Flag("--train-data-upsampling-factors", "data.train", "weight of each source"),
    Flag("--val-data", "data.validation", "retrieval on it; there also its loss"),
    Flag("--train-num-samples", "", "the index counts the samples; an epoch reads each of them once", kind=int),
    Flag("--val-num-samples", "", "the index counts the samples", kind=int),
    Flag("--dataset-type", "", "what data.train names is recognised by itself", default="auto"),
    switch("--dataset-resampled", "", "an epoch reads each sample once, in an order that is a function of the seed"),
    Flag("--csv-separator", "", "recognised by itself"),
    Flag("--csv-img-key", "data.train", "image_key of the source", default="filepath"),
    Flag("--csv-caption-key", "data.train", "caption_key of the source", default="title"),
    Flag("--imagenet-val", "eval.tasks", "folder:PATH, with open_clip's class names and templates"),
    Flag("--imagenet-v2", "eval.tasks", "folder:PATH"),
    Flag("--cache-dir", "", "the environment says it: HF_HOME"),
    Flag("--logs", "out", default="./logs/"),
    switch("--log-local", "", "rank 0 logs"),
    Flag("--name", "name", "left out: the model and the batch, where open_clip takes the time of day"),
    Flag("--workers", "data.workers", default=4, kind=int),
    Flag("--batch-size", "data.global_batch", "× processes × --accum-freq", default=64, kind=int),
    Flag("--epochs", "train.epochs", default=32, kind=int),
    Flag("--epochs-cooldown", "optim.decay_share", "÷ --epochs; of --lr-scheduler const-cooldown", kind=int),
    Flag("--lr", "optim.lr", default=5e-4, kind=float),
    Flag("--beta1", "optim.beta1", default=0.9, kind=float),
    Flag("--beta2", "optim.beta2", "left out: .98 for ViT, else .999", kind=float),
    Flag("--eps", "optim.eps", "left out: 1e-6 for ViT, else 1e-8", kind=float),
    Flag("--wd", "optim.weight_decay", default=0.2, kind=float),
    Flag("--momentum", "optim.beta1", "of timm's optimizers", kind=float),
    Flag("--warmup", "optim.warmup_steps", default=10_000, kind=int),
    Flag("--opt", "optim.name", "timm/NAME: NAME", default="adamw"),
    switch("--use-bn-sync", "model.batch_norm", "global, which is the default"),
    switch("--skip-scheduler", "optim.schedule", "constant, without a warm-up"),
    Flag("--lr-scheduler", "optim.schedule", "cosine; const: constant; const-cooldown: wsd", default="cosine"),
    Flag("--lr-cooldown-end", "optim.lr_end", "of --lr-scheduler const-cooldown", default=0.0, kind=float),
    Flag("--lr-cooldown-power", "", "the rate falls on a line, as at its default of 1", default=1.0, kind=float),
    Flag("--save-frequency", "train.checkpoint_epochs", default=1, kind=int),
    switch("--save-most-recent", "", "always so: a checkpoint continues at its very step"),
    switch("--delete-previous-checkpoint", "train.keep", "1; else open_clip keeps all"),
    Flag("--zeroshot-frequency", "eval.every_epochs", default=2, kind=int),
    Flag("--val-frequency", "eval.every_epochs", default=1, kind=int),
    Flag("--resume", "model.pretrained", "the weights; `latest` is train --resume auto"),
    Flag("--precision", "train.precision", "bf16 where there it was fp16", default="amp"),
    Flag("--model", "model.name", default="RN50"),
    Flag("--pretrained", "model.pretrained", default=""),
    switch("--pretrained-image", "model.image_pretrained", "the timm model of the architecture"),
    switch("--lock-image", "model.lock_image"),
    Flag("--lock-image-unlocked-groups", "model.unlocked_image_groups", default=0, kind=int),
    switch("--lock-image-freeze-bn-stats", "", "always so: BatchNorm in locked layers stands still"),
    switch("--lock-text", "model.lock_text"),
    Flag("--lock-text-unlocked-layers", "model.unlocked_text_layers", default=0, kind=int),
    switch("--lock-text-freeze-layer-norm", "", "always so: a locked layer is locked as a whole"),
    Flag("--image-mean", "", OWN_ARCHITECTURE, kind=float, words=SEVERAL),
    Flag("--image-std", "", OWN_ARCHITECTURE, kind=float, words=SEVERAL),
    Flag("--image-interpolation", "", OWN_ARCHITECTURE),
    Flag("--image-resize-mode", "", OWN_ARCHITECTURE),
    Flag("--aug-cfg", "data.transform", "four augmentations by name; others in data/augment.py", words=SEVERAL),
    switch("--grad-checkpointing", "train.checkpoint_activations"),
    switch("--local-loss", "", ALWAYS),
    switch("--gather-with-grad", "", ALWAYS),
    Flag("--loss-dist-impl", "", ALWAYS),
    Flag("--force-context-length", "model.context_length", kind=int),
    Flag("--force-image-size", "", OWN_ARCHITECTURE, kind=int, words=SEVERAL),
    switch("--force-quick-gelu", "model.name", "NAME-quickgelu, where open_clip has it"),
    Flag("--force-patch-dropout", "", OWN_ARCHITECTURE, kind=float),
    switch("--force-custom-text", "", "it changes names of parameters only"),
    switch("--torchscript", "", "no counterpart; train.compile"),
    switch("--torchcompile", "train.compile"),
    switch("--trace", "", "of evaluation"),
    Flag("--accum-freq", "train.accumulate", "and × --batch-size", default=1, kind=int),
    Flag("--device", "", "a GPU where there is one", default="cuda"),
    Flag("--dist-url", "", LAUNCHERS),
    Flag("--dist-backend", "", LAUNCHERS),
    Flag("--report-to", "train.trackers", "tensorboard, wandb; metrics.jsonl is always written", default=""),
    Flag("--wandb-notes", "", "the config and run.json say what the run is"),
    Flag("--wandb-project-name", "train.tracker_project", "with --report-to wandb", default="open-clip"),
    switch("--debug", "", "run.json and metrics.jsonl have it all"),
    switch("--copy-codebase", "", "run.json has the git revision and the versions"),
    switch("--horovod", "", LAUNCHERS),
    switch("--ddp-static-graph", "", "of DDP; not needed"),
    switch("--no-set-device-rank", "", "not needed: a process takes the GPU that it sees"),
    Flag("--seed", "train.seed", default=0, kind=int),
    Flag("--grad-clip-norm", "optim.grad_clip", kind=float),
    Flag("--log-every-n-steps", "train.log_every", default=100, kind=int),
    Flag("--coca-caption-loss-weight", "", COCA, kind=float),
    Flag("--coca-contrastive-loss-weight", "", COCA, kind=float),
    Flag("--remote-sync", "", "copy the run folder while it is trained; a checkpoint appears at once or not at all"),
    Flag("--remote-sync-frequency", "", "of --remote-sync", kind=int),
    Flag("--remote-sync-protocol", "", "of --remote-sync"),
    Flag("--distill-model", "", "distillation is of drrho here: [reference] and loss.distillation"),
    Flag("--distill-pretrained", "", "of --distill-model"),
    Flag("--use-bnb-linear", "", "8-bit layers are not trained here"),
    switch("--siglip", "loss.name", "siglip"),
)  # fmt: skip

OF_FASTCLIP = table_of(
    switch("--fastclip", "loss.name", "with --temperature_scheme, --multiply_tau and --gamma_schedule"),
    Flag("--optimizer", "optim.name", "adamw or lamb", default="adamw"),
    Flag("--lr_tau", "loss.tau_lr", "below 0: that of the towers", default=-1.0, kind=float),
    Flag("--lr_tau_scheduler", "loss.tau_threshold", "step_thresh: .03; else the rate is constant after the warm-up",
         default="cosine"),
    Flag("--temperature_scheme", "loss.name", default="global_learnable"),
    Flag("--temperature", "loss.temperature", default=0.07, kind=float),
    switch("--multiply_tau", "loss.name", "fastclip-v3; without it fastclip-v0"),
    Flag("--gamma", "loss.gamma_min", "or loss.gamma, where it is constant", default=0.8, kind=float),
    Flag("--gamma_schedule", "loss.name", "constant: fastclip-v3-constant-gamma, sogclr, isogclr", default="cosine"),
    Flag("--gamma_decay_epochs", "loss.gamma_decay_epochs", default=10, kind=int),
    Flag("--rho", "loss.rho", default=8.0, kind=float),
    Flag("--fastclip_eps", "loss.eps", "left out: 1e-14 there, 0 here", kind=float),
    Flag("--data_size", "", "per-sample state has a row for each sample of the index", kind=int),
    switch("--profile", "", "metrics.jsonl has the time of the parts of a step"),
)  # fmt: skip
FASTCLIP_FLAGS = {**OPEN_CLIP_FLAGS, **OF_FASTCLIP}

_HANDLED = {  # flags that `open_clip_settings` reads; all others are named with the table's reason
    "--train-data", "--train-data-upsampling-factors", "--val-data", "--csv-img-key", "--csv-caption-key",
    "--imagenet-val", "--imagenet-v2", "--logs", "--name", "--workers", "--batch-size", "--epochs", "--lr", "--beta1",
    "--beta2", "--eps", "--wd", "--warmup", "--opt", "--momentum", "--use-bn-sync", "--skip-scheduler",
    "--lr-scheduler", "--epochs-cooldown", "--lr-cooldown-end",
    "--save-frequency", "--delete-previous-checkpoint", "--zeroshot-frequency", "--val-frequency", "--resume",
    "--precision", "--model", "--pretrained", "--pretrained-image", "--lock-image", "--lock-image-unlocked-groups",
    "--lock-text", "--lock-text-unlocked-layers", "--force-quick-gelu", "--torchcompile", "--accum-freq", "--seed",
    "--grad-clip-norm", "--grad-checkpointing",
    "--report-to", "--wandb-project-name",
    "--force-context-length", "--log-every-n-steps", "--siglip", "--fastclip", "--optimizer", "--lr_tau",
    "--lr_tau_scheduler", "--temperature_scheme", "--temperature", "--multiply_tau", "--gamma", "--gamma_schedule",
    "--gamma_decay_epochs", "--rho", "--fastclip_eps",
}  # fmt: skip


def is_fastclip(words: list[str]) -> bool:
    """Return whether a command has flags that FastCLIP's code alone knows."""
    return any(word.partition("=")[0] in OF_FASTCLIP for word in words)


def open_clip_settings(values: Values, processes: int, stem: str) -> RunSettings:
    """Translate a command of open_clip's training main, or of FastCLIP's.

    Args:
        values: of its flags.
        processes: of the run.
        stem: name of the script, for a run without one.

    Raises:
        UserError: a value that the program does not take.
    """
    if values["--train-data"] is None and values["--dataset-type"] != "synthetic":
        raise UserError(
            f"no --train-data: the command evaluates, it trains nothing. The same: {_evaluation_command(values)}"
        )
    settings = RunSettings()
    name = values["--name"] or stem
    settings.set("name", run_name(name), origin(values, "--name") if values.has("--name") else "of the script")
    out = values["--logs"]
    settings.set("out", "runs" if out.lower() == "none" else str(Path(out)), origin(values, "--logs"))
    _data(settings, values, processes)
    architecture = _model(settings, values)
    _loss(settings, values)
    _training(settings, values)
    _evaluation(settings, values)
    if architecture.get("multimodal_cfg"):
        settings.differs.append(f"--model {values['--model']}: {COCA}, only its contrastive loss")

    # Flags that no key takes, each with its reason.
    settings.dropped += [
        (values.as_written(flag), values.table[flag].about) for flag in values.given if flag not in _HANDLED
    ]
    if values.has("--dataset-resampled") or values.has("--train-num-samples"):
        settings.differs.append(
            "an epoch is all samples of data.train; where --train-num-samples was fewer, lower train.epochs alike"
        )
    return settings


def _data(settings: RunSettings, values: Values, processes: int) -> None:
    path = values["--train-data"]
    if values["--dataset-type"] == "synthetic":
        settings.set("data.train", "generated:scenes/train", "--dataset-type synthetic: pictures of this package")
    else:
        settings.set("data.train", *_sources(settings, values, path))
        note_unset(settings, values, {"--train-data": "data.train"})
    if values.has("--val-data"):
        settings.set("data.validation", values["--val-data"], origin(values, "--val-data"))
        note_unset(settings, values, {"--val-data": "data.validation"})
    settings.set("data.transform", "open_clip", "random crop of 90-100 %")
    rows, chunks = values["--batch-size"], values["--accum-freq"]
    comment = f"{origin(values, '--batch-size')} × {processes} processes"
    set_batch(
        settings,
        rows * processes * chunks,
        processes,
        f"{comment} × {values.as_written('--accum-freq')}" if chunks > 1 else comment,
    )
    settings.set("data.workers", values["--workers"], origin(values, "--workers"))


def _sources(settings: RunSettings, values: Values, path: str) -> tuple[Any, str]:
    """Return data.train and its origin."""
    paths = [_without_pipe(settings, one) for one in path.split("::")]
    comment = "--train-data"
    weights = values["--train-data-upsampling-factors"]
    if weights is not None:
        factors = weights.split("::")
        if len(factors) != len(paths):
            raise UserError(f"--train-data-upsampling-factors {weights}: {len(factors)} for {len(paths)} sources")
        try:
            numbers = [float(one) for one in factors]
        except ValueError:
            raise UserError(f"--train-data-upsampling-factors {weights}: not numbers between '::'") from None
        return [
            {"path": one, "weight": weight} for one, weight in zip(paths, numbers, strict=True)
        ], "--train-data, weights by --train-data-upsampling-factors: how often an epoch reads each sample"
    is_table = values["--dataset-type"] == "csv" or Path(paths[0]).suffix in (".csv", ".tsv")
    if is_table:
        settings.differs.append(
            "paths in the table are relative to its folder or the one above (or `images` of the source), there to the "
            "folder that the script ran in"
        )
        keys = {"image_key": "--csv-img-key", "caption_key": "--csv-caption-key"}
        return [
            {"path": one, **{key: values[flag] for key, flag in keys.items()}} for one in paths
        ], f"--train-data; {origin(values, *keys.values())}"
    return "::".join(paths), comment


def _without_pipe(settings: RunSettings, path: str) -> str:
    """Return a path; of `pipe:aws s3 cp URL -` the URL, as no command is run here."""
    if not path.startswith("pipe:"):
        return path
    if found := re.search(r"\w+://\S+\.tar\b", path):
        settings.differs.append(f"{path}: no command is run; the URL is read through fsspec (disttempnet[remote])")
        return found[0]
    settings.fill_in.append(("data.train", f"{path}: no command is run here: give the path or the URL of the shards"))
    return path


def _architecture(name: str) -> dict[str, Any]:
    """Return the installed open_clip's architecture of a name; empty if it has none. open_clip is not imported."""
    spec = importlib.util.find_spec("open_clip")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder, "model_configs", f"{name.replace('/', '-')}.json")
        if file.is_file():
            table: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return table
    return {}


def _model(settings: RunSettings, values: Values) -> dict[str, Any]:
    name, comment = values["--model"], origin(values, "--model")
    if values["--force-quick-gelu"]:
        quick = f"{name}-quickgelu"
        if _architecture(quick):
            name, comment = quick, f"{comment} --force-quick-gelu"
        else:
            settings.dropped.append(("--force-quick-gelu", OWN_ARCHITECTURE))
    architecture = _architecture(name)
    place = name.startswith(("hf-hub:", "local-dir:"))
    settings.set("model.name", name, comment)
    if values.has("--force-context-length"):
        length = values["--force-context-length"]
        settings.set("model.context_length", length, values.as_written("--force-context-length"))
    note_unset(settings, values, {"--model": "model.name"})
    if not architecture and not place:
        settings.fill_in.append(("model.name", f"the installed open_clip has no '{name}': a JSON file with it"))

    # initial weights: of both towers, or those that open_clip loads for a part
    resume = values["--resume"]
    if values["--pretrained"]:
        settings.set("model.pretrained", values["--pretrained"], origin(values, "--pretrained"))
    if resume == "latest":
        settings.commands.append("disttempnet train CONFIG --resume auto   (--resume latest)")
    elif resume:
        settings.set("model.pretrained", resume, "--resume: the weights; optimizer and epoch begin anew")
    if values["--pretrained-image"]:
        timm = architecture.get("vision_cfg", {}).get("timm_model_name")
        if timm and not settings.table.get("model.pretrained"):
            settings.set("model.image_pretrained", timm, "--pretrained-image: timm's default weights of it")
        else:
            settings.dropped.append(("--pretrained-image", "no tower of timm, or it has weights already"))
    text = architecture.get("text_cfg", {})
    if (
        text.get("hf_model_name")
        and not settings.table.get("model.pretrained")
        and text.get("hf_model_pretrained", True)
    ):
        settings.set("model.text_pretrained", text["hf_model_name"], "open_clip loads it by default")
    _locks(settings, values)
    if architecture and "RN" in name:
        settings.set("model.batch_norm", "global", "of all rows; there of one GPU's, unless --use-bn-sync")
    return architecture


def _locks(settings: RunSettings, values: Values) -> None:
    pairs = (
        ("--lock-image", "model.lock_image", "--lock-image-unlocked-groups", "model.unlocked_image_groups"),
        ("--lock-text", "model.lock_text", "--lock-text-unlocked-layers", "model.unlocked_text_layers"),
    )
    for lock, key, unlocked, unlocked_key in pairs:
        if values[lock]:
            settings.set(key, True, lock)
            if values[unlocked]:
                settings.set(unlocked_key, values[unlocked], origin(values, unlocked))
        elif values.has(unlocked):
            settings.dropped.append((values.as_written(unlocked), f"without {lock} it has no effect"))


def _loss(settings: RunSettings, values: Values) -> None:
    fastclip = "--fastclip" in values.table and values["--fastclip"]
    if fastclip:
        _fastclip(settings, values)
        return
    if values["--siglip"]:
        settings.set("loss.name", "siglip", "--siglip")
        settings.set("loss.temperature", 0.1, "in the code")
        settings.set("loss.bias", -10.0, "in the code")
    elif "--fastclip" in values.table and values["--temperature_scheme"].endswith("constant"):
        settings.set("loss.name", "clip-constant", origin(values, "--temperature_scheme"))
        settings.set("loss.temperature", 0.07, "in the code: --temperature counts with --fastclip alone")
    else:
        settings.set("loss.name", "clip", "the default")
        settings.set("loss.temperature", 0.07, "in the code; τ is at least .01, as there")
        own_rate = values["--lr_tau"] if "--lr_tau" in values.table else -1.0
        if own_rate >= 0:
            settings.set("loss.tau_lr", own_rate, origin(values, "--lr_tau"))
    for name in sorted(OF_FASTCLIP.keys() & values.given.keys() & _HANDLED):
        if name not in ("--optimizer", "--lr_tau", "--temperature_scheme"):
            settings.dropped.append((values.as_written(name), "without --fastclip it has no effect"))


def _fastclip(settings: RunSettings, values: Values) -> None:
    scheme, schedule = values["--temperature_scheme"], values["--gamma_schedule"]
    schemes = ("global_learnable", "global_constant", "individual_learnable")
    if scheme not in schemes:
        raise UserError(unknown_name("--temperature_scheme", scheme, schemes))
    if schedule not in ("cosine", "constant"):
        raise UserError(unknown_name("--gamma_schedule", schedule, ("cosine", "constant")))
    robust = values["--multiply_tau"]
    version = {"global_constant": "v1", "individual_learnable": "v2"}.get(scheme, "v3" if robust else "v0")
    constant = {"v1": "sogclr", "v2": "isogclr", "v3": "fastclip-v3-constant-gamma"}
    name = f"fastclip-{version}"
    flags = ["--temperature_scheme", *(["--gamma_schedule"] if values.has("--gamma_schedule") else [])]
    comment = f"--fastclip{' --multiply_tau' if robust else ''}; {origin(values, *flags)}"
    if schedule == "constant" and version in constant:
        name = constant[version]
    settings.set("loss.name", name, comment)
    if version in ("v2", "v3"):
        settings.set("loss.rho", values["--rho"], origin(values, "--rho"))
    elif values.has("--rho"):
        settings.dropped.append((values.as_written("--rho"), f"FastCLIP-{version} does not use it"))

    # γ: on a cosine over the first epochs, or constant
    if schedule == "constant" and version in constant:
        settings.set("loss.gamma", values["--gamma"], origin(values, "--gamma", "--gamma_schedule"))
    else:
        settings.set("loss.gamma_min", values["--gamma"], origin(values, "--gamma"))
        if schedule == "constant":
            settings.set("loss.gamma_decay_epochs", 1.0, "--gamma_schedule constant: γ counts from the second visit on")
        else:
            settings.set(
                "loss.gamma_decay_epochs", float(values["--gamma_decay_epochs"]), origin(values, "--gamma_decay_epochs")
            )

    # τ and its rate
    settings.set("loss.temperature", values["--temperature"], origin(values, "--temperature"))
    rate, kind = values["--lr_tau"], values["--lr_tau_scheduler"]
    if version == "v2":
        own = rate if rate >= 0 else values["--lr"]
        settings.set("loss.tau_lr", own, origin(values, "--lr_tau"))
        if name == "isogclr":
            settings.set("loss.tau_optimizer", "adam", "as FastCLIP-v2")
            for key, value in (("tau_min", 0.01), ("tau_max", 1.0), ("tau_beta", 0.9)):
                settings.set(f"loss.{key}", value, "as FastCLIP-v2")
    elif version in ("v0", "v3"):
        settings.set("loss.tau_lr", max(rate, 0.0), origin(values, "--lr_tau"))
        if kind == "step_thresh":
            settings.set("loss.tau_threshold", 0.03, "--lr_tau_scheduler step_thresh: a third of the rate below it")
        elif version == "v3":
            settings.set("loss.tau_threshold", 0.0, origin(values, "--lr_tau_scheduler"))
        if rate >= 0 and kind == "cosine":
            settings.differs.append("--lr_tau_scheduler cosine: the rate of τ warms up and is constant then")
    elif values.has("--lr_tau"):
        settings.dropped.append((values.as_written("--lr_tau"), "τ is constant"))
    eps = values["--fastclip_eps"]
    settings.set(
        "loss.eps", eps if eps is not None else 0.0, origin(values, "--fastclip_eps") if eps else "1e-14 there"
    )


def _training(settings: RunSettings, values: Values) -> None:
    _optimizer(settings, values)
    settings.set("optim.warmup_steps", values["--warmup"], origin(values, "--warmup"))
    _schedule(settings, values)
    if values["--grad-clip-norm"] is not None:
        settings.set("optim.grad_clip", values["--grad-clip-norm"], origin(values, "--grad-clip-norm"))
    settings.set("train.epochs", values["--epochs"], origin(values, "--epochs"))
    settings.set("train.seed", values["--seed"], origin(values, "--seed"))
    precision = values["--precision"]
    kinds = {"amp": "auto", "fp32": "fp32", "amp_bf16": "bf16", "amp_bfloat16": "bf16", "bf16": "bf16",
             "pure_bf16": "bf16", "fp16": "auto", "pure_fp16": "auto"}  # fmt: skip
    if precision not in kinds:
        raise UserError(unknown_name("--precision", precision, kinds))
    note = "bf16 autocast on a GPU; parameters are float32" if kinds[precision] != "fp32" else ""
    settings.set("train.precision", kinds[precision], origin(values, "--precision", note=note))
    if values["--grad-checkpointing"]:
        settings.set("train.checkpoint_activations", True, "--grad-checkpointing")
    if values["--torchcompile"]:
        settings.set("train.compile", True, "--torchcompile")
    if values["--accum-freq"] > 1:
        settings.set("train.accumulate", values["--accum-freq"], "--accum-freq: the whole batch is contrasted")
    settings.set("train.log_every", values["--log-every-n-steps"], origin(values, "--log-every-n-steps"))
    _trackers(settings, values)
    _checkpoints(settings, values)


def _trackers(settings: RunSettings, values: Values) -> None:
    asked = values["--report-to"].lower()
    trackers = [one for one in ("tensorboard", "wandb") if one in asked or "all" in asked]
    if values.has("--report-to"):
        settings.set("train.trackers", trackers, values.as_written("--report-to"))
    if "wandb" in trackers:
        project = values["--wandb-project-name"]
        settings.set("train.tracker_project", project, origin(values, "--wandb-project-name"))
    elif values.has("--wandb-project-name"):
        settings.dropped.append(
            (values.as_written("--wandb-project-name"), "without --report-to wandb it has no effect")
        )


def _optimizer(settings: RunSettings, values: Values) -> None:
    named = next((flag for flag in ("--opt", "--optimizer") if flag in values.table and values.has(flag)), "--opt")
    name = values[named].lower().removeprefix("timm/")
    takes = _keys_of(name)
    if name != "adamw":
        settings.set("optim.name", name, values.as_written(named))
    settings.set("optim.lr", values["--lr"], origin(values, "--lr"))
    settings.set("optim.weight_decay", values["--wd"], origin(values, "--wd"))
    if values["--opt"].lower().startswith("timm/"):
        # there the optimizer's own defaults, which differ from one to the other
        for flag in ("--beta1", "--beta2", "--eps", "--momentum"):
            if not values.has(flag):
                continue
            if flag in takes:
                settings.set(f"optim.{takes[flag]}", values[flag], values.as_written(flag))
            else:
                settings.dropped.append((values.as_written(flag), f"{name} has no such parameter"))
        if left := [key for key in dict.fromkeys(takes.values()) if f"optim.{key}" not in settings.table]:
            here = ", ".join(f"{key} = {OptimConfig.model_fields[key].default:g}" for key in left)
            settings.differs.append(f"{values.as_written('--opt')}: {here} here; timm's own default there")
        return
    vit = "vit" in values["--model"].lower()
    if "--beta1" in takes:
        settings.set("optim.beta1", values["--beta1"], origin(values, "--beta1"))
    for flag, key, of_vit, of_others in (("--beta2", "beta2", 0.98, 0.999), ("--eps", "eps", 1e-6, 1e-8)):
        if flag not in takes:
            continue
        given = values[flag]
        left_out = f"{flag} left out: open_clip's for {'ViT' if vit else 'other towers'}"
        comment = left_out if given is None else values.as_written(flag)
        settings.set(f"optim.{key}", (of_vit if vit else of_others) if given is None else given, comment)
    for flag in ("--beta1", "--beta2", "--eps"):
        if values.has(flag) and flag not in takes:
            settings.dropped.append((values.as_written(flag), f"{name} has no such parameter"))
    if values.has("--momentum"):
        settings.dropped.append((values.as_written("--momentum"), f"of timm's optimizers: {name} is none there"))


def _keys_of(name: str) -> dict[str, str]:
    """Return the flags that set parameters of an optimizer, with their keys in `[optim]`.

    Raises:
        UserError: an unknown optimizer, or one that no run can use.
    """
    import disttempnet.models  # noqa: F401  first: it lets torchvision load beside a CPU-only torch
    from disttempnet.training.optim import optimizer_parameters, refuse_unusable  # imports torch

    refuse_unusable(OptimConfig(name=name, lr=1.0))
    keys = {
        "betas": {"--beta1": "beta1", "--beta2": "beta2"},
        "eps": {"--eps": "eps"},
        "momentum": {"--momentum": "beta1"},
    }
    takes = optimizer_parameters(name)
    return {flag: key for parameter, flags in keys.items() if parameter in takes for flag, key in flags.items()}


def _schedule(settings: RunSettings, values: Values) -> None:
    kind, fastclip = values["--lr-scheduler"], "--fastclip" in values.table
    kinds = ("cosine", "const", "const-cooldown", *(("step_thresh",) if fastclip else ()))
    if kind not in kinds:
        raise UserError(unknown_name("--lr-scheduler", kind, kinds))
    if values["--skip-scheduler"]:
        settings.set("optim.schedule", "constant", "--skip-scheduler")
        settings.set("optim.warmup_steps", 0, "--skip-scheduler: there is no warm-up either")
    elif kind == "const":
        settings.set("optim.schedule", "constant", "--lr-scheduler const")
        if fastclip:
            settings.set("optim.warmup_steps", 0, "FastCLIP's --lr-scheduler const has no warm-up")
    elif kind == "const-cooldown":
        cooldown = values["--epochs-cooldown"]
        if cooldown is None:
            raise UserError("--lr-scheduler const-cooldown needs --epochs-cooldown, which is not given")
        share = cooldown / values["--epochs"]
        settings.set("optim.schedule", "wsd", "--lr-scheduler const-cooldown")
        settings.set(
            "optim.decay_share", share, f"{values.as_written('--epochs-cooldown')} of {values['--epochs']} epochs"
        )
        settings.set("optim.lr_end", values["--lr-cooldown-end"], origin(values, "--lr-cooldown-end"))
    elif kind == "step_thresh":
        settings.dropped.append((values.as_written("--lr-scheduler"), "of the towers: the rate falls on a cosine"))
    if kind != "const-cooldown":
        for flag in ("--epochs-cooldown", "--lr-cooldown-end"):
            if values.has(flag):
                settings.dropped.append((values.as_written(flag), "of --lr-scheduler const-cooldown"))


def _checkpoints(settings: RunSettings, values: Values) -> None:
    epochs = values["--save-frequency"]
    if epochs == 0:
        settings.differs.append("--save-frequency 0: here every epoch is saved, which an interruption needs")
    elif values.has("--save-frequency"):
        settings.set("train.checkpoint_epochs", epochs, origin(values, "--save-frequency"))
    if values["--delete-previous-checkpoint"]:
        settings.set("train.keep", 1, "--delete-previous-checkpoint; the best one stays too")
    else:
        kept = max(1, -(-values["--epochs"] // max(epochs, 1)))
        settings.set("train.keep", kept, "open_clip keeps all; the default is 2")


def _evaluation(settings: RunSettings, values: Values) -> None:
    tasks, often = [], []
    zeroshot = [flag for flag in ("--imagenet-val", "--imagenet-v2") if values.has(flag)]
    frequency = values["--zeroshot-frequency"]
    if zeroshot and frequency:
        tasks = [f"folder:{values[flag]}" for flag in zeroshot]
        often.append(frequency)
        note_unset(settings, values, dict.fromkeys(zeroshot, "eval.tasks"))
    elif zeroshot:
        settings.dropped += [(values.as_written(flag), "--zeroshot-frequency 0: never there") for flag in zeroshot]
    settings.set("eval.tasks", tasks, " ".join(values.as_written(flag) for flag in zeroshot) if tasks else "")
    if values.has("--val-data") and values["--val-frequency"]:
        often.append(values["--val-frequency"])
    if often:
        flags = [flag for flag in ("--zeroshot-frequency", "--val-frequency") if values.has(flag)]
        comment = origin(values, *flags) or "open_clip's default"
        settings.set("eval.every_epochs", min(often), comment)
        if len(set(often)) > 1:
            settings.differs.append(f"all tasks are evaluated together: every {min(often)} epochs")
    for flag in ("--zeroshot-frequency", "--val-frequency"):
        if values.has(flag) and "eval.every_epochs" not in settings.table:
            settings.dropped.append((values.as_written(flag), "there is no such evaluation in the script"))


def _evaluation_command(values: Values) -> str:
    """Return the command that evaluates what a command without training data evaluates."""
    weights = values["--resume"] or values["--pretrained"] or "FILE"
    tasks = [f"folder:{values[flag]}" for flag in ("--imagenet-val", "--imagenet-v2") if values.has(flag)]
    tasks += [f"captions:{values['--val-data']}"] if values.has("--val-data") else []
    words = ["--tasks", *tasks] if tasks else []
    return shlex.join(["disttempnet", "evaluate", f"open_clip:{values['--model']}/{weights}", *words])
