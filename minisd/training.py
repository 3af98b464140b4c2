"""The pure pieces of a training step: learning rate, precision, draws, loss. The loop itself is in train.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisd import draws
from minisd.ddpm import NoiseSchedule


def lr_at(step: int, *, learning_rate: float, warmup_steps: int, max_train_steps: int, scheduler: str) -> float:
    """Learning rate of an optimizer step: linear warmup, then a half cosine to zero (arXiv:1608.03983, eq. 5) or flat.

    A pure function of the step, so there is no scheduler state to save, to resume or to step at the wrong moment.

    Args:
        step: the optimizer update about to be made, from 0.
        learning_rate: the highest value.
        warmup_steps: updates until it is reached; the first update already has learning_rate / warmup_steps.
        max_train_steps: updates in all; at that step, the first one not made, the cosine would be zero.
        scheduler: "cosine" or "constant" (after the warmup).
    """
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    if scheduler == "constant":
        return learning_rate
    progress = (step - warmup_steps) / max(1, max_train_steps - warmup_steps)
    return learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Precision:
    """What runs in which dtype. Adapters, their gradients, Adam's moments, noise and loss are float32 in every mode.

    Args:
        mode: "no" (float32), "bf16" or "fp16".
        device_type: "cuda" or "cpu".
    """

    mode: str
    device_type: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the frozen weights and of the matrix products."""
        return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.mode]

    def autocast(self) -> AbstractContextManager[object]:
        """The context of a forward pass."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.mode != "no")

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling for float16, whose smallest numbers gradients would fall below; does nothing otherwise."""
        return torch.amp.GradScaler(self.device_type, enabled=self.mode == "fp16")


@dataclass(frozen=True)
class SampleDraws:
    """What is drawn for the samples of a micro-batch; see draws.py.

    Args:
        noise: diffusion noise [B, 4, h, w] float32.
        posterior_noise: noise that samples the VAE's posterior [B, 4, h, w] float32.
        timesteps: diffusion times [B] int64.
    """

    noise: Tensor
    posterior_noise: Tensor
    timesteps: Tensor


def draw_for(
    positions: Sequence[int], seed: int, shape: tuple[int, int, int], num_train_timesteps: int, device: torch.device
) -> SampleDraws:
    """Draw noise and timesteps for the samples at these positions of the run, latents of shape [4, h, w]."""
    return SampleDraws(
        torch.stack([draws.noise(seed, position, shape) for position in positions]).to(device),
        torch.stack([draws.posterior_noise(seed, position, shape) for position in positions]).to(device),
        torch.tensor([draws.timestep(seed, position, num_train_timesteps) for position in positions], device=device),
    )


def diffusion_loss(
    unet: nn.Module,
    schedule: NoiseSchedule,
    latents: Tensor,
    drawn: SampleDraws,
    encoder_hidden_states: Tensor,
    precision: Precision,
) -> Tensor:
    """Mean squared error of what the network predicts from noisy latents (DDPM, arXiv:2006.11239, eq. 14).

    Args:
        unet: the denoiser with its adapters.
        schedule: the model's own noise schedule; its prediction_type decides the target.
        latents: clean latents [B, 4, h, w] float32.
        drawn: noise and timesteps of these samples.
        encoder_hidden_states: prompt embeddings [B, S, E] in precision.dtype.
        precision: dtype of the forward pass.

    Returns:
        A float32 scalar.
    """
    noisy_latents = schedule.add_noise(latents, drawn.noise, drawn.timesteps)
    with precision.autocast():
        model_pred = unet(noisy_latents.to(precision.dtype), drawn.timesteps, encoder_hidden_states)
    target = schedule.target(latents, drawn.noise, drawn.timesteps)
    return F.mse_loss(model_pred.float(), target)
