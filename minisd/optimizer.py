"""AdamW, with moments of 32 or of 8 bits: made, taken apart into named tensors for a checkpoint, and put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from minisd.errors import CheckpointError, UsageError

# bitsandbytes keeps smaller parameters in 32 bits, and one scale for so many numbers of the others.
_SMALLEST_8BIT = 4096
_BLOCK = 256


def make_optimizer(
    name: str, parameters: list[nn.Parameter], learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101), or the one of bitsandbytes with moments of 8 bits (arXiv:2110.02861).

    torch's is the fused one: an update is one kernel over all parameters instead of a dozen.

    Args:
        name: "adamw" or "adamw8bit".
        parameters: what learns, float32.
        learning_rate: of the first update; the loop sets it anew before each.
        weight_decay: lambda, multiplied by the learning rate.

    Raises:
        UsageError: bitsandbytes is asked for and not installed.
    """
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
    try:
        import bitsandbytes
    except ImportError as error:
        raise UsageError(
            f"--optimizer {name} needs bitsandbytes ({error}). Run pip install bitsandbytes, or use --optimizer adamw."
        ) from error
    return bitsandbytes.optim.AdamW8bit(parameters, lr=learning_rate, weight_decay=weight_decay)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Sequence[tuple[str, nn.Parameter]]
) -> dict[str, Tensor]:
    """Copies of the optimizer's state on the CPU, named "{parameter}/{item}"; empty before the first update.

    Items of torch's AdamW: "step", 0-d float32; "exp_avg" and "exp_avg_sq", in the parameter's shape and dtype.

    Copies, because bitsandbytes lets all parameters share a table, and safetensors stores no tensor twice.
    """
    return {
        f"{name}/{item}": torch.as_tensor(value).detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, parameter in parameters
        for item, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Sequence[tuple[str, nn.Parameter]], tensors: Mapping[str, Tensor]
) -> None:
    """Put the state back. torch's own load_state_dict takes wrong shapes silently and fails a step later.

    Args:
        optimizer: as `make_optimizer` makes it; changed in place.
        parameters: those it was made of, with their names.
        tensors: as `optimizer_tensors` gave them.

    Raises:
        CheckpointError: a tensor is missing, left over, or of another shape.
    """
    expected = {
        f"{name}/{item}": shape
        for name, parameter in parameters
        for item, shape in _state_shapes(optimizer, parameter).items()
    }
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    if found != expected:
        odd = next(key for key in [*expected, *found] if found.get(key) != expected.get(key))
        raise CheckpointError(
            f"optim.safetensors: {odd}: expected shape {expected.get(odd)}, got {found.get(odd)}. "
            "It belongs to another run."
        )
    for name, parameter in parameters:
        items = _state_shapes(optimizer, parameter).keys() - {"step"}
        state = {item: tensors[f"{name}/{item}"].to(parameter.device) for item in items}
        step = tensors[f"{name}/step"]
        # The fused AdamW counts on the device, in a tensor for each parameter; bitsandbytes counts in an int.
        counted = step.to(parameter.device, copy=True) if isinstance(optimizer, torch.optim.AdamW) else int(step)
        optimizer.state[parameter] = {"step": counted, **state}


def _state_shapes(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, tuple[int, ...]]:
    """The items of a parameter's state, and their shapes."""
    shape, count = tuple(parameter.shape), parameter.numel()
    if isinstance(optimizer, torch.optim.AdamW):
        return {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
    moments: dict[str, tuple[int, ...]] = {"step": (), "state1": shape, "state2": shape}
    if count < _SMALLEST_8BIT:
        return moments
    scales = (-(-count // _BLOCK),)
    return moments | {"qmap1": (256,), "qmap2": (256,), "absmax1": scales, "absmax2": scales}
