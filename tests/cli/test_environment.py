"""`env` prints what a report needs, without credentials; `completion` gives a script that the shell takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib import metadata

import pytest
import torch

from disttempnet import __version__
from disttempnet.cli import environment
from disttempnet.cli.main import main


def test_env_prints_versions_devices_and_settings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdef")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:sentinel-of-endpoint@example.org")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MY_DIARY", "sentinel-of-diary")
    monkeypatch.setenv("SLURM_JWT", "sentinel-of-jwt")
    monkeypatch.setenv("SLURM_JOB_ACCOUNT", "sentinel-of-account")
    monkeypatch.setenv("SLURM_JOB_ID", "12345")
    for name in ("HF_JWT", "NCCL_AUTH", "TORCH_CREDENTIALS", "OMPI_COMM_WORLD_PASS", "HF_SECRET"):
        monkeypatch.setenv(name, f"sentinel-of-{name}")
    assert main(["env", "--json"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text)
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["disttempnet"].startswith(__version__)
    assert found["versions"]["open_clip_torch"][0].isdigit()
    assert found["versions"]["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert set(found["machine"]) == {"system", "C library", "cores", "memory", "cache", "working folder"}
    assert found["devices"]["torch built for"]
    assert found["settings"]["OMP_NUM_THREADS"] == "1"
    assert found["settings"]["HF_TOKEN"] == "***"
    assert found["settings"]["SLURM_JOB_ID"] == "12345"
    assert found["settings"]["HF_JWT"] == "***"
    assert not any(secret in text for secret in ("hf_abcdef", "sentinel-of-"))

    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == ["versions:", "machine:", "devices:", "settings:"]
    assert any(line.split() == ["torch", torch.__version__] for line in lines)


def test_env_of_a_source_that_is_not_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = metadata.distribution

    def distribution(name: str) -> metadata.Distribution:
        if name == "disttempnet":
            raise metadata.PackageNotFoundError(name)
        return original(name)

    # requires() and version() ask it as well
    monkeypatch.setattr(metadata, "distribution", distribution)
    monkeypatch.setattr(environment, "distribution", distribution)
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["disttempnet"].startswith("not installed")
    assert found["versions"]["torch"] == torch.__version__


def test_completion_without_a_shell_says_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "which shell? bash, zsh or tcsh, for example: disttempnet completion bash > ~/" in line


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_a_script_of_the_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "--resume" in script
    assert "disttempnet" in script
    if shutil.which(shell):
        checked = subprocess.run([shell, "-n"], input=script, text=True, capture_output=True, check=False)
        assert checked.returncode == 0, checked.stderr


def test_bash_completes_commands(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    main(["completion", "bash"])
    script = capsys.readouterr().out
    ask = "COMP_WORDS=(disttempnet ev); COMP_CWORD=1; _shtab_disttempnet; echo ${COMPREPLY[@]}"
    done = subprocess.run(["bash"], input=f"{script}\n{ask}\n", text=True, capture_output=True, check=False)
    assert done.stdout.split() == ["evaluate"], done.stderr


INSTEAD = "use WSL (Ubuntu) or Linux (macOS should work, not tested)"


def test_windows_is_refused_in_one_line() -> None:
    code = "import sys; sys.platform = 'win32'\nimport disttempnet.cli.main"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["disttempnet: Windows is not supported; " + INSTEAD]


def test_a_misspelt_command_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian", "demo"]) == 2
    assert "unknown command 'trian'. Did you mean 'train'?" in capsys.readouterr().err
