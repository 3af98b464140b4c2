"""The pure pieces of a training step: learning rate, precision, latents, loss. The loop itself is in train.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minisd.ddpm import NoiseSchedule, PredictionType
from minisd.layers import ResnetBlock2D
from minisd.unet import Transformer2DModel
from minisd.vae import AutoencoderKL, DiagonalGaussian, scale_latents


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

    The network runs in `dtype` throughout, without autocast: its norms and its softmax add up in float32 in any case,
    and autocast would write every norm's output out in float32.

    Args:
        mode: "no" (float32), "bf16" or "fp16".
        device_type: "cuda" or "cpu".
    """

    mode: str
    device_type: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the frozen weights, of the activations and of the matrix products."""
        return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.mode]

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling for float16, whose smallest numbers gradients would fall below; does nothing otherwise."""
        return torch.amp.GradScaler(self.device_type, enabled=self.mode == "fp16")


def latents_of(vae: AutoencoderKL, moments: Tensor, noise: Tensor) -> Tensor:
    """Draw the latents of a batch from the VAE's posterior, scaled: arXiv:2112.10752, appendix G.

    Args:
        vae: only its configuration is read.
        moments: mean and log-variance [B, 2, 4, h, w], of any dtype.
        noise: standard normal [B, 4, h, w] float32.

    Returns:
        [B, 4, h, w] float32.
    """
    mean, logvar = moments.float().unbind(dim=1)
    return scale_latents(vae, DiagonalGaussian(mean, logvar), noise)


def snr_weights(snr: Tensor, gamma: float, prediction_type: PredictionType) -> Tensor:
    """Weights of the loss by min-SNR (arXiv:2303.09556, 3.4): an error in x_0 counts min(SNR, gamma) times.

    The square of an error in x_0 is SNR times as large in epsilon, and SNR + 1 times in v; hence the divisors. At SNR
    0, the end of a schedule with zero terminal SNR, the weight of epsilon is the limit, 1.

    Args:
        snr: signal-to-noise ratios [B] float32, at least 0.
        gamma: the limit; 5 in the paper.
        prediction_type: what the network outputs.

    Returns:
        [B] float32.
    """
    if prediction_type == "epsilon":
        return torch.clamp(gamma / snr, max=1)  # gamma / 0 is infinite, not NaN
    limited = torch.clamp(snr, max=gamma)
    return limited / (snr + 1) if prediction_type == "v_prediction" else limited


def prediction_and_target(
    unet: Callable[..., Tensor],
    schedule: NoiseSchedule,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    conditioning: Sequence[Tensor],
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """What the network makes of noisy latents, and what it should have made: two tensors [B, 4, h, w] float32.

    The arguments are those of `diffusion_loss`.
    """
    noisy_latents = schedule.add_noise(latents, noise, timesteps)
    model_pred = unet(noisy_latents.to(dtype), timesteps, *conditioning)
    return model_pred.float(), schedule.target(latents, noise, timesteps)


def diffusion_loss(
    unet: Callable[..., Tensor],
    schedule: NoiseSchedule,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    conditioning: Sequence[Tensor],
    *,
    dtype: torch.dtype,
    snr_gamma: float | None = None,
) -> Tensor:
    """Mean squared error of what the network predicts from noisy latents (DDPM, arXiv:2006.11239, eq. 14).

    Args:
        unet: the denoiser with its adapters.
        schedule: the model's own noise schedule; its prediction_type decides the target.
        latents: clean latents [B, 4, h, w] float32.
        noise: standard normal [B, 4, h, w] float32.
        timesteps: diffusion times [B] int64.
        conditioning: what else the UNet takes: prompt embeddings [B, S, E], and of an XL model two tensors more.
        dtype: of the forward pass.
        snr_gamma: weight the samples by `snr_weights`; None: all alike.

    Returns:
        A float32 scalar.
    """
    model_pred, target = prediction_and_target(unet, schedule, latents, noise, timesteps, conditioning, dtype=dtype)
    if snr_gamma is None:
        return F.mse_loss(model_pred, target)
    losses = F.mse_loss(model_pred, target, reduction="none").mean(dim=(1, 2, 3))  # [B]
    return (losses * snr_weights(schedule.snr(timesteps), snr_gamma, schedule.config.prediction_type)).mean()


def recompute_activations(unet: nn.Module) -> None:
    """Keep the input of every block only, and compute the rest again in the backward pass (arXiv:1604.06174).

    The blocks are the residual blocks and the transformers. Gradients stay the same to the bit, dropout included.
    """
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D | Transformer2DModel):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]
