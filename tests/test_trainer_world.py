"""A process joins its ranks at a port that nobody can take, and leaves no trace."""

import os
import socket
from typing import Any

import pytest
import torch
from distributed import run_distributed

from trainer.world import RANK_VARIABLES, joined, open_rendezvous


def test_one_rank_needs_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port in the environment that another process holds does not end a run of one process."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with joined("cpu") as world:
            assert (world.rank, world.size) == (0, 1)
            assert world.sum(torch.ones(2)).tolist() == [1.0, 1.0]


def test_the_environment_is_as_before() -> None:
    """What is left over would tell child processes that they are ranks of that world."""
    before = {name: os.environ.get(name) for name in RANK_VARIABLES}
    for _ in range(2):
        with joined("cpu"):
            assert os.environ["WORLD_SIZE"] == "1"
        assert {name: os.environ.get(name) for name in RANK_VARIABLES} == before


def test_the_environment_is_as_before_when_joining_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = {name: os.environ.get(name) for name in RANK_VARIABLES}
    with pytest.raises(ValueError, match="sees no GPU"), joined("cuda"):
        pass
    assert {name: os.environ.get(name) for name in RANK_VARIABLES} == before


def test_the_port_is_taken_before_it_is_known() -> None:
    store, address = open_rendezvous("127.0.0.1")
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind((address["MASTER_ADDR"], int(address["MASTER_PORT"])))
    del store


def ranks_of(world: Any) -> list[int]:
    ranks: list[int] = world.gather(world.rank)
    return ranks


def test_ranks_meet_at_the_open_store() -> None:
    assert run_distributed(ranks_of, 2) == [[0, 1], [0, 1]]
