"""Laws of the collectives, under real process groups (gloo): every rank has the same, in the same order."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from datetime import timedelta
from multiprocessing.queues import Queue
from typing import Any

import pytest
import torch
import torch.distributed

from minisd.distributed import (
    Distributed,
    gather,
    gather_shares,
    process_group,
    set_timeout,
    sum_gradients,
    sum_over_ranks,
    wait_for_all,
)
from minisd.errors import UsageError

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What a rank may have to tell: text of any script, half a surrogate pair (of a file name), numbers, nesting, nothing.
VALUES = ["caf\xe9 \u732b \U0001f408", "\udce9.png", "", "x" * 10_000, [], {"a": [1, 2.5, None, True]}, -(2**70), 0.1]
SHAPES = [(3, 4), (5,), (2, 2, 2)]


def _gradients(rank: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(rank)
    parameters = []
    for shape in SHAPES:
        parameter = torch.nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.randn(shape, generator=generator)
        parameters.append(parameter)
    parameters[0].grad = parameters[0].grad.T.contiguous().T if parameters[0].grad is not None else None
    return parameters


def _rank(rank: int, world_size: int, store: str, answers: Queue[str]) -> None:
    """Everything at once, for a process takes seconds to start."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    host, port = store.split(":")
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": port}
    told: dict[str, Any] = {}
    with process_group(60.0) as dist:
        told["where"] = (dist.rank, dist.world_size, dist.is_main, str(dist.device))
        told["backend"] = torch.distributed.get_backend()
        told["gathered"] = [gather(dist, [rank, value]) for value in VALUES]
        told["uneven"] = gather(dist, "y" * 1000 * rank)
        told["shares"] = [gather_shares(dist, list(range(n))[rank::world_size]) for n in range(8)]
        parameters = _gradients(rank)
        before = [parameter.grad for parameter in parameters]
        sum_gradients(dist, parameters)
        told["in place"] = all(a is p.grad for a, p in zip(before, parameters, strict=True))
        told["gradients"] = [p.grad.tolist() for p in parameters if p.grad is not None]
        own = torch.tensor([float(rank), 1.0])
        told["sum"] = sum_over_ranks(dist, own).tolist()
        told["unchanged"] = own.tolist() == [float(rank), 1.0]
        set_timeout(dist, 5.0)
        group = torch.distributed.distributed_c10d._get_default_group()
        told["timeout"] = group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=5)
        wait_for_all(dist)
    told["left"] = not torch.distributed.is_initialized()
    answers.put(json.dumps(told))


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.fixture(scope="module", params=[2, 3])
def told(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each rank of a group of two, and of one of three, says."""
    context = multiprocessing.get_context("fork")
    answers: Queue[str] = context.Queue()
    store = f"127.0.0.1:{_free_port()}"
    ranks = [context.Process(target=_rank, args=(rank, request.param, store, answers)) for rank in range(request.param)]
    for process in ranks:
        process.start()
    found = [json.loads(answers.get(timeout=60)) for _ in ranks]
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    return sorted(found, key=lambda answer: answer["where"][0])


def test_every_rank_knows_its_place(told: list[dict[str, Any]]) -> None:
    world_size = len(told)
    for rank, answer in enumerate(told):
        assert answer["where"] == [rank, world_size, rank == 0, "cpu"]
        assert answer["backend"] == "gloo"
        assert answer["left"]


def test_what_is_gathered_is_in_the_order_of_the_ranks_on_all(told: list[dict[str, Any]]) -> None:
    wanted = [[[rank, value] for rank in range(len(told))] for value in VALUES]
    for answer in told:
        assert answer["gathered"] == wanted
        assert answer["uneven"] == ["y" * 1000 * rank for rank in range(len(told))]


def test_shares_are_put_together_again_however_uneven(told: list[dict[str, Any]]) -> None:
    """Also where a rank has none, or no rank has any."""
    for answer in told:
        assert answer["shares"] == [list(range(n)) for n in range(8)]


def test_gradients_are_added_in_place_and_equal_on_all(told: list[dict[str, Any]]) -> None:
    parts = [[p.grad for p in _gradients(rank)] for rank in range(len(told))]
    for number in range(len(SHAPES)):
        wanted = sum(part[number].double() for part in parts if part[number] is not None)  # type: ignore[union-attr]
        assert isinstance(wanted, torch.Tensor)
        for answer in told:
            assert answer["in place"]
            got = torch.tensor(answer["gradients"][number], dtype=torch.float64)
            assert torch.allclose(got, wanted, rtol=0, atol=1e-6)
            assert answer["gradients"][number] == told[0]["gradients"][number]  # to the bit


def test_a_sum_over_ranks_leaves_the_parts_alone(told: list[dict[str, Any]]) -> None:
    world_size = len(told)
    assert all(answer["sum"] == [world_size * (world_size - 1) / 2, world_size] for answer in told)
    assert all(answer["unchanged"] for answer in told)


def test_the_timeout_is_changed(told: list[dict[str, Any]]) -> None:
    assert all(answer["timeout"] for answer in told)


# --- alone ---


@pytest.fixture
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.usefixtures("no_torchrun")
def test_alone_there_is_nobody_to_ask() -> None:
    with process_group() as dist:
        assert (dist.rank, dist.world_size, dist.is_main) == (0, 1, True)
        assert not torch.distributed.is_initialized()
    alone = Distributed(0, 1, torch.device("cpu"))
    assert gather(alone, "x") == ["x"]
    assert gather_shares(alone, (3, 1, 2)) == [3, 1, 2]
    parameters = _gradients(0)
    sum_gradients(alone, parameters)
    for parameter, wanted in zip(parameters, _gradients(0), strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, wanted.grad if wanted.grad is not None else torch.zeros(0))
    assert sum_over_ranks(alone, torch.tensor(2.0)).item() == 2
    wait_for_all(alone)
    set_timeout(alone, 1.0)


def test_a_missing_gradient_is_our_own_bug() -> None:
    """On one rank only, it would shift all that follow."""
    parameters = _gradients(0)
    parameters[1].grad = None
    with pytest.raises(AssertionError):
        sum_gradients(Distributed(0, 1, torch.device("cpu")), parameters)


@pytest.mark.parametrize(
    "given",
    [
        {"WORLD_SIZE": "2"},
        {"RANK": "0"},
        {"LOCAL_RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "x", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "-1", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "", "RANK": "0", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},  # and nowhere to meet
        {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
        {"WORLD_SIZE": "0", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
    ],
)
def test_half_an_environment_of_torchrun_is_a_usage_error(
    no_torchrun: pytest.MonkeyPatch, given: dict[str, str]
) -> None:
    for name, value in given.items():
        no_torchrun.setenv(name, value)
    with pytest.raises(UsageError, match=r"WORLD_SIZE=.*torchrun") as caught, process_group():
        pass
    assert caught.value.exit_code == 2
    assert not torch.distributed.is_initialized()
