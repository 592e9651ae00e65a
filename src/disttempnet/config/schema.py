"""Typed configuration of a run: the keys of its TOML file (read by toml.py), strictly validated.

Unknown keys and wrong types are refused with the file, the key and the nearest known name. The arguments in `[loss]`
belong to the objective that it names: `disttempnet.losses` checks them.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from disttempnet.config.toml import CONFIG_FOLDER as CONFIG_FOLDER
from disttempnet.config.toml import apply_override, read_run_table
from disttempnet.errors import UserError, unknown_name
from disttempnet.io.paths import Home, expand_home
from disttempnet.io.ranges import BATCH, GIGABYTES, SAMPLES, SEEDS, TYPES_ALONE, WORKERS, Range, bounded, integers
from disttempnet.sanitize import redacted, redacted_table

PathOrName = Annotated[str, Home()]  # `~` is expanded
OptionalPath = Annotated[str, Home(empty=True)]  # may be empty
STEPS = integers(0, 10**12)
VALIDATION_SHARE = Range(0, 0.5)  # share of the samples
SHOWN_CHARACTERS = 60  # of a wrong value


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceConfig(Section):
    """One source of training samples."""

    path: PathOrName = Field(description="as data.train")
    weight: Annotated[float, Range(0, 1000, above=True)] = Field(
        1.0,
        description="how often an epoch reads each of its samples, on average, with one crop and caption an epoch",
    )
    index: OptionalPath = Field("", description="file where the index is written; empty = beside the data")
    caption_key: str = Field(
        "",
        description="key of a sample's .json, or of a listing's rows, that holds its caption or captions; empty = "
        ".txt, and in rows one of caption, captions, title, text",
    )
    cache: OptionalPath = Field("", description="remote shards: folder that they are kept in; empty = the user's cache")
    cache_gb: Annotated[float, GIGABYTES] = Field(
        100.0, description="remote shards: gigabytes that they may take in the cache, those of all sources"
    )
    images: OptionalPath = Field(
        "", description="listings: folder of relative paths; empty = the listing's or the one above"
    )
    image_key: str = Field("", description="listings: key or column of the image; empty = image, filepath, path, …")
    join_rows: StrictBool = Field(
        True, description="listings: rows of one image are one sample with all their captions; false = a sample a row"
    )


def _source(item: Any, name: str, info: ValidationInfo) -> SourceConfig:
    """Validate one source; raise ValueError with its first fault in one line."""
    if not isinstance(item, (dict, SourceConfig)):
        raise ValueError(f"{name} must be a table, {{path = …}} (got {item!r})")
    try:
        return SourceConfig.model_validate(item, context=info.context)
    except ValidationError as error:
        raise ValueError(f"{name}: {explain(error, SourceConfig)}") from None


class DataConfig(Section):
    """Training data: sources, order, batches, augmentation."""

    train: str | tuple[SourceConfig, ...] = Field(
        description="training shards: a folder of .tar files, a brace pattern (cc12m/{00000..01242}.tar), "
        "embedded:emoji/train for the data set that ships with the package, generated:scenes/train for a "
        "synthetic one with a long tail, or built:icons/train for the one that `disttempnet data icons` builds; a "
        "listing (.json, .jsonl, .csv, .tsv, .txt, .token, .parquet) or a folder of images with captions beside them; "
        "or a list of sources, [{path = …, weight = …}, …]",
    )
    transform: Literal["open_clip", "tempnet", "emoji", "evaluation"] = Field(
        "open_clip",
        description="open_clip: random crop of 90-100 %; tempnet: crop of 50-100 %, flip, RandAugment(2, 7); "
        "emoji: crop of 60-100 %, no flip (arrows have a direction); evaluation: none, what evaluation sees",
    )
    views: Annotated[int, integers(0, 1000)] = Field(
        0,
        description="train.cache_features: how many augmented views of each image are cached, epoch e reads view "
        "e mod this; 0 = one, of transform = evaluation",
    )
    draft: StrictBool = Field(
        False,
        description="decode JPEGs at the smallest of 1/8, 1/4, 1/2 that still covers the crop: quicker where images "
        "are over twice as large as the model's input, and slightly other pixels",
    )
    global_batch: Annotated[int, integers(2, 2**24)] = Field(description="samples a step over all ranks")
    lanes: Annotated[int, integers(1, 65_536)] = Field(
        8, description="parallel reading lanes; every world size that divides it sees the same batches"
    )
    shuffle_window: Annotated[int, integers(1, 2**31)] = Field(
        16384, description="samples a lane that are shuffled together"
    )
    tail: Literal["wrap", "drop"] = Field(
        "wrap", description="last batch of an epoch: filled from the epoch's beginning, or dropped"
    )
    workers: Annotated[int, WORKERS] = Field(2, description="loader processes a rank; 0 loads in the training process")
    validation: float | str = Field(
        0.0,
        description=f"data of the task validation: a share of the samples ({VALIDATION_SHARE}), chosen by hash, never "
        "trained on; or another source, as data.train or as a task (captions:FILE); 0 = none",
    )
    limit: Annotated[int, SAMPLES] = Field(0, description="use only the first this many readable samples; 0 = all")

    @field_validator("train", mode="before")
    @classmethod
    def _sources_one_by_one(cls, train: Any, info: ValidationInfo) -> Any:
        """Validate each source by itself: pydantic would report a fault for both types that `train` may have."""
        if isinstance(train, str) and train:
            if not all(part.strip() for part in train.split("::")):
                raise ValueError(f"names an empty source beside '::': leave it out (got {train!r})")
            return expand_home(train)
        if not isinstance(train, (list, tuple)) or not train:
            raise ValueError(f"must name a source, or a list of them, [{{path = …}}, …] (got {train!r})")
        return tuple(_source(item, f"source {number}", info) for number, item in enumerate(train, 1))

    @field_validator("validation", mode="before")
    @classmethod
    def _a_share_or_a_source(cls, given: Any, info: ValidationInfo) -> Any:
        if not isinstance(given, str):
            return VALIDATION_SHARE.validated(given, info)
        if not given.strip():
            raise ValueError(f"must be a share {VALIDATION_SHARE}, or name a source")
        try:
            share = float(given)  # as on a command line
        except ValueError:
            return expand_home(given)
        return VALIDATION_SHARE.validated(share, info)

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The sources that `train` names; `A::B` is open_clip's notation for two."""
        if isinstance(self.train, str):
            return tuple(SourceConfig(path=path) for path in self.train.split("::"))
        return self.train

    @property
    def about(self) -> str:
        """The sources that `train` names, as text without credentials."""
        return redacted(", ".join(source.path for source in self.sources))

    @model_validator(mode="after")
    def _batch_divides_into_lanes(self, info: ValidationInfo) -> DataConfig:
        if bounded(info) and self.global_batch % self.lanes:
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of lanes {self.lanes}; choose lanes that divide it"
            )
        return self


class ModelConfig(Section):
    """The towers, and their initial weights."""

    name: PathOrName = Field(
        description="an open_clip architecture, one of the package's own, a JSON file with one, or one with its "
        "weights: open_clip:NAME/TAG, hf-hub:ORG/NAME, local-dir:FOLDER"
    )
    pretrained: OptionalPath = Field(
        "",
        description="initial weights: an open_clip tag, a file of weights, a checkpoint folder, a run folder (its "
        "best checkpoint), hf-hub:ORG/NAME or local-dir:FOLDER; empty = random",
    )
    image_pretrained: OptionalPath = Field(
        "",
        description="weights of a timm image tower alone: a file, a name (resnet50.tv_in1k) to download, or "
        "package:MODULE/PATH, a file in an installed Python package",
    )
    text_pretrained: OptionalPath = Field(
        "",
        description="weights of a Hugging Face text tower alone: a folder, a name (distilbert-base-uncased), or "
        "package:MODULE/PATH",
    )
    resize_positions: StrictBool = Field(
        False,
        description="accept weights of another image size, and interpolate their position embeddings",
    )
    context_length: Annotated[int, integers(0, 512)] = Field(
        0,
        description="tokens of a text, start and end included; text positions of pretrained weights are interpolated "
        "to more, or cut to the first ones; 0 = as the architecture says",
    )
    head: Literal["", "linear", "mlp"] = Field(
        "",
        description="projection on timm and Hugging Face towers: linear, or mlp with a hidden layer; empty = as the "
        "architecture says",
    )
    lock_image: StrictBool = Field(
        False, description="train nothing of the image tower except a projection on top of it"
    )
    unlocked_image_groups: Annotated[int, integers(0, 1000)] = Field(
        0, description="last groups of layers of a locked image tower that are trained"
    )
    lock_text: StrictBool = Field(False, description="train nothing of the text tower except a projection on top of it")
    unlocked_text_layers: Annotated[int, integers(0, 1000)] = Field(
        0, description="last layers of a locked text tower that are trained"
    )
    batch_norm: Literal["global", "frozen"] = Field(
        "global",
        description="global: BatchNorm takes the statistics of the global batch, at any world size; "
        "frozen: those of the initial weights",
    )

    @model_validator(mode="before")
    @classmethod
    def _name_with_its_tag(cls, given: Any) -> Any:
        """Take `open_clip:NAME/TAG` as `evaluate` does: it is name and pretrained."""
        name = given.get("name") if isinstance(given, dict) else None
        if not (isinstance(name, str) and name.startswith("open_clip:")):
            return given
        architecture, _, tag = name.removeprefix("open_clip:").partition("/")
        if tag and given.get("pretrained"):
            raise ValueError(f"name = {name!r} has weights already: leave pretrained out, or the tag")
        return {**given, "name": architecture, **({"pretrained": tag} if tag else {})}

    @field_validator("context_length")
    @classmethod
    def _leaves_words(cls, length: int, info: ValidationInfo) -> int:
        if bounded(info) and length in (1, 2):
            raise PydanticCustomError("words", "must be at least 3 (start, a token of the text, end), or 0")
        return length

    @model_validator(mode="after")
    def _one_origin_of_weights(self) -> ModelConfig:
        if self.pretrained and (self.image_pretrained or self.text_pretrained):
            raise ValueError("give pretrained (both towers), or image_pretrained and text_pretrained, not all")
        if self.resize_positions and not self.pretrained:
            raise ValueError("resize_positions is for the weights of pretrained, which is not set")
        locks = {
            "image": (self.lock_image, self.image_pretrained, "unlocked_image_groups", self.unlocked_image_groups),
            "text": (self.lock_text, self.text_pretrained, "unlocked_text_layers", self.unlocked_text_layers),
        }
        for side, (locked, own, key, unlocked) in locks.items():
            if unlocked and not locked:
                raise ValueError(f"{key} is for a locked tower: set lock_{side} = true")
            if locked and not (own or self.pretrained or ":" in self.name):
                raise ValueError(f"lock_{side} would keep random weights: set {side}_pretrained or pretrained")
        return self


class LoraConfig(Section):
    """LoRA adapters on locked towers (arXiv 2106.09685), through peft."""

    rank: Annotated[int, integers(0, 1024)] = Field(
        0, description="rank of the adapters, the only part of the towers that is trained; 0 = none"
    )
    alpha: Annotated[float, Range(0, 10_000)] = Field(0.0, description="adapters are scaled by alpha / rank; 0 = rank")
    towers: tuple[Literal["image", "text"], ...] = Field(("image", "text"), description="towers with adapters")
    targets: tuple[str, ...] = Field(
        (),
        description="last names of the modules with adapters (attn, c_fc, qkv, q_lin, …); empty = all linear maps and "
        "attentions between embeddings and heads",
    )

    @model_validator(mode="after")
    def _describes_adapters(self, info: ValidationInfo) -> LoraConfig:
        if not self.rank and (self.alpha or self.targets):
            raise ValueError("alpha and targets are of adapters: set rank too")
        if bounded(info) and not self.rank and self.towers != type(self).model_fields["towers"].default:
            raise ValueError("towers is of adapters: set rank too, or leave it out")
        if self.rank and not self.towers:
            raise ValueError('towers names none: give "image", "text" or both')
        return self


class LossConfig(BaseModel):
    """`name` and the arguments of that objective; `disttempnet.losses.build_loss` checks them."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class ReferenceConfig(Section):
    """A reference model, of objectives that are steered by one (drrho)."""

    model: OptionalPath = Field("", description="as model.name; empty = none")
    pretrained: OptionalPath = Field("", description="its weights, as model.pretrained")
    cached: StrictBool = Field(
        False,
        description="embed each sample once, as evaluation sees it, and read that from disk; else every batch as it is "
        "augmented, which needs the image size and tokenizer of the towers",
    )
    cache_folder: OptionalPath = Field("", description="folder of the cached embeddings; empty = the user's cache")

    @model_validator(mode="after")
    def _describes_a_model(self, info: ValidationInfo) -> ReferenceConfig:
        if not self.model and (self.pretrained or self.cached):
            raise ValueError("pretrained and cached are of a reference model: set model too")
        if bounded(info) and self.cache_folder and not self.cached:
            raise ValueError("cache_folder is for cached embeddings: set cached = true, or leave it out")
        return self


class OptimConfig(Section):
    """Optimizer of the towers, and its learning rate. The temperature's own rate is in [loss]."""

    name: str = Field(
        "adamw", description="adamw, or another of timm's optimizers: lion, muon, lamb, adafactorbv, sgd, …"
    )
    lr: Annotated[float, Range(0, 10, above=True)]
    weight_decay: Annotated[float, Range(0, 10)] = Field(
        0.02, description="on matrices only: not on gains, biases, embeddings' scale"
    )
    beta1: Annotated[float, Range(0, 1, below=True)] = Field(0.9, description="the momentum, of optimizers with one")
    beta2: Annotated[float, Range(0, 1, below=True)] = 0.98
    eps: Annotated[float, Range(0, 1, above=True)] = 1e-6
    layer_decay: Annotated[float, Range(0, 1, above=True)] = Field(
        1.0, description="factor of the rate for each layer below a tower's last: for fine-tuning; 1 = one rate for all"
    )
    warmup_steps: Annotated[int, STEPS] = Field(
        0, description="steps over which the rate rises to lr; shortened if it is as long as the run or longer"
    )
    warmup_share: Annotated[float, Range(0, 1, below=True)] = Field(
        0.0, description="the same as a share of the run's steps; give one of the two"
    )
    schedule: Literal["cosine", "constant", "wsd"] = Field(
        "cosine",
        description="of the rate after the warm-up: cosine falls to lr_end; constant stays; wsd (warm-up, stable, "
        "decay) stays and falls to lr_end on a line at the end of the run",
    )
    decay_share: Annotated[float, Range(0, 1, above=True)] = Field(
        0.2, description="schedule = wsd: share of the run's steps in which the rate falls"
    )
    lr_end: Annotated[float, Range(0, 10)] = Field(0.0, description="where the schedule ends; at most lr")
    grad_clip: Annotated[float, Range(0, 10**6)] = Field(
        0.0, description="largest gradient norm of the towers (frozen: of the rest); 0 = none"
    )

    @model_validator(mode="after")
    def _falls(self, info: ValidationInfo) -> OptimConfig:
        if bounded(info) and self.lr_end > self.lr:
            raise ValueError(f"lr_end {self.lr_end:g} is above lr {self.lr:g}: set optim.lr_end too")
        return self

    @model_validator(mode="after")
    def _describes_one_schedule(self) -> OptimConfig:
        if self.warmup_steps and self.warmup_share:
            raise ValueError("give warmup_steps or warmup_share, not both: set the other one to 0")
        if self.schedule == "constant" and self.lr_end:
            raise ValueError(
                'lr_end is for a schedule that falls: leave it out with schedule = "constant", or set optim.lr_end=0'
            )
        if self.schedule != "wsd" and self.decay_share != type(self).model_fields["decay_share"].default:
            default = type(self).model_fields["decay_share"].default
            raise ValueError(
                f'decay_share is for schedule = "wsd": set that, or leave it out, or set optim.decay_share={default}'
            )
        if self.schedule == "wsd" and self.warmup_share + self.decay_share > 1:
            raise ValueError("warmup_share and decay_share are more than the run together: lower one of them")
        return self


class TrainConfig(Section):
    """Training: length, precision, memory, checkpoints."""

    epochs: Annotated[int, integers(1, 10**6)]
    warm_statistics: Annotated[int, integers(0, 10**6)] = Field(
        0,
        description="first epochs in which all weights stand still, and the optimizers' moments and the objective's "
        "normalisers move: for fine-tuning; schedules of learning rates begin after them",
    )
    freeze: Literal["", "towers"] = Field(
        "", description="towers: freeze those of model.pretrained and train the temperature only"
    )
    seed: Annotated[int, SEEDS] = 2024
    ema: Annotated[float, Range(0, 1, below=True)] = Field(
        0.0,
        description="moving average of the towers' weights with this decay a step, such as 0.999: evaluation, "
        "checkpoints and exports have the average; 0 = none",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto = bf16 autocast on a GPU, else fp32")
    compile: StrictBool = Field(False, description="torch.compile the towers")
    accumulate: Annotated[int, integers(1, 65_536)] = Field(
        1,
        description="embed a process's part of a batch in this many chunks: the gradient of the whole batch with the "
        "memory of a chunk, for a second forward pass of the towers",
    )
    checkpoint_activations: StrictBool = Field(
        False,
        description="keep only the inputs of the towers' blocks for the backward pass and compute the rest again: the "
        "same gradient with less memory, for about a third more computation",
    )
    shard: StrictBool = Field(
        False,
        description="shard parameters, gradients and moments of the towers over the processes (FSDP2), for towers that "
        "outgrow a GPU: less memory, 1.5 times the communication",
    )
    ring: StrictBool = Field(
        False,
        description="hand the features round the processes, in place of gathering those of all on each: the same "
        "gradients with 1/K of the memory, for large global batches; not for objectives that need all features at once",
    )
    exchange: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="gradients of the towers between processes: bf16 moves half the bytes, and rounds them before they "
        "are summed",
    )
    cache_features: StrictBool = Field(
        False,
        description="compute the features of locked towers (model.lock_image, model.lock_text, freeze) once, and read "
        "them from disk at every step",
    )
    cache_dtype: Literal["float32", "float16"] = Field(
        "float32", description="cached features: float16 takes half the disk, and rounds to 3 digits"
    )
    cache_folder: OptionalPath = Field(
        "", description="cached features: folder that they are kept in; empty = the user's cache"
    )
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        ("tensorboard",), description="where the numbers of metrics.jsonl and eval.jsonl go besides"
    )
    tracker_project: str = Field("disttempnet", description="project of wandb and trackio that the run belongs to")
    log_every: Annotated[int, integers(1, 10**6)] = Field(10, description="steps between lines of metrics.jsonl")
    checkpoint_epochs: Annotated[int, integers(1, 10**6)] = Field(
        1, description="epochs between checkpoints; the last epoch, the best one and a stop are saved always"
    )
    checkpoint_every: Annotated[int, STEPS] = Field(0, description="steps between further checkpoints; 0 = none")
    keep: Annotated[int, integers(1, 10**6)] = Field(2, description="how many of the latest checkpoints to keep")
    stop_after_steps: Annotated[int, STEPS] = Field(
        0, description="end early at this step, schedules unchanged; 0 = full length"
    )
    timeout_minutes: Annotated[float, Range(0, 10_080, above=True)] = Field(
        10.0, description="how long a rank waits for the others"
    )

    @model_validator(mode="after")
    def _trains_after_the_warm_statistics(self, info: ValidationInfo) -> TrainConfig:
        if bounded(info) and self.warm_statistics >= self.epochs:
            raise ValueError(f"warm_statistics {self.warm_statistics} leaves none of {self.epochs} epochs to train in")
        return self

    @model_validator(mode="after")
    def _describes_a_cache_that_is_used(self, info: ValidationInfo) -> TrainConfig:
        for key in ("cache_dtype", "cache_folder") if bounded(info) and not self.cache_features else ():
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is for cached features: set cache_features = true, or leave it out")
        return self

    @model_validator(mode="after")
    def _names_the_project_of_a_tracker(self, info: ValidationInfo) -> TrainConfig:
        default = type(self).model_fields["tracker_project"].default
        if bounded(info) and self.tracker_project != default and not {"wandb", "trackio"} & set(self.trackers):
            raise ValueError("tracker_project is of wandb and trackio: name one in trackers, or leave it out")
        return self

    @model_validator(mode="after")
    def _recomputes_trained_towers(self) -> TrainConfig:
        if self.checkpoint_activations and self.freeze:
            raise ValueError(
                f'checkpoint_activations is for trained towers: leave it out with freeze = "{self.freeze}"'
            )
        return self

    @model_validator(mode="after")
    def _averages_trained_towers(self) -> TrainConfig:
        if self.ema and self.freeze:
            raise ValueError(f'ema averages trained towers: leave it out with freeze = "{self.freeze}"')
        return self

    @model_validator(mode="after")
    def _shards_trained_towers(self) -> TrainConfig:
        if self.shard and self.freeze:
            raise ValueError(f'shard is for trained towers: leave it out with freeze = "{self.freeze}"')
        if self.shard and self.compile:
            raise ValueError("shard and compile do not go together: leave one of them out")
        if self.exchange == "bf16" and self.shard:
            raise ValueError('exchange = "bf16" is for DDP, shard exchanges with FSDP2: leave one of them out')
        if self.exchange == "bf16" and self.freeze:
            raise ValueError(f'exchange is for trained towers: leave it out with freeze = "{self.freeze}"')
        if self.shard and self.cache_features:
            raise ValueError("shard and cache_features do not go together: leave one of them out")
        return self


class EvalConfig(Section):
    """Evaluation during and after training."""

    tasks: tuple[PathOrName, ...] = Field(
        (), description="rows of evaluation/tasks.toml, or folder:PATH, shards:SPEC, captions:FILE"
    )
    data_root: OptionalPath = Field("", description="folder of the data of DataComp's tasks; see docs/evaluation.md")
    every_epochs: Annotated[int, integers(1, 10**6)] = 1
    batch: Annotated[int, BATCH] = Field(256, description="images a forward pass")
    normaliser_samples: Annotated[int, integers(0, 2**20)] = Field(
        0,
        description="training samples, rounded up to batches, over which the error of the objective's normalisers is "
        "measured at each evaluation (normaliser_error/ in metrics.jsonl); 0 = none",
    )


class Config(Section):
    """Configuration of a run."""

    name: str = Field(description="name of the run; its folder is OUT/name")
    out: PathOrName = Field("runs", description="folder of run folders")
    data: DataConfig
    model: ModelConfig
    loss: LossConfig
    optim: OptimConfig
    train: TrainConfig
    eval: EvalConfig = Field(default_factory=EvalConfig)
    reference: ReferenceConfig = Field(default_factory=ReferenceConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)

    @property
    def cached_sides(self) -> tuple[str, ...]:
        """The sides, of `image` and `text`, whose towers are fully locked, so that their features are cached."""
        model, frozen = self.model, self.train.freeze == "towers"
        locked = {
            "image": frozen or (model.lock_image and not model.unlocked_image_groups),
            "text": frozen or (model.lock_text and not model.unlocked_text_layers),
        }
        return tuple(side for side, whole in locked.items() if whole) if self.train.cache_features else ()

    @model_validator(mode="after")
    def _caches_what_is_locked(self, info: ValidationInfo) -> Config:
        sides = self.cached_sides
        if self.train.cache_features and not sides:
            raise ValueError(
                "train.cache_features is for towers that are locked as a whole: set model.lock_image or "
                'model.lock_text (without unlocked layers), or train.freeze = "towers"'
            )
        if self.data.views and "image" not in sides:
            raise ValueError("data.views is for a cached image tower: set train.cache_features and model.lock_image")
        if self.data.views and self.data.transform == "evaluation":
            raise ValueError("data.views has no use with data.transform = 'evaluation', where all views are alike")
        # an older version took no notice of these keys
        if bounded(info) and "image" in sides and not self.data.views and self.data.transform != "evaluation":
            raise ValueError(
                f"data.transform = '{self.data.transform}' has no effect on an image tower that is cached once: set "
                "data.transform = 'evaluation', or data.views to the number of augmented views that are cached"
            )
        if bounded(info) and self.train.compile and len(sides) == 2:
            raise ValueError("train.compile has nothing to compile where both towers are cached: leave it out")
        return self

    @model_validator(mode="after")
    def _decays_the_rate_of_trained_layers(self, info: ValidationInfo) -> Config:
        if bounded(info) and self.train.freeze and self.optim.layer_decay != 1:
            raise ValueError(
                f'optim.layer_decay is for trained towers: leave it out with train.freeze = "{self.train.freeze}"'
            )
        return self

    @model_validator(mode="after")
    def _adapts_pretrained_towers(self, info: ValidationInfo) -> Config:
        if not self.lora.rank:
            return self
        model = self.model
        for key in ("unlocked_image_groups", "unlocked_text_layers") if bounded(info) else ():
            if getattr(model, key):
                raise ValueError(
                    f"lora.rank and model.{key} do not go together (adapters are for locked layers): leave one out"
                )
        if not (model.pretrained or ":" in model.name or (model.image_pretrained and model.text_pretrained)):
            raise ValueError("lora.rank would adapt random weights: set model.pretrained")
        for key, why in {
            "freeze": "adapters are trained",
            "shard": "peft replaces the weights of attentions while they compute, and FSDP2 gathers them",
            "compile": "peft replaces the weights of attentions while they compute",
            "cache_features": "features change with the adapters",
        }.items():
            if getattr(self.train, key):
                raise ValueError(f"lora and train.{key} do not go together ({why}): leave one of them out")
        return self

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str, info: ValidationInfo) -> str:
        if bounded(info) and not (re.fullmatch(r"[A-Za-z0-9._-]{1,200}", name) and name.strip(".")):
            raise PydanticCustomError("name", "must be 1 to 200 letters (a to z), digits, dots, _ or -, not dots alone")
        return name

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name


def load_config(path: str | Path, overrides: Sequence[str] = (), bounds: bool = True) -> Config:
    """Read a TOML file and apply overrides.

    An override of `loss.name` removes the file's whole [loss]: its arguments belong to the objective that it names.

    Args:
        path: a file, or the name of a shipped config, with or without .toml.
        overrides: `section.key=value`, with values in TOML; a bare word is a string.
        bounds: as for `config_from_table`.

    Raises:
        UserError: one line that names the file, the key, and the known names.

    Example:
        >>> load_config("emoji", ["train.epochs=2", "loss.name=clip"]).train.epochs
        2
    """
    table = read_run_table(path)
    if any(override.partition("=")[0].strip() == "loss.name" for override in overrides):
        table["loss"] = {}
    for override in overrides:
        apply_override(table, override, is_text)
    return config_from_table(table, str(path), bounds)


def is_text(key: str) -> bool:
    """Return whether a dotted key takes a string: then `name=2024-05-01` on the command line is not a date."""
    kind: Any = Config
    for part in key.split("."):
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)) or part not in kind.model_fields:
            return False
        kind = kind.model_fields[part].annotation
    return kind is str or str in get_args(kind)


def config_from_table(table: dict[str, Any], source: str, bounds: bool = True) -> Config:
    """Validate a plain table.

    Args:
        table: sections and keys.
        source: named in errors.
        bounds: check ranges too. False for a run of an older version, which may have values that new runs may not have
            (see `out_of_bounds`).

    Raises:
        UserError: an unknown key, a wrong type, a value out of range.
    """
    try:
        return Config.model_validate(table, context=None if bounds else TYPES_ALONE)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error, Config)}") from None


def out_of_bounds(config: Config) -> dict[str, str]:
    """Return dotted key or section → the fault of its value, for a config that was read without `bounds`."""
    try:
        Config.model_validate(config.model_dump())
    except ValidationError as error:
        return {".".join(map(str, fault["loc"])): _message(fault) for fault in error.errors()}
    return {}


def public_table(config: Config) -> dict[str, Any]:
    """Return the config as a plain table, without the credentials of its URLs, to be saved, shown and compared.

    `config_from_table` turns it back into an equal config, except for the credentials.
    """
    table: dict[str, Any] = redacted_table(config.model_dump())
    return table


def dump_config(config: Config) -> str:
    """Return the resolved config as TOML. See `public_table`."""
    return tomli_w.dumps(public_table(config))


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables into one table of dotted keys."""
    result: dict[str, Any] = {}
    for key, value in table.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def defaults() -> dict[str, Any]:
    """Return dotted key → default, for every key that has one; not for an objective's arguments."""
    result: dict[str, Any] = {}
    for name, field in Config.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys = {f"{name}.{key}": inner for key, inner in kind.model_fields.items()}
        else:
            keys = {name: field}
        result |= {key: one.default for key, one in keys.items() if not one.is_required()}
    return result


_MESSAGES = {  # pydantic's kinds of faults, in the words of a TOML file
    "string_type": "must be a string, in quotes",
    "bool_type": "must be true or false",
    "tuple_type": 'must be a list, ["…", "…"]',
    "model_type": "must be a section or table, with keys of its own",
    "dict_type": "must be a section or table, with keys of its own",
}


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return the first fault in one line; an unknown key comes first, with the nearest one that `model` knows."""
    faults = error.errors()
    first = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section: Any = model
        for part in first["loc"][:-1]:
            section = section.model_fields[str(part)].annotation
        return unknown_name("key", where, [".".join([*map(str, first["loc"][:-1]), k]) for k in section.model_fields])
    if first["type"] == "missing":
        return f"key '{where}' is missing"
    return _message(first)


def _message(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    message = _MESSAGES.get(fault["type"], fault["msg"]).removeprefix("Value error, ").replace("Input should", "must")
    if fault["type"] != "value_error":
        return f"key '{where}': {message} {got(fault['input'])}"
    return f"[{where}] {message}" if where else message  # a rule between sections has no place


def got(value: Any) -> str:
    """Return `(got …)` for the end of a message, with the wrong value."""
    shown = str(value) if isinstance(value, (datetime.date, datetime.time)) else repr(value)
    return f"(got {shown if len(shown) <= SHOWN_CHARACTERS else shown[:SHOWN_CHARACTERS] + '…'})"
