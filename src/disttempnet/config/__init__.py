"""Configuration of a run.

schema.py     every key: its type, range, default and meaning
toml.py       plain tables of TOML files: base files, section.key=value overrides
identity.py   the keys that make two runs different
"""

from disttempnet.config.schema import (
    CONFIG_FOLDER,
    Config,
    DataConfig,
    EvalConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PathOrName,
    Section,
    SourceConfig,
    TrainConfig,
    config_from_table,
    defaults,
    dump_config,
    explain,
    flat,
    is_text,
    load_config,
    out_of_bounds,
    public_table,
)

__all__ = [
    "CONFIG_FOLDER",
    "Config",
    "DataConfig",
    "EvalConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "PathOrName",
    "Section",
    "SourceConfig",
    "TrainConfig",
    "config_from_table",
    "defaults",
    "dump_config",
    "explain",
    "flat",
    "is_text",
    "load_config",
    "out_of_bounds",
    "public_table",
]
