"""The wheel holds every module and every data file; its command works without a checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cluster.on_ray.jobs import PACKAGES
from trainer.checkout import CHECKOUT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from a copy: a build leaves folders in its tree, and the next wheel would hold them."""
    source = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(CHECKOUT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(source))
    (file,) = folder.glob("switchwork-*.whl")
    return file


def pip(command: str, *arguments: str) -> None:
    offline = [command, "--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", *offline, *arguments], check=True, timeout=120)


def test_every_module_and_every_data_file_is_in_the_wheel(wheel: Path) -> None:
    files = {
        path.relative_to(CHECKOUT).as_posix() for package in PACKAGES for path in (CHECKOUT / package).rglob("*.*")
    }
    wanted = {name for name in files if name.endswith((".py", ".yaml"))}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == wanted


def test_the_installed_command_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip("install", "--target", str(installed), str(wheel))
    environment = os.environ | {"PYTHONPATH": str(installed)}

    def printed(*arguments: str) -> str:
        command = [str(installed / "bin" / "switchwork"), *arguments]
        done = subprocess.run(
            command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    job = str(installed / "launch" / "configs" / "switch_lm_quickstart.yaml")
    assert "prove" in printed("--help")
    assert "Checkpoint: " in printed("plan", job, "--gpu", "h100-80gb")
    assert "name: moe_lm" in printed("train", job, "--dry-run")
    assert not list(elsewhere.iterdir())
