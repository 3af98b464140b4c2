"""A layer that learns by a low-rank change of its frozen weight (LoRA, arXiv:2106.09685, section 4.1).

    h = W x + (alpha / r) B A x        W [out, in], A = lora_down [r, in], B = lora_up [out, r]

that is h = W' x with the changed weight W' = W + (alpha / r) B A.

For a convolution, A is one of the same kernel and stride, [r, in, kh, kw], and B one of 1 x 1, [out, r, 1, 1]: B A is
again a product of two matrices, [out, r] and [r, in * kh * kw]. B starts at zero, so at the start the model is the base
model.

DoRA (arXiv:2402.09353, equation 5) learns the length m of each row of the changed weight as well:

    W' = m (W + (alpha / r) B A) / ||W + (alpha / r) B A||        m [out], one norm for each output
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LoRAWeights:
    """One adapter's tensors and alpha. Raises ValueError if they cannot be one.

    Attributes:
        down: [rank, in], or [rank, in, kh, kw] for a convolution.
        up: [out, rank], or [out, rank, 1, 1] for a convolution.
        alpha: the change is multiplied by alpha / rank.
        magnitude: [out] of DoRA, the length of each row of the changed weight; None is a plain LoRA.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    def __post_init__(self) -> None:
        down, up = self.down.shape, self.up.shape
        if not (len(down) == len(up) and tuple(up[2:]) in ((), (1, 1)) and len(up) > 1 and 0 < down[0] == up[1]):
            got = f"{list(down)} and {list(up)}"
            raise ValueError(
                f"a LoRA is down [rank, in] and up [out, rank], or [rank, in, kh, kw] and [out, rank, 1, 1], got {got}"
            )
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"LoRA alpha must be a positive number, got {self.alpha}")
        if self.magnitude is not None and self.magnitude.shape != up[:1]:
            raise ValueError(f"DoRA's magnitude is [{up[0]}], one for each output, got {list(self.magnitude.shape)}")

    @property
    def rank(self) -> int:
        """Number of rows of down."""
        return len(self.down)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight this is for: [out, in] or [out, in, kh, kw]."""
        return (len(self.up), *self.down.shape[1:])

    def product(self, dtype: torch.dtype) -> Tensor:
        """B A in the weight's shape, multiplied in this dtype."""
        return (self.up.to(dtype).flatten(1) @ self.down.to(dtype).flatten(1)).reshape(self.shape)

    def change(self, weight: Tensor) -> Tensor:
        """W' - W for a weight W of this shape, in its dtype."""
        change = self.alpha / self.rank * self.product(weight.dtype)
        if self.magnitude is None:
            return change
        total = weight + change
        norm = total.flatten(1).norm(dim=1)
        scale = torch.where(norm > 0, self.magnitude.to(weight.dtype) / norm, 0)  # a row of zeros has no direction
        return scale.reshape(-1, *(1 for _ in self.shape[1:])) * total - weight


class LoRAAdapter(nn.Module):
    """The learnt change of one layer. Its weights are float32 copies of those given; LoRALayer runs it.

    Attributes:
        lora_down: A, float32 [r, in] or [r, in, kh, kw].
        lora_up: B, float32 [out, r] or [out, r, 1, 1].
        rank: r.
        alpha: the change is multiplied by alpha / r.
        dropout: zeroes inputs of the adapter, in training mode only.
        lora_scale: strength at sampling; 1 while training, 0 is exactly the base.
        magnitude: [out] of DoRA, else None. Such an adapter is for sampling and merging, not for training.
    """

    magnitude: Tensor | None

    def __init__(self, weights: LoRAWeights, dropout: float = 0.0) -> None:
        super().__init__()
        self.rank, self.alpha, self.lora_scale = weights.rank, weights.alpha, 1.0
        self.dropout = nn.Dropout(dropout)
        self.lora_down, self.lora_up = (
            nn.Parameter(tensor.detach().float().clone(memory_format=torch.contiguous_format))
            for tensor in (weights.down, weights.up)
        )
        # A buffer, because it is not trained: it moves with the model.
        magnitude = None if weights.magnitude is None else weights.magnitude.detach().float().clone()
        self.register_buffer("magnitude", magnitude, persistent=False)

    @property
    def weights(self) -> LoRAWeights:
        """The present weights; the tensors share memory with this module."""
        return LoRAWeights(self.lora_down.detach(), self.lora_up.detach(), self.alpha, self.magnitude)

    @property
    def factor(self) -> float:
        """What B A is multiplied by."""
        return self.lora_scale * self.alpha / self.rank


class LoRALayer(nn.Module):
    """A layer with adapters beside it. It shares the base's parameters, so their names stay the checkpoint's.

    The float32 weights of an adapter are cast to the layer's dtype, never the activations to float32: those are larger,
    and a float32 copy would be kept for the backward pass. Gradients arrive at the float32 weights through the cast.
    """

    weight: Tensor
    adapters: nn.ModuleDict
    base_weight: Tensor | None

    def take_over(self, base: nn.Linear | nn.Conv2d) -> None:
        """Start without adapters, on the parameters of a layer."""
        self.adapters = nn.ModuleDict()
        # W while it is merged, else None. A buffer, so that it moves with the model, but not into its files.
        self.register_buffer("base_weight", None, persistent=False)
        _share_parameters(base, self)

    @property
    def merged(self) -> bool:
        """Whether `weight` is W' and the adapters are not run."""
        return self.base_weight is not None

    @property
    def active(self) -> list[LoRAAdapter]:
        """The adapters that are run: none while they are merged, nor one that changes nothing."""
        adapters = [] if self.merged else [self.adapter(name) for name in self.adapters]
        return [adapter for adapter in adapters if adapter.lora_scale != 0]

    def adapter(self, name: str) -> LoRAAdapter:
        """The adapter of that name."""
        adapter = self.adapters[name]
        assert isinstance(adapter, LoRAAdapter)
        return adapter

    @torch.no_grad()
    def changed_weight(self) -> Tensor:
        """W + sum lora_scale (W' - W) over the active adapters, in W's shape, summed in float32 and rounded once.

        So strength 0 is exactly the base and 1 is what the adapter was trained to be; of DoRA, whose W' is not linear
        in the strength, ComfyUI takes this line between the two as well.
        """
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        total = weight.clone()
        for adapter in self.active:
            if adapter.magnitude is None:
                total += adapter.factor * adapter.weights.product(total.dtype)
            else:
                total += adapter.lora_scale * adapter.weights.change(weight)
        return total.to(self.weight.dtype)

    def merge(self) -> None:
        """Put the changed weight in the place of W."""
        assert self.base_weight is None
        self.base_weight, self.weight.data = self.weight.data, self.changed_weight()

    def unmerge(self) -> None:
        """Put back W itself; subtracting the change again would leave rounding behind."""
        assert self.base_weight is not None
        self.weight.data, self.base_weight = self.base_weight, None


class LoRALinear(LoRALayer, nn.Linear):
    """A linear layer with adapters: [..., in] -> [..., out]."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.take_over(base)

    def plain(self) -> nn.Linear:
        """The layer it was made of."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        _share_parameters(self, layer)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        active = self.active
        if not active:
            return F.linear(input, self.weight, self.bias)
        if any(adapter.magnitude is not None for adapter in active):
            return F.linear(input, self.changed_weight(), self.bias)  # its norms need the whole product
        x = input.reshape(-1, self.in_features)
        # In another memory layout torch rounds the bias in otherwise: there, too, a new adapter must change no bit.
        out = F.linear(x if input.is_contiguous() else input, self.weight, self.bias)
        if out.dim() != 2:
            out = out.reshape(-1, self.out_features)
        for adapter in active:
            hidden = adapter.dropout(x) @ adapter.lora_down.to(out.dtype).T
            # Product, factor and sum in one kernel, in place: small kernels cost a GPU their launch, not their work.
            out = out.addmm_(hidden, adapter.lora_up.to(out.dtype).T, alpha=adapter.factor)
        return out.view(*input.shape[:-1], self.out_features)


class LoRAConv2d(LoRALayer, nn.Conv2d):
    """A convolution with adapters: [B, C_in, H, W] -> [B, C_out, H', W']."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__(**_conv_settings(base))
        self.take_over(base)

    def plain(self) -> nn.Conv2d:
        """The layer it was made of."""
        layer = nn.Conv2d(**_conv_settings(self))
        _share_parameters(self, layer)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        active = self.active
        if any(adapter.magnitude is not None for adapter in active):
            return self._conv_forward(input, self.changed_weight(), self.bias)
        out = self._conv_forward(input, self.weight, self.bias)
        for adapter in active:
            hidden = self._conv_forward(adapter.dropout(input), adapter.lora_down.to(out.dtype), None)
            out = out.add_(F.conv2d(hidden, adapter.lora_up.to(out.dtype)), alpha=adapter.factor)
        return out


def _conv_settings(conv: nn.Conv2d) -> dict[str, Any]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode")
    return {**{name: getattr(conv, name) for name in names}, "bias": conv.bias is not None, "device": "meta"}


def _share_parameters(of: nn.Module, to: nn.Module) -> None:
    """Give a layer another's weight and bias, the objects themselves: nothing is allocated or copied."""
    for name, parameter in of.named_parameters(recurse=False):
        setattr(to, name, parameter)
    to.train(of.training)
