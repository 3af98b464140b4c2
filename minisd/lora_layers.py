"""A linear layer that learns by a low-rank change of its frozen weight (LoRA, arXiv:2106.09685, section 4.1).

    h = W x + (alpha / r) B A x        W [out, in], A = lora_down [r, in], B = lora_up [out, r]

B starts at zero, so at the start the model is the base model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LoRAWeights:
    """One adapter's tensors: down [rank, in], up [out, rank], and alpha. Raises ValueError if they cannot be one."""

    down: Tensor
    up: Tensor
    alpha: float

    def __post_init__(self) -> None:
        if self.down.dim() != 2 or self.up.dim() != 2 or not 0 < len(self.down) == self.up.shape[1]:
            got = f"{list(self.down.shape)} and {list(self.up.shape)}"
            raise ValueError(f"a LoRA is down [rank, in] and up [out, rank], got {got}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"LoRA alpha must be a positive number, got {self.alpha}")

    @property
    def rank(self) -> int:
        """Number of rows of down."""
        return len(self.down)


class LoRAAdapter(nn.Module):
    """The learnt change of one linear layer: [..., in] -> [..., out]. Its weights are float32 copies of those given.

    Attributes:
        rank: r.
        alpha: the change is multiplied by alpha / r.
        dropout: zeroes inputs of the adapter, in training mode only.
        lora_scale: strength at sampling; 1 while training, 0 is exactly the base.
    """

    def __init__(self, weights: LoRAWeights, dropout: float = 0.0) -> None:
        super().__init__()
        self.rank, self.alpha, self.lora_scale = weights.rank, weights.alpha, 1.0
        self.dropout = nn.Dropout(dropout)
        self.lora_down = nn.Linear(weights.down.shape[1], self.rank, bias=False, device="meta")
        self.lora_up = nn.Linear(self.rank, weights.up.shape[0], bias=False, device="meta")
        self.lora_down.weight, self.lora_up.weight = (
            nn.Parameter(tensor.detach().float().clone(memory_format=torch.contiguous_format))
            for tensor in (weights.down, weights.up)
        )

    @property
    def weights(self) -> LoRAWeights:
        """The present weights; the tensors share memory with this module."""
        return LoRAWeights(self.lora_down.weight.detach(), self.lora_up.weight.detach(), self.alpha)

    @property
    def factor(self) -> float:
        """What B A is multiplied by."""
        return self.lora_scale * self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        # Autocast chooses the dtype itself, and a float32 copy of x would be kept for the backward pass.
        if x.dtype != self.lora_down.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_down.weight.dtype)
        change: Tensor = self.lora_up(self.lora_down(self.dropout(x)))
        return self.factor * change


class LoRALinear(nn.Linear):
    """A linear layer with adapters beside it. It shares the base's parameters, so their names stay the checkpoint's."""

    base_weight: Tensor | None

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias  # the objects themselves: nothing is allocated or copied
        self.adapters = nn.ModuleDict()
        # W while it is merged, else None. A buffer, so that it moves with the model, but not into its files.
        self.register_buffer("base_weight", None, persistent=False)
        self.train(base.training)

    @property
    def merged(self) -> bool:
        """Whether `weight` is W' and the adapters are not run."""
        return self.base_weight is not None

    @property
    def active(self) -> list[LoRAAdapter]:
        """The adapters that change something."""
        return [adapter for adapter in map(self.adapter, self.adapters) if adapter.lora_scale != 0]

    def adapter(self, name: str) -> LoRAAdapter:
        """The adapter of that name."""
        adapter = self.adapters[name]
        assert isinstance(adapter, LoRAAdapter)
        return adapter

    def forward(self, input: Tensor) -> Tensor:
        out = F.linear(input, self.weight, self.bias)
        if not self.merged:
            for adapter in self.active:
                out = out + adapter(input).to(out.dtype)
        return out

    @torch.no_grad()
    def merge(self) -> None:
        """Put W' = W + sum (lora_scale * alpha / r) B A in the place of W, summed in float32 and rounded once."""
        assert self.base_weight is None
        total = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32), copy=True)
        for adapter in self.active:
            total += adapter.factor * (adapter.lora_up.weight @ adapter.lora_down.weight)
        self.base_weight, self.weight.data = self.weight.data, total.to(self.weight.dtype)

    def unmerge(self) -> None:
        """Put back W itself; subtracting the change again would leave rounding behind."""
        assert self.base_weight is not None
        self.weight.data, self.base_weight = self.base_weight, None
