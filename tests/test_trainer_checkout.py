"""The one constant for the place of the code: programs, copies and git commands start from it."""

from cluster.on_ray.jobs import PACKAGES
from launch.prove import moe as prove_moe
from launch.prove import thought as prove_thought
from trainer.checkout import CHECKOUT
from trainer.parsing import read_job


def test_the_checkout_is_the_folder_of_pyproject_and_of_all_packages() -> None:
    assert (CHECKOUT / "pyproject.toml").is_file()
    assert all((CHECKOUT / package / "__init__.py").is_file() for package in PACKAGES)


def test_the_recipes_of_the_proofs_are_job_files() -> None:
    for recipe in (prove_moe.RECIPE, prove_thought.RECIPE):
        assert "run" in read_job(recipe)
