"""LoRAs added up exactly, and brought to a lower rank with the least loss.

Neither ever forms the product B A, which is as large as the layer: sums are longer factors side by side, and the
singular values of a product are those of the small matrix between the two orthogonal bases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minisd.lora_layers import LoRAWeights


@dataclass(frozen=True)
class Kept:
    """What of a change is left at a lower rank: sums of squared singular values."""

    kept: float
    whole: float

    @property
    def share(self) -> float:
        """Of the energy, 0 to 1; of a change that is zero, all of it."""
        return self.kept / self.whole if self.whole else 1.0


def concatenate(weights: Sequence[tuple[LoRAWeights, float]], alpha: float) -> LoRAWeights:
    """Add up the changes of one layer, each times a strength: the ranks add up, and the result is exact but for one
    rounding of B to float32.

    Args:
        weights: adapters of the same layer, and how much of each; a strength may be negative.
        alpha: of the result. One for all layers is read right by every program, one for each layer is not by diffusers.

    Returns:
        An adapter in float32.

    Raises:
        ValueError: one is a DoRA, whose change is not a product.
    """
    if any(lora.magnitude is not None for lora, _ in weights):
        raise ValueError("a DoRA cannot be added to another LoRA: its change depends on the base model's weights")
    down = torch.cat([lora.down.float() for lora, _ in weights])
    factors = [strength * lora.alpha / lora.rank * len(down) / alpha for lora, strength in weights]
    up = torch.cat([lora.up.double() * factor for (lora, _), factor in zip(weights, factors, strict=True)], dim=1)
    return LoRAWeights(down, up.float(), alpha)


def resize(lora: LoRAWeights, rank: int) -> tuple[LoRAWeights, Kept]:
    """Bring an adapter to a lower rank: the nearest one in the Frobenius norm (Eckart and Young, 1936).

    Args:
        lora: not a DoRA.
        rank: wanted; an adapter whose own is not larger comes back as it is.

    Returns:
        The adapter, in its dtype and with its alpha; and what is kept.

    Raises:
        ValueError: it is a DoRA, or the rank is less than 1.
    """
    if rank < 1:
        raise ValueError(f"a rank is at least 1, got {rank}")
    if lora.magnitude is not None:
        raise ValueError("a DoRA cannot be resized: its change depends on the base model's weights")
    left, values, right = _decomposed(lora)
    energy = values.square()
    whole = float(energy.sum())
    if rank >= lora.rank:
        return lora, Kept(whole, whole)
    rank = min(rank, len(values))  # a rank above the layer's own sides is for nothing
    root = (values[:rank] * rank / lora.alpha).sqrt()
    down = (root[:, None] * right[:rank]).reshape(rank, *lora.down.shape[1:])
    up = (left[:, :rank] * root).reshape(len(lora.up), rank, *lora.up.shape[2:])
    smaller = LoRAWeights(down.to(lora.down.dtype), up.to(lora.up.dtype), lora.alpha)
    return smaller, Kept(float(energy[:rank].sum()), whole)


def change_norm(lora: LoRAWeights) -> float:
    """The Frobenius norm of (alpha / r) B A; of a DoRA that is the part without its magnitude."""
    up, down = lora.up.double().flatten(1), lora.down.double().flatten(1)
    # ||B A||^2 is the trace of (B^T B)(A A^T), whose factors are [r, r].
    square = (up.T @ up).mul(down @ down.T).sum()
    return lora.alpha / lora.rank * math.sqrt(max(float(square), 0.0))


def _decomposed(lora: LoRAWeights) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of (alpha / r) B A, [out, k], [k], [k, in * kh * kw] with k <= r, in float64."""
    out_basis, out_rest = torch.linalg.qr(lora.up.double().flatten(1))  # [out, r] = [out, k] [k, r]
    in_basis, in_rest = torch.linalg.qr(lora.down.double().flatten(1).T)  # [in * kh * kw, r], likewise
    left, values, right = torch.linalg.svd(lora.alpha / lora.rank * out_rest @ in_rest.T, full_matrices=False)
    return out_basis @ left, values, right @ in_basis.T
