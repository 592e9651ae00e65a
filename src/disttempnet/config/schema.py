"""Typed configuration of a run: what its TOML file may say (config/toml.py reads it), strictly checked.

Unknown keys and wrong types are refused with the file, the key and the nearest known name. The arguments in
`[loss]` belong to the objective it names: `disttempnet.losses` checks them.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

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
from disttempnet.config.toml import apply_override, read_run
from disttempnet.errors import UserError, unknown_name
from disttempnet.io.paths import Home, expand_home
from disttempnet.io.ranges import BATCH, GIGABYTES, SAMPLES, SEEDS, TYPES_ALONE, WORKERS, Range, bounded, integers
from disttempnet.sanitize import redacted, redacted_table

Place = Annotated[str, Home()]  # a path, or a name that may be one
PlaceOrNone = Annotated[str, Home(empty=True)]  # where nothing has a meaning
STEPS = integers(0, 10**12)
VALIDATION = Range(0, 0.5)  # share of the samples
SHOWN = 60  # characters of a wrong value


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceConfig(Section):
    """One place that training samples come from."""

    path: Place = Field(description="as data.train")
    weight: Annotated[float, Range(0, 1000, above=True)] = Field(
        1.0,
        description="how often an epoch reads each of its samples, on average, with one crop and caption an epoch",
    )
    index: PlaceOrNone = Field("", description="file where the index is written; empty = beside the data")
    caption_key: str = Field(
        "",
        description="key of a sample's .json, or of a listing's rows, that holds its caption or captions; empty = "
        ".txt, and in rows one of caption, captions, title, text",
    )
    cache: PlaceOrNone = Field("", description="remote shards: folder that they are kept in; empty = the user's cache")
    cache_gb: Annotated[float, GIGABYTES] = Field(
        100.0, description="remote shards: gigabytes that they may take in the cache, those of all sources"
    )
    images: PlaceOrNone = Field(
        "", description="listings: folder of relative paths; empty = the listing's or the one above"
    )
    image_key: str = Field("", description="listings: key or column of the image; empty = image, filepath, path, …")
    join_rows: StrictBool = Field(
        True, description="listings: rows of one image are one sample with all their captions; false = a sample a row"
    )


def _source(item: Any, name: str, info: ValidationInfo) -> SourceConfig:
    """Raises ValueError: the first fault, in one line."""
    if not isinstance(item, (dict, SourceConfig)):
        raise ValueError(f"{name} must be a table, {{path = …}} (got {item!r})")
    try:
        return SourceConfig.model_validate(item, context=info.context)
    except ValidationError as error:
        raise ValueError(f"{name}: {explain(error, SourceConfig)}") from None


class DataConfig(Section):
    """Where samples come from, in which order, and how images are augmented."""

    train: str | tuple[SourceConfig, ...] = Field(
        description="training shards: a folder of .tar files, a brace pattern (cc12m/{00000..01242}.tar), "
        "embedded:emoji/train for the data set that ships with the package, or generated:scenes/train for a "
        "synthetic one with a long tail; a listing (.json, .jsonl, .csv, .tsv, .txt, .token, .parquet) or a folder of "
        "images with captions beside them; or a list of sources, [{path = …, weight = …}, …]",
    )
    transform: Literal["open_clip", "tempnet", "emoji"] = Field(
        "open_clip",
        description="open_clip: random crop of 90-100 %; tempnet: crop of 50-100 %, flip, RandAugment(2, 7); "
        "emoji: crop of 60-100 %, no flip (arrows have a direction)",
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
        description=f"what the task validation is measured on: a share of the samples ({VALIDATION}), chosen by hash "
        "and never trained on; or a source of its own, as data.train or as a task (captions:FILE); 0 = nothing",
    )
    limit: Annotated[int, SAMPLES] = Field(0, description="use only the first this many readable samples; 0 = all")

    @field_validator("train", mode="before")
    @classmethod
    def _sources_one_by_one(cls, train: Any, info: ValidationInfo) -> Any:
        """Check each source by itself: a fault in one would be told as one of both kinds that `train` may be."""
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
            return VALIDATION.validated(given, info)
        if not given.strip():
            raise ValueError(f"must be a share {VALIDATION}, or name a source")
        try:
            share = float(given)  # as on a command line
        except ValueError:
            return expand_home(given)
        return VALIDATION.validated(share, info)

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """What `train` names, as a list; `A::B` is open_clip's way to name two."""
        if isinstance(self.train, str):
            return tuple(SourceConfig(path=path) for path in self.train.split("::"))
        return self.train

    @property
    def about(self) -> str:
        """What `train` names, in words."""
        return redacted(", ".join(source.path for source in self.sources))

    @model_validator(mode="after")
    def _batch_divides_into_lanes(self, info: ValidationInfo) -> DataConfig:
        if bounded(info) and self.global_batch % self.lanes:
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of lanes {self.lanes}; choose lanes that divide it"
            )
        return self


class ModelConfig(Section):
    """The towers, and what they start from."""

    name: Place = Field(
        description="an open_clip architecture, one of the package's own, a JSON file with one, or a place with its "
        "weights: hf-hub:ORG/NAME, local-dir:FOLDER"
    )
    pretrained: PlaceOrNone = Field(
        "",
        description="what to start from: an open_clip tag, a file of weights, a checkpoint folder, a run folder (its "
        "best checkpoint), hf-hub:ORG/NAME or local-dir:FOLDER; empty = random",
    )
    image_pretrained: PlaceOrNone = Field(
        "", description="weights of a timm image tower alone: a file, or a name (resnet50.tv_in1k) to download"
    )
    text_pretrained: PlaceOrNone = Field(
        "", description="weights of a Hugging Face text tower alone: a folder, or a name (distilbert-base-uncased)"
    )
    resize_positions: StrictBool = Field(
        False,
        description="take weights of another image size all the same: interpolate their position embeddings",
    )
    lock_image: StrictBool = Field(False, description="keep the image tower as it is, but for a projection laid on it")
    unlocked_image_groups: Annotated[int, integers(0, 1000)] = Field(
        0, description="last groups of layers of a locked image tower that are trained"
    )
    lock_text: StrictBool = Field(False, description="keep the text tower as it is, but for a projection laid on it")
    unlocked_text_layers: Annotated[int, integers(0, 1000)] = Field(
        0, description="last layers of a locked text tower that are trained"
    )
    batch_norm: Literal["global", "frozen"] = Field(
        "global",
        description="global: BatchNorm takes the statistics of the global batch, whatever the world size; "
        "frozen: those of the weights it starts from",
    )

    @model_validator(mode="after")
    def _weights_of_one_place(self) -> ModelConfig:
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


class LossConfig(BaseModel):
    """`name` and the arguments of that objective; `disttempnet.losses.build_loss` checks them."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class OptimConfig(Section):
    """AdamW for the towers: linear warm-up, then a cosine. The temperature's own rate is in [loss]."""

    lr: Annotated[float, Range(0, 10, above=True)]
    weight_decay: Annotated[float, Range(0, 10)] = Field(
        0.02, description="on matrices only: not on gains, biases, embeddings' scale"
    )
    beta1: Annotated[float, Range(0, 1, below=True)] = 0.9
    beta2: Annotated[float, Range(0, 1, below=True)] = 0.98
    eps: Annotated[float, Range(0, 1, above=True)] = 1e-6
    warmup_steps: Annotated[int, STEPS] = Field(
        0, description="steps over which the rate rises to lr; a warm-up that the run does not outlast is shortened"
    )
    lr_end: Annotated[float, Range(0, 10)] = Field(0.0, description="where the cosine ends; at most lr")
    grad_clip: Annotated[float, Range(0, 10**6)] = Field(
        0.0, description="largest gradient norm of the towers (frozen: of the rest); 0 = none"
    )

    @model_validator(mode="after")
    def _falls(self, info: ValidationInfo) -> OptimConfig:
        if bounded(info) and self.lr_end > self.lr:
            raise ValueError(f"lr_end {self.lr_end:g} is above lr {self.lr:g}: the cosine falls; set optim.lr_end too")
        return self


class TrainConfig(Section):
    """How long, how precise, what is trained, what is saved when."""

    epochs: Annotated[int, integers(1, 10**6)]
    freeze: Literal["", "towers"] = Field(
        "", description="towers: keep those of model.pretrained as they are and train the temperature only"
    )
    seed: Annotated[int, SEEDS] = 2024
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto = bf16 autocast on a GPU, else fp32")
    compile: StrictBool = Field(False, description="torch.compile the towers")
    accumulate: Annotated[int, integers(1, 65_536)] = Field(
        1,
        description="embed a process's part of a batch in this many chunks: the gradient of the whole batch with the "
        "memory of a chunk, for a second forward pass of the towers",
    )
    shard: StrictBool = Field(
        False,
        description="share parameters, gradients and moments of the towers out over the processes (FSDP2), for towers "
        "that outgrow a GPU: less memory, half as much communication again",
    )
    log_every: Annotated[int, integers(1, 10**6)] = Field(10, description="steps between lines of metrics.jsonl")
    checkpoint_every: Annotated[int, STEPS] = Field(0, description="steps between checkpoints; 0 = once an epoch")
    keep: Annotated[int, integers(1, 10**6)] = Field(2, description="how many of the latest checkpoints stay")
    stop_after_steps: Annotated[int, STEPS] = Field(
        0, description="end early at this step, schedules unchanged; 0 = full length"
    )
    timeout_minutes: Annotated[float, Range(0, 10_080, above=True)] = Field(
        10.0, description="how long a rank waits for the others"
    )

    @model_validator(mode="after")
    def _shares_out_what_is_trained(self) -> TrainConfig:
        if self.shard and self.freeze:
            raise ValueError(f'shard is for towers that are trained: leave it out beside freeze = "{self.freeze}"')
        if self.shard and self.compile:
            raise ValueError("shard and compile do not go together: leave one of them out")
        return self


class EvalConfig(Section):
    """What is measured during and after training."""

    tasks: tuple[Place, ...] = Field(
        (), description="rows of evaluation/tasks.toml, or folder:PATH, shards:SPEC, captions:FILE"
    )
    data_root: PlaceOrNone = Field("", description="folder of the data of DataComp's tasks; see docs/evaluation.md")
    every_epochs: Annotated[int, integers(1, 10**6)] = 1
    batch: Annotated[int, BATCH] = Field(256, description="images a forward pass")


class Config(Section):
    """A whole run."""

    name: str = Field(description="name of the run; its folder is OUT/name")
    out: Place = Field("runs", description="folder of run folders")
    data: DataConfig
    model: ModelConfig
    loss: LossConfig
    optim: OptimConfig
    train: TrainConfig
    eval: EvalConfig = Field(default_factory=EvalConfig)

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
    """Read a TOML file and apply `section.key=value` overrides (values in TOML; a bare word is a string).
    A bare name that is no file may be that of a shipped config, with or without .toml.

    An override of `loss.name` takes the file's whole [loss] out: its arguments belong to the objective it names.
    `bounds` as for `config_from_table`.

    Raises:
        UserError: one line that names the file, the key, and what is known.
    """
    table = read_run(path)
    if any(override.partition("=")[0].strip() == "loss.name" for override in overrides):
        table["loss"] = {}
    for override in overrides:
        apply_override(table, override, is_text)
    return config_from_table(table, str(path), bounds)


def is_text(key: str) -> bool:
    """Whether a dotted key takes a string: on the command line `name=2024-05-01` is that string, and no date."""
    kind: Any = Config
    for part in key.split("."):
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)) or part not in kind.model_fields:
            return False
        kind = kind.model_fields[part].annotation
    return kind is str or str in get_args(kind)


def config_from_table(table: dict[str, Any], source: str, bounds: bool = True) -> Config:
    """Validate a plain table; `source` names it in errors.

    Without `bounds` only types and names of keys are checked: a run of an older version may hold values that this one
    allows in no new run (see `out_of_bounds`).
    """
    try:
        return Config.model_validate(table, context=None if bounds else TYPES_ALONE)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error, Config)}") from None


def out_of_bounds(config: Config) -> dict[str, str]:
    """Dotted key or section → what is wrong with its value, of a config that was read without `bounds`."""
    try:
        Config.model_validate(config.model_dump())
    except ValidationError as error:
        return {".".join(map(str, fault["loc"])): _told(fault) for fault in error.errors()}
    return {}


def public_table(config: Config) -> dict[str, Any]:
    """The config as a plain table, without the credentials of its URLs: what is kept, shown and compared of a run.

    `load_config` and `config_from_table` take it back to an equal config, except for these.
    """
    table: dict[str, Any] = redacted_table(config.model_dump())
    return table


def dump_config(config: Config) -> str:
    """The resolved config as TOML. See `public_table`."""
    table = public_table(config)
    lines = [f"{key} = {_toml(value)}" for key, value in table.items() if not isinstance(value, dict)]
    for key, section in table.items():
        if isinstance(section, dict):
            lines += ["", f"[{key}]", *(f"{k} = {_toml(v)}" for k, v in section.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, (bool, str)):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one table of dotted keys."""
    result: dict[str, Any] = {}
    for key, value in table.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def defaults() -> dict[str, Any]:
    """Dotted key → default, of every key that has one; those of an objective's arguments are not known here."""
    result: dict[str, Any] = {}
    for name, field in Config.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys = {f"{name}.{key}": inner for key, inner in kind.model_fields.items()}
        else:
            keys = {name: field}
        result |= {key: one.default for key, one in keys.items() if not one.is_required()}
    return result


_KINDS = {  # pydantic's kinds of faults, in the words of a TOML file
    "string_type": "must be a string, in quotes",
    "bool_type": "must be true or false",
    "tuple_type": 'must be a list, ["…", "…"]',
    "model_type": "must be a section or table, with keys of its own",
    "dict_type": "must be a section or table, with keys of its own",
}


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first fault in one line, an unknown key before all: it names the nearest one that `model` knows."""
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
    return _told(first)


def _told(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    message = _KINDS.get(fault["type"], fault["msg"]).removeprefix("Value error, ").replace("Input should", "must")
    return (
        f"[{where}] {message}" if fault["type"] == "value_error" else f"key '{where}': {message} {got(fault['input'])}"
    )


def got(value: Any) -> str:
    """What was found in place of something else, for the end of a line."""
    shown = str(value) if isinstance(value, (datetime.date, datetime.time)) else repr(value)
    return f"(got {shown if len(shown) <= SHOWN else shown[:SHOWN] + '…'})"
