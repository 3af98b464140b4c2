"""Classifier-free guidance (arXiv:2207.12598): the network asked with the prompt and without, and the difference
exaggerated. With rescaling (arXiv:2305.08891) and only where it helps (arXiv:2404.07724).

Shape letters: B pictures, S positions of a prompt, E its width, P width of its pooled form (XL).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minisd.sampler_grids import Model
from minisd.unet import UNet2DConditionModel


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told beside the noisy latents.

    Attributes:
        hidden_states: [B, S, E].
        text_embeds: the pooled prompt, [B, P]; XL only.
        time_ids: sizes of the picture, [B, 6]; XL only.
    """

    hidden_states: Tensor
    text_embeds: Tensor | None = None
    time_ids: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How strongly, and when.

    Attributes:
        scale: 0 or more; 1 and below is no guidance, as in diffusers.
        rescale: phi of arXiv:2305.08891, eq. 16, from 0 to 1.
        interval: guide where the share of the way from pure noise (0) to the picture (1) is within these two.
    """

    scale: float
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)


def guided_model(
    unet: UNet2DConditionModel,
    conditional: Conditioning,
    unconditional: Conditioning | None,
    guidance: Guidance,
    num_train_timesteps: int,
) -> Model:
    """Make the function that a sampler calls for a prediction.

    Args:
        unet: the network. A call is of 2 B pictures where there is guidance and of B elsewhere.
        conditional: of the prompts, B of them.
        unconditional: of what to keep away from, B again; None for no guidance.
        guidance: scale, rescaling and interval.
        num_train_timesteps: T; pure noise is at T - 1.
    """
    both = None if unconditional is None else _joined(unconditional, conditional)

    def call(sample: Tensor, timestep: Tensor, told: Conditioning) -> Tensor:
        return unet(sample, timestep.expand(len(sample)), told.hidden_states, told.text_embeds, told.time_ids)

    def predict(sample: Tensor, timestep: Tensor) -> Tensor:
        if both is None or not _within(guidance.interval, timestep, num_train_timesteps):
            return call(sample, timestep, conditional)
        unguided, prompted = call(sample.repeat(2, 1, 1, 1), timestep, both).chunk(2)  # 2 x [B, 4, h, w]
        guided = unguided + guidance.scale * (prompted - unguided)  # arXiv:2207.12598, eq. 6, with scale = 1 + w
        return guided if guidance.rescale == 0 else rescaled(guided, prompted, guidance.rescale)

    return predict


def rescaled(guided: Tensor, prompted: Tensor, phi: float) -> Tensor:
    """Bring a share phi of the guided prediction back to the spread of the prompted one: arXiv:2305.08891, eq. 15-16.

    Args:
        guided: [B, 4, h, w].
        prompted: the prediction with the prompt, before guidance, of the same shape.
        phi: from 0 (nothing changes) to 1.
    """
    dims = (1, 2, 3)
    factor = prompted.std(dims, keepdim=True) / guided.std(dims, keepdim=True)  # [B, 1, 1, 1]
    return phi * (guided * factor) + (1 - phi) * guided


def _within(interval: tuple[float, float], timestep: Tensor, num_train_timesteps: int) -> bool:
    """Whether a timestep is in the interval. Reading it waits for the device, so only where it matters."""
    if interval == (0.0, 1.0):
        return True
    share = 1 - float(timestep) / (num_train_timesteps - 1)
    return interval[0] <= share <= interval[1]


def _joined(first: Conditioning, second: Conditioning) -> Conditioning:
    """Two batches as one, the first in front."""

    def cat(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else torch.cat([a, b])

    return Conditioning(
        torch.cat([first.hidden_states, second.hidden_states]),
        cat(first.text_embeds, second.text_embeds),
        cat(first.time_ids, second.time_ids),
    )
