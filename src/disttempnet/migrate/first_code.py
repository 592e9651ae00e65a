"""DistTempNet's first code: flags of clip_cc12m.py and clip_cc3m.py, and the settings that they become."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import PurePosixPath

from disttempnet.errors import UserError, unknown_name
from disttempnet.migrate.flags import Flag, Values, switch, table_of
from disttempnet.migrate.settings import RunSettings

PROGRAMS = ("clip_cc12m.py", "clip_cc3m.py")
STEPS_A_WARMUP_EPOCH = 100
LANES = 8  # the default of data.lanes
NAME_IN_A_CONFIG = re.compile(r"[^A-Za-z0-9._-]+")
NO_EFFECT = "has no effect there"
ONLY_TEMPERATURES = "there τ was printed or pickled: disttempnet temperature RUN --gallery temperatures.html"
PROTONET = "of an objective (isogclr_protonet) that the code does not have"

FIRST_CODE_FLAGS = table_of(
    Flag("--train-data", "data.train"),
    Flag("--train-num-samples", "", "the index counts the samples; an epoch reads each of them once", kind=int),
    Flag("--data_size", "", "per-sample state has a row for each sample of the index", kind=int),
    Flag("--dataset_type", "", "what data.train names is recognised by itself"),
    Flag("--data", "", "a name for the output; data.train says where the data is"),
    Flag("--data_path", "", NO_EFFECT),
    Flag("--train_file", "data.train", "clip_cc3m.py: the path of the source; clip_cc12m.py reads it nowhere"),
    Flag("--train_image_root", "data.train", "clip_cc3m.py: images of the source; clip_cc12m.py reads it nowhere"),
    Flag("--val_coco_file", "eval.tasks", "as a comment: there retrieval was scored every epoch", default=""),
    Flag("--train_frac", "data.limit", "clip_cc3m.py; in clip_cc12m.py it has no effect", default=1.0, kind=float),
    Flag("--noise_level", "", "of ImageNet-100, which is not trained on here", default=0.0, kind=float),
    Flag("--workers", "data.workers", "clip_cc12m.py; clip_cc3m.py has 2", default=6, kind=int),
    Flag("--image_encoder", "model.name", "with --text_encoder", default="resnet50"),
    Flag("--text_encoder", "model.name", "with --image_encoder", default="distilbert-base-uncased"),
    Flag("--image_res", "model.name", "the architecture has the image size: 224", default=256, kind=int),
    Flag("--embed_dim", "model.name", "the architecture has the width: 512, or 256 of RN50-DistilBERT", kind=int),
    switch("--init_model", "model.text_pretrained", "pretrained text tower; from scratch it changes little"),
    Flag("--bert_config", "", NO_EFFECT),
    Flag("--vision_width", "", NO_EFFECT, kind=int),
    Flag("--ita_type", "loss.name"),
    switch("--learnable_temp", "loss.name", "clip: τ is learned; else clip-constant"),
    switch("--personalized_tau", "loss.name", "clip, with --learnable_temp: clip-per-sample"),
    Flag("--temp", "loss.temperature", default=0.01, kind=float),
    Flag("--tau_init", "", "the code never passes it on; isogclr begins at .01", default=0.01, kind=float),
    Flag("--sogclr_gamma", "loss.gamma", "constant, as in v0; v1 is no flag but a change of losses.py",
         default=0.8, kind=float),
    Flag("--rho", "loss.rho", default=8.0, kind=float),
    Flag("--lr_temp_net", "loss.tau_lr", default=6e-6, kind=float),
    Flag("--vicreg_sim_coeff", "loss.invariance", "vicreg", default=25.0, kind=float),
    Flag("--vicreg_std_coeff", "loss.variance", "vicreg", default=25.0, kind=float),
    Flag("--opt", "", "AdamW in either", default="adamW"),
    Flag("--sched", "", "a cosine in either", default="cosine"),
    Flag("--lr", "optim.lr", default=2e-4, kind=float),
    Flag("--min_lr", "optim.lr_end", default=1e-5, kind=float),
    Flag("--weight_decay", "optim.weight_decay", default=0.02, kind=float),
    Flag("--warmup", "", "any value is true there; --warmup_epochs says how long"),
    Flag("--warmup_epochs", "optim.warmup_steps", "× 100: each is of 100 steps", default=20, kind=int),
    Flag("--warmup_lr", "", "the rate begins near 0 here", default=1e-5, kind=float),
    Flag("--decay_rate", "", "of schedules that are not used", default=1.0, kind=float),
    Flag("--cooldown_epochs", "", "the cosine ends with the run", default=0, kind=int),
    Flag("--epochs", "train.epochs", default=30, kind=int),
    Flag("--batch_size_train", "data.global_batch", "× processes; also loss.prototypes", default=256, kind=int),
    Flag("--world_size", "data.global_batch", "× --batch_size_train; here launchers say it", default=4, kind=int),
    Flag("--seed", "train.seed", default=42, kind=int),
    switch("--use_amp", "train.precision", "bf16 where there it was fp16"),
    Flag("--grad_accum", "", NO_EFFECT, default=10, kind=int),
    Flag("--device", "", "a GPU where there is one"),
    Flag("--distributed", "", "launchers say it"),
    Flag("--dist_url", "", "launchers say it"),
    Flag("--output_dir", "name", "its last part; the folder above is out", default="./output/clip_test"),
    Flag("--batch_size_test", "eval.batch", default=256, kind=int),
    Flag("--k_test", "", "all ranks are computed", default=256, kind=int),
    Flag("--zs_dataset", "disttempnet evaluate", "there only with --evaluate"),
    Flag("--zs_datafolder", "disttempnet evaluate", "there only with --evaluate"),
    switch("--evaluate", "disttempnet evaluate"),
    Flag("--checkpoint", "disttempnet import", "weights of the towers, then model.pretrained", default=""),
    switch("--check_samples_tau", "disttempnet temperature", ONLY_TEMPERATURES),
    switch("--check_tempnet_params", "disttempnet temperature", ONLY_TEMPERATURES),
    switch("--vis_prototypes", "disttempnet temperature", ONLY_TEMPERATURES),
    switch("--store_tau", "disttempnet temperature", ONLY_TEMPERATURES),
    switch("--save_learned_taus", "disttempnet temperature", ONLY_TEMPERATURES),
    switch("--extract_data", "", "there an empty list of images; disttempnet data preview draws samples"),
    switch("--find_clusters", "disttempnet temperature", "the gallery has clusters of τ"),
    Flag("--num_clusters", "", "of --find_clusters", default=256, kind=int),
    *(Flag(f"--{name}", "", PROTONET, kind=float) for name in (
        "proto_std", "proto_num", "upper_rho_plus", "proto_weight", "sinkhorn_eps", "swav_temp", "swav_weight")),
)  # fmt: skip

_HANDLED = {  # flags that `first_code_settings` reads; all others are named with the table's reason
    "--train-data", "--train_file", "--train_image_root", "--val_coco_file", "--train_frac", "--workers",
    "--image_encoder", "--text_encoder", "--image_res", "--embed_dim", "--init_model", "--ita_type",
    "--learnable_temp", "--personalized_tau", "--temp", "--sogclr_gamma", "--rho", "--lr_temp_net",
    "--vicreg_sim_coeff", "--vicreg_std_coeff", "--lr", "--min_lr", "--weight_decay", "--warmup_epochs", "--epochs",
    "--batch_size_train", "--world_size", "--seed", "--use_amp", "--output_dir", "--batch_size_test",
}  # fmt: skip


def origin(values: Values, *names: str, note: str = "") -> str:
    """Return the comment of a key: its flags as they are written, or the default that they have where left out."""
    parts = []
    for name in names:
        if values.has(name):
            parts.append(values.as_written(name))
        elif values.table[name].kind is not bool:
            parts.append(f"{name} left out: {values.table[name].default} there")
    return "; ".join([*parts, *([note] if note else [])])


def lanes_for(processes: int, batch: int) -> int:
    """Return the data.lanes nearest to the default that the processes can share and that divide the batch.

    Raises:
        UserError: there are none, as the processes do not divide the batch.
    """
    possible = [lanes for lanes in range(processes, batch + 1, processes) if batch % lanes == 0]
    if not possible:
        raise UserError(f"a batch of {batch} cannot be shared by {processes} processes evenly")
    return min(possible, key=lambda lanes: (abs(lanes - LANES), lanes))


def set_batch(settings: RunSettings, rows: int, processes: int, comment: str) -> None:
    """Set the global batch, and the lanes where the default does not go with it."""
    settings.set("data.global_batch", rows, comment)
    if (lanes := lanes_for(processes, rows)) != LANES:
        settings.set("data.lanes", lanes, f"shared by {processes} processes; the default is {LANES}")


def run_name(text: str) -> str:
    """Return a text as the name of a run."""
    return NAME_IN_A_CONFIG.sub("-", text).strip("-.")[:200] or "migrated"


def first_code_settings(program: str, values: Values, processes: int) -> RunSettings:
    """Translate a command of the first code.

    Args:
        program: its file, one of PROGRAMS.
        values: of its flags.
        processes: of the run.

    Raises:
        UserError: an objective or a combination that the code does not have.
    """
    settings = RunSettings()
    path = PurePosixPath(values["--output_dir"])
    settings.set("name", run_name(path.name), origin(values, "--output_dir"))
    settings.set("out", str(path.parent), "the folder above it")
    _data(program, settings, values, processes)
    _model(program, settings, values)
    _loss(settings, values)
    _training(settings, values)
    _evaluation(settings, values)

    # Flags that no key takes, each with its reason.
    for name in values.given:
        flag = values.table[name]
        if name not in _HANDLED and not flag.becomes:
            settings.dropped.append((values.as_written(name), flag.about))
    settings.differs += [
        "u was never saved there; here it is in every checkpoint, and a resumed run continues exactly",
        "texts are tokenised as by open_clip, padded to the longest of the batch, with the same features",
    ]
    return settings


def _data(program: str, settings: RunSettings, values: Values, processes: int) -> None:
    if program == "clip_cc3m.py":
        if not values.has("--train_file"):
            settings.fill_in.append(("data.train", "the JSON list of captions, and the folder of its images"))
        source = {"path": values["--train_file"] or "cc3m_train.json"}
        if values.has("--train_image_root"):
            source["images"] = values["--train_image_root"]
        settings.set("data.train", [source], "--train_file, --train_image_root; at its end the code sets both anew")
        _note_unset(settings, values, "--train_file", "--train_image_root")
        if (share := values["--train_frac"]) != 1.0:
            settings.fill_in.append(("data.limit", f"{share:g} × the number of samples (--train_frac {share:g})"))
    else:
        if not values.has("--train-data"):
            settings.fill_in.append(("data.train", "the shards (--train-data, which is required there)"))
        settings.set("data.train", values["--train-data"] or "/data/{00000..01242}.tar", "--train-data")
        _note_unset(settings, values, "--train-data")
        for name in ("--train_file", "--train_image_root", "--train_frac"):
            if values.has(name):
                settings.dropped.append((values.as_written(name), "clip_cc12m.py reads --train-data alone"))
    settings.set("data.transform", "tempnet", "crop of 50-100 %, flip, RandAugment(2, 7), as in the code")
    each = values["--batch_size_train"]
    said = values.as_written("--world_size") if values.has("--world_size") else ""
    set_batch(
        settings,
        each * processes,
        processes,
        f"{origin(values, '--batch_size_train')} × {processes} processes{f' ({said})' if said else ''}",
    )
    if said and values["--world_size"] != processes:
        settings.differs.append(f"--world_size {values['--world_size']}, but {processes} processes: those count")
    if program == "clip_cc3m.py":
        settings.set("data.workers", 2, "in the code")
    else:
        settings.set("data.workers", values["--workers"], origin(values, "--workers"))


def _model(program: str, settings: RunSettings, values: Values) -> None:
    image, text = values["--image_encoder"], values["--text_encoder"]
    named = [name for name in ("--image_res", "--embed_dim") if values.has(name)]
    towers = origin(values, "--image_encoder", "--text_encoder", *named)
    width, size = values["--embed_dim"], values["--image_res"]
    if image != "resnet50" and text == "Transformer":
        # whatever --image_encoder says there, it is ViT-B/32
        settings.set("model.name", "ViT-B-32", towers)
        if values["--init_model"]:
            settings.dropped.append(("--init_model", "both towers begin at random, as there"))
        own_width, own_size = 512, 224
    elif image == "resnet50" and text == "distilbert-base-uncased":
        settings.set("model.name", "RN50-DistilBERT", f"{towers}; needs disttempnet[hf]")
        settings.set("model.image_pretrained", "resnet50.tv_in1k", "resnet50-0676ba61.pth there; or a file")
        pretrained = values["--init_model"]
        settings.set(
            "model.text_pretrained", text if pretrained else "", "--init_model" if pretrained else "no --init_model"
        )
        settings.set("model.batch_norm", "global", "statistics of all rows; there of one GPU's")
        settings.differs.append("dropout of DistilBERT is off; captions are not lower-cased and stripped beforehand")
        own_width, own_size = 256, 224
    else:
        settings.set("model.name", "architecture.json", towers)
        if values["--init_model"]:
            settings.fill_in.append(("--init_model", "model.text_pretrained, if the text tower began with weights"))
        settings.fill_in.append((
            "model.name",
            f"no shipped architecture joins {image} and {text}: a JSON file with one (docs/models.md)",
        ))  # fmt: skip
        return
    if width is None:
        width = 256 if program == "clip_cc3m.py" else 512
    for flag, value, own in (("--embed_dim", width, own_width), ("--image_res", size, own_size)):
        if value != own:
            settings.differs.append(
                f"{origin(values, flag)}: {settings.table['model.name']} has {own}; for {value} name a JSON file with "
                "your architecture (docs/models.md)"
            )


def _loss(settings: RunSettings, values: Values) -> None:
    kinds: dict[str, Callable[[RunSettings, Values], None]] = {
        "clip": _clip, "cyclip": _cyclip, "vicreg": _vicreg, "sogclr": _sogclr, "isogclr": _isogclr,
        "isogclr_tempnet": _tempnet, "onlineclr": _onlineclr,
    }  # fmt: skip
    kind = values["--ita_type"]
    if kind is None:
        raise UserError("--ita_type is missing: the first code needs it")
    if kind not in kinds:
        raise UserError(unknown_name("--ita_type", kind, kinds))
    kinds[kind](settings, values)
    of_others = {
        "--rho": {"isogclr", "isogclr_tempnet"},
        "--sogclr_gamma": {"sogclr", "isogclr", "isogclr_tempnet", "onlineclr"},
        "--lr_temp_net": {"isogclr_tempnet"},
        "--temp": {"clip", "cyclip", "sogclr", "onlineclr"},
        "--learnable_temp": {"clip", "cyclip"},
        "--personalized_tau": {"clip"},
        "--vicreg_sim_coeff": {"vicreg"},
        "--vicreg_std_coeff": {"vicreg"},
    }
    for name, takers in of_others.items():
        if values.has(name) and kind not in takers:
            settings.dropped.append((values.as_written(name), f"--ita_type {kind} does not use it"))


def _tempnet(settings: RunSettings, values: Values) -> None:
    hard_coded = {
        "tau_min": (0.001, "in the code a hard clamp, which blocks the gradient; here a smooth bound"),
        "tau_max": (0.05, "in the code, and never applied"),
        "dropout": (0.5, "in the code"),
        "feature_scale": (1.0, "the code feeds unit features"),
    }
    settings.set("loss.name", "disttempnet", origin(values, "--ita_type"))
    settings.set("loss.rho", values["--rho"], origin(values, "--rho"))
    settings.set("loss.gamma", values["--sogclr_gamma"], origin(values, "--sogclr_gamma"))
    settings.set("loss.network", "dist", "the form of this code")
    settings.set("loss.prototypes", values["--batch_size_train"], "there the batch of one GPU")
    for key, (value, why) in hard_coded.items():
        settings.set(f"loss.{key}", value, why)
    settings.set("loss.tau_lr", values["--lr_temp_net"], origin(values, "--lr_temp_net", note="warms up with lr"))
    settings.set("loss.tau_lr_decay", 0.9, "an epoch, in the code")
    settings.set("loss.tau_start_epoch", 0, "the network learns from step 0")
    settings.set("loss.tau_start", "epoch", "")
    settings.set("loss.tau_gradient", "fcco", "")
    settings.set("loss.tau_gradient_limit", 0.0, "nothing is clamped in the code")
    settings.differs.append(
        'v1 of the code is no flag: for it write loss.name = "disttempnet-v1", gamma_min in place of gamma, '
        "gamma_decay_epochs = 20.0, and tau_initial = 0"
    )


def _clip(settings: RunSettings, values: Values) -> None:
    kind, tau = origin(values, "--ita_type"), values["--temp"]
    if values["--personalized_tau"] and not values["--learnable_temp"]:
        raise UserError("--personalized_tau without --learnable_temp: the first code stops with an error there")
    name = "clip-constant"
    if values["--learnable_temp"]:
        name = "clip-per-sample" if values["--personalized_tau"] else "clip"
        kind += "; --learnable_temp" + (" --personalized_tau" if values["--personalized_tau"] else "")
    settings.set("loss.name", name, kind)
    settings.set("loss.temperature", tau, origin(values, "--temp"))
    if name != "clip-constant":
        settings.set("loss.tau_min", 0.001, "clamped there in the code")
        settings.set("loss.tau_max", 0.5, "clamped there in the code")
    if name == "clip":
        settings.set("loss.tau_lr", 0.0, "that of the towers")
    if name == "clip-per-sample":
        settings.set("loss.tau_lr", values["--lr"], origin(values, "--lr"))


def _cyclip(settings: RunSettings, values: Values) -> None:
    settings.set("loss.name", "cyclip", origin(values, "--ita_type"))
    settings.set("loss.temperature", values["--temp"], origin(values, "--temp"))
    if values["--learnable_temp"]:
        settings.set("loss.tau_min", 0.001, "--learnable_temp; clamped there in the code")
        settings.set("loss.tau_max", 0.5, "clamped there in the code")
    else:
        settings.differs.append("cyclip: τ is learned here, constant there without --learnable_temp")


def _vicreg(settings: RunSettings, values: Values) -> None:
    settings.set("loss.name", "vicreg", origin(values, "--ita_type"))
    settings.set("loss.invariance", values["--vicreg_sim_coeff"], origin(values, "--vicreg_sim_coeff"))
    settings.set("loss.variance", values["--vicreg_std_coeff"], origin(values, "--vicreg_std_coeff"))
    settings.set("loss.covariance", 1.0, "in the code")


def _sogclr(settings: RunSettings, values: Values) -> None:
    settings.set("loss.name", "sogclr", origin(values, "--ita_type"))
    settings.set("loss.temperature", values["--temp"], origin(values, "--temp"))
    settings.set("loss.gamma", values["--sogclr_gamma"], origin(values, "--sogclr_gamma"))


def _isogclr(settings: RunSettings, values: Values) -> None:
    settings.set("loss.name", "isogclr", origin(values, "--ita_type"))
    settings.set("loss.rho", values["--rho"], origin(values, "--rho"))
    settings.set("loss.gamma", values["--sogclr_gamma"], origin(values, "--sogclr_gamma"))
    for key, value in (("temperature", 0.01), ("tau_min", 0.005), ("tau_max", 0.05), ("tau_lr", 0.03)):
        settings.set(f"loss.{key}", value, "in the code")
    settings.set("loss.tau_beta", 0.5, "in the code")
    settings.set("loss.tau_gradient_limit", 5.0, "in the code")


def _onlineclr(settings: RunSettings, values: Values) -> None:
    settings.set("loss.name", "onlineclr", origin(values, "--ita_type"))
    settings.set("loss.temperature", values["--temp"], origin(values, "--temp"))
    settings.set("loss.gamma", values["--sogclr_gamma"], origin(values, "--sogclr_gamma"))


def _training(settings: RunSettings, values: Values) -> None:
    warmup = values["--warmup_epochs"]
    settings.set("optim.lr", values["--lr"], origin(values, "--lr"))
    settings.set(
        "optim.lr_end", values["--min_lr"], origin(values, "--min_lr", note="there the cosine falls once an epoch")
    )
    settings.set("optim.weight_decay", values["--weight_decay"], origin(values, "--weight_decay"))
    settings.set("optim.beta2", 0.999, "AdamW's own default there")
    settings.set("optim.eps", 1e-8, "AdamW's own default there")
    settings.set(
        "optim.warmup_steps", warmup * STEPS_A_WARMUP_EPOCH, f"{origin(values, '--warmup_epochs')} × 100 steps each"
    )
    settings.set("train.epochs", values["--epochs"], origin(values, "--epochs"))
    settings.set("train.seed", values["--seed"], origin(values, "--seed"))
    if values["--use_amp"]:
        settings.set("train.precision", "auto", "--use_amp: bf16 on a GPU; there fp16 with a scaled loss")
    else:
        settings.set("train.precision", "fp32", "no --use_amp, without which the first code stops")


def _evaluation(settings: RunSettings, values: Values) -> None:
    settings.set("eval.tasks", [], "there COCO and Flickr30k of fixed paths, every epoch")
    if path := values["--val_coco_file"]:
        settings.differs.append(
            f'--val_coco_file: retrieval every epoch is eval.tasks = ["captions:{path}?images=FOLDER"]; the folder is '
            "fixed in the first code"
        )
    if values.has("--batch_size_test"):
        settings.set("eval.batch", values["--batch_size_test"], origin(values, "--batch_size_test"))
    run = f"{settings.table['out']}/{settings.table['name']}"
    if values.has("--zs_dataset") or values.has("--zs_datafolder"):
        folder = values["--zs_datafolder"] or "FOLDER"
        settings.commands.append(
            f"disttempnet evaluate {run} --tasks folder:{folder}   "
            f"({_written(values, '--zs_dataset', '--zs_datafolder')}: there only with --evaluate)"
        )
    if values.has("--checkpoint"):
        settings.commands.append(
            f"disttempnet import {values['--checkpoint']} --out {run}-imported   (--checkpoint; to train on from it: "
            f"model.pretrained={run}-imported)"
        )
    temperature = [name for name in values.given if values.table[name].becomes == "disttempnet temperature"]
    if temperature:
        settings.commands.append(
            f"disttempnet temperature {run} --gallery temperatures.html   ({_written(values, *temperature)})"
        )
    if values.has("--evaluate"):
        settings.commands.append(
            f"disttempnet evaluate {run} --data-root DATACOMP   (--evaluate: trains nothing there)"
        )


def _written(values: Values, *names: str) -> str:
    return " ".join(values.as_written(name) for name in names if values.has(name))


def _note_unset(settings: RunSettings, values: Values, *names: str) -> None:
    note_unset(settings, values, dict.fromkeys(names, "data.train"))


def note_unset(settings: RunSettings, values: Values, keys: dict[str, str]) -> None:
    """List the keys whose flags have parts that the script does not fill in."""
    for name, key in keys.items():
        for word in values.given.get(name, ()):
            if word.unset:
                settings.fill_in.append((f"{key} ({values.as_written(name)})", values.explain(word)))
