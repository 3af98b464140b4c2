"""AdamW with moments of 8 bits: it learns, and a stopped run goes on to the bit."""

import pytest

import train
from minisd.errors import CheckpointError
from minisd.run_state import load_optimizer, optimizer_tensors
from tests.e2e.running import ALONE, config_for, metrics_of, state_of
from tests.e2e.test_resume import again, run_until

bitsandbytes = pytest.importorskip("bitsandbytes")


def test_stopped_and_resumed_it_ends_with_the_same_bits(tiny_folder, dataset, tmp_path, monkeypatch):
    """Rank 32: some of the adapters are large enough to have moments of 8 bits, some are not."""
    whole = config_for(
        tiny_folder, dataset, tmp_path / "whole", optimizer="adamw8bit", rank=32, lora_targets="attn+ff",
        max_train_steps=4,
    )  # fmt: skip
    train.train(whole, ALONE)
    halted = again(whole, tmp_path / "halted")
    for stop in (1, 3):
        run_until(halted, stop, monkeypatch)
    train.train(halted, ALONE)
    assert state_of(halted.output, 4) == state_of(whole.output, 4)
    assert metrics_of(halted.output) == metrics_of(whole.output)

    import safetensors.torch
    import torch

    tensors = safetensors.torch.load_file(whole.output / "checkpoints" / "step-000004" / "optim.safetensors")
    assert {tensor.dtype for key, tensor in tensors.items() if "state1" in key} == {torch.uint8, torch.float32}


def test_state_of_another_kind_of_adam_is_refused():
    import torch

    parameter = torch.nn.Parameter(torch.randn(64, 128))
    optimizer = bitsandbytes.optim.AdamW8bit([parameter])
    parameter.square().sum().backward()
    optimizer.step()
    tensors = optimizer_tensors(optimizer, [("w", parameter)])
    with pytest.raises(CheckpointError, match="belongs to another run"):
        load_optimizer(torch.optim.AdamW([parameter]), [("w", parameter)], tensors)
