"""The first code's commands become the settings of the shipped configs of its runs, key by key."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from disttempnet.config import Config, config_from_table, load_config
from disttempnet.config.schema import flat
from disttempnet.errors import UserError
from disttempnet.losses import OBJECTIVES
from disttempnet.migrate.command import Migration, migrate
from disttempnet.migrate.first_code import FIRST_CODE_FLAGS
from disttempnet.training.model import resolved
from tests.migrate.scripts import CC3M, FOUNDING

OF_THE_JOB = {"--ntasks", "--ntasks-per-node", "--nodes", "--gres", "--time", "--partition"}
VIT = "--image_encoder ViT --text_encoder Transformer"
MINE = {"name", "out", "data.train"}  # what depends on the user's disk, not on the experiment


def read(result: Migration, folder: Path) -> Config:
    """Return the config in the written file, through the project's own reader."""
    path = folder / "run.toml"
    path.write_text(result.text, encoding="utf-8")
    return load_config(path)


def keys(config: Config) -> dict[str, Any]:
    """Return every key, with the objective's defaults filled in."""
    return flat(resolved(config).model_dump())


def call(*words: str) -> Migration:
    common = "--data cc12m --train-data x.tar --output_dir out/mine --world_size 2 --batch_size_train 8"
    return migrate(f"srun python clip_cc12m.py {common} {' '.join(words)}", "s.sh")


def test_the_founding_command_gives_the_shipped_config(tmp_path: Path) -> None:
    found = keys(read(migrate(FOUNDING, "train.sbatch"), tmp_path))
    shipped = keys(load_config("cc12m_vitb32_v0"))
    assert found.keys() == shipped.keys()
    for key in found.keys() - MINE:
        assert found[key] == shipped[key], key
    assert found["data.train"] == "/path/to/your/data/cc12m/{00000..01242}.tar"
    assert (found["out"], found["name"]) == ("output", "TempNet_ViT_cc12m_gamma0.8_rho9.5_isogclr_tempnet")


def test_the_founding_job_becomes_a_launch() -> None:
    result = migrate(FOUNDING, "train.sbatch", out="run.toml")
    wanted = "disttempnet launch run.toml --nodes 4 --gpus 2 --time 40:00:00 --partition gpu"
    assert result.settings.commands[0] == wanted
    assert result.processes == 8


def test_the_cc3m_command_gives_the_shipped_config_but_for_what_its_head_says(tmp_path: Path) -> None:
    found = keys(read(migrate(CC3M, "cc3m.sh"), tmp_path))
    shipped = keys(load_config("cc3m_rn50_distilbert"))
    differing = {key for key in shipped.keys() - MINE if found[key] != shipped[key]}
    assert differing == {"train.seed"}, "the script leaves the seed at 42, the shipped config has 2024"
    assert found["data.train"][0]["images"] == "/scratch/cc3m"


def test_every_given_flag_is_named_in_the_file() -> None:
    for script in (FOUNDING, CC3M):
        text = migrate(script, "s.sh").text
        for word in script.split():
            if word.startswith("--") and "#SBATCH" not in word:
                name = word.partition("=")[0]
                assert name in text or name in OF_THE_JOB


@pytest.mark.parametrize("name", sorted(FIRST_CODE_FLAGS))
def test_no_flag_is_silent(name: str) -> None:
    flag = FIRST_CODE_FLAGS[name]
    sample = {bool: "", int: "4", float: "0.5", str: "name"}[flag.kind]
    fixed = {"--ita_type": "sogclr", "--min_lr": "1e-6"}
    words = [name, fixed.get(name, sample)]
    objective = [] if name == "--ita_type" else ["--ita_type", "isogclr_tempnet"]
    if name == "--personalized_tau":
        objective = ["--ita_type", "clip", "--learnable_temp"]
    assert name in call(*objective, *words).text.replace("# Written", "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("clip --temp 0.05", {"name": "clip-constant", "temperature": 0.05}),
        ("clip --learnable_temp", {"name": "clip", "temperature": 0.01, "tau_min": 0.001, "tau_max": 0.5}),
        ("clip --learnable_temp --personalized_tau --lr 1e-3", {"name": "clip-per-sample", "tau_lr": 1e-3}),
        ("cyclip --temp 0.05", {"name": "cyclip", "temperature": 0.05}),
        ("vicreg --vicreg_std_coeff 5", {"name": "vicreg", "variance": 5.0, "invariance": 25.0}),
        ("sogclr --sogclr_gamma 0.9 --temp 0.03", {"name": "sogclr", "gamma": 0.9, "temperature": 0.03}),
        ("isogclr --rho 6 --tau_init 0.5", {"name": "isogclr", "rho": 6.0, "temperature": 0.01, "tau_lr": 0.03}),
        ("onlineclr", {"name": "onlineclr", "gamma": 0.8, "temperature": 0.01}),
        ("isogclr_tempnet", {"name": "disttempnet", "rho": 8.0, "tau_lr": 6e-6, "prototypes": 8}),
    ],
)
def test_objectives(words: str, expected: dict[str, Any], tmp_path: Path) -> None:
    config = read(call("--ita_type", words), tmp_path)
    found = {"name": config.loss.name, **config.loss.arguments}
    assert {key: found[key] for key in expected} == expected
    assert config.loss.name in OBJECTIVES
    resolved(config)


def test_what_the_code_hard_codes_and_leaves_out_is_said(tmp_path: Path) -> None:
    result = call("--ita_type", "isogclr", "--tau_init", "0.02", "--use_amp", VIT)
    text = result.text
    assert "--tau_init 0.02: the code never passes it on" in text
    assert "--lr left out: 0.0002 there" in text
    assert tomllib.loads(text)["train"]["precision"] == "auto"
    assert read(result, tmp_path).optim.warmup_steps == 2000


def test_the_advice_for_v1_is_a_config_that_trains(tmp_path: Path) -> None:
    result = call("--ita_type", "isogclr_tempnet", VIT)
    (advice,) = (line for line in result.settings.differs if line.startswith("v1 of the code"))
    assert all(part in advice for part in ("gamma_min in place of gamma", "gamma_decay_epochs = 20.0"))
    table = tomllib.loads(result.text)
    loss = table["loss"]
    loss |= {"name": "disttempnet-v1", "gamma_min": loss.pop("gamma"), "gamma_decay_epochs": 20.0}
    loss |= {"tau_initial": 0} if "tau_initial = 0" in advice else {}
    resolved(config_from_table(table, "advice"))


def test_another_size_or_width_than_the_architecture_has_is_said() -> None:
    text = call("--ita_type", "sogclr", VIT, "--image_res", "256").text
    assert "--image_res 256: ViT-B-32 has 224" in text
    text = call("--ita_type", "sogclr").text
    assert "RN50-DistilBERT has 256; for 512 name a JSON" in " ".join(text.replace("#", "").split())


def test_towers_that_no_shipped_architecture_joins_are_to_be_filled_in(tmp_path: Path) -> None:
    result = call("--ita_type", "sogclr", "--text_encoder", "roberta-large")
    assert "no shipped architecture joins resnet50 and roberta-large" in " ".join(result.text.replace("#", "").split())
    assert read(result, tmp_path).model.name == "architecture.json"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ita_type", "sogclrr"], "unknown --ita_type 'sogclrr'. Did you mean 'sogclr'"),
        ([], "--ita_type is missing"),
        (["--ita_type", "clip", "--personalized_tau"], "without --learnable_temp"),
        (["--ita_type", "sogclr", "--lr", "$lr"], "lr is set nowhere in the script: add lr=VALUE"),
        (["--ita_type", "sogclr", "--lr", "99"], "optim.lr"),
        (["--ita_type", "isogclr", "--rho", "0"], r"\[loss\] objective isogclr: rho"),
    ],
)
def test_faults_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call(*words)
    assert "\n" not in str(caught.value)


def test_other_processes_than_the_flag_says_are_said() -> None:
    words = "--train-data x.tar --ita_type sogclr --world_size 8"
    text = migrate(f"torchrun --nproc_per_node 3 clip_cc12m.py {words}", "s").text
    assert tomllib.loads(text)["data"] == {
        "train": "x.tar", "transform": "tempnet", "global_batch": 768, "lanes": 6, "workers": 6,
    }  # fmt: skip
    assert "--world_size 8, but 3 processes: those count" in text
