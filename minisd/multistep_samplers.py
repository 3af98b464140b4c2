"""Samplers that extrapolate x_0 from the calls before: DPM-Solver++ 2M, its stochastic form, and UniPC.

The latents have variance 1, as in DDPM, but the steps are counted in lambda = log(sqrt(abar) / sqrt(1 - abar)), half
the log of the signal-to-noise ratio, in which the path is smooth: DPM-Solver, arXiv:2206.00927, section 3. Each sampler
is a generator that yields the latents, [B, 4, h, w] in the dtype of the noise, after every call of the network.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from minisd.ddpm import Factors, original_from_output
from minisd.sampler_grids import Model, Walk, dpm_grid


def _signal_and_spread(sigmas: Tensor) -> Factors:
    signals = 1 / (sigmas**2 + 1).sqrt()
    return signals, sigmas * signals


def _begin(walk: Walk) -> tuple[Tensor, Tensor, Factors, Tensor]:
    """Return the first latents; and by step the timesteps, the (signals, spreads) and the lambdas on the CPU."""
    timesteps, sigmas = dpm_grid(walk)
    latents = walk.noise
    if walk.image_latents is not None:  # the pictures, with as much noise as the first step to take expects
        sigma = sigmas[walk.first_step].to(torch.promote_types(latents.dtype, torch.float32))
        signal, spread = _signal_and_spread(sigma)
        latents = signal * walk.image_latents + spread * walk.noise
    signals, spreads = _signal_and_spread(sigmas)
    lambdas = signals.log() - spreads.log()  # infinite at the end, where the spread is 0
    return latents, timesteps.to(latents.device), (signals, spreads), lambdas


def dpmpp_2m(model: Model, walk: Walk) -> Iterator[Tensor]:
    """Extrapolate x_0 from the last two network calls: DPM-Solver++ (2M), arXiv:2211.01095, algorithm 2."""
    latents, timesteps, (signals, spreads), lambdas = _begin(walk)
    previous: Tensor | None = None
    for i in walk.steps:
        output = model(latents, timesteps[i])
        original = original_from_output(output, latents, (signals[i], spreads[i]), walk.schedule.config.prediction_type)
        h = lambdas[i + 1] - lambdas[i]
        factor = signals[i + 1] * (torch.exp(-h) - 1)
        stepped = (spreads[i + 1] / spreads[i]) * latents.float() - factor * original
        # First order where there is no second point: at the start, and at the end where h is infinite.
        if previous is not None and i + 1 < walk.num_inference_steps:
            slope = (1 / ((lambdas[i] - lambdas[i - 1]) / h)) * (original - previous)
            stepped = stepped - 0.5 * factor * slope
        previous, latents = original, stepped.to(output.dtype)
        yield latents


def dpmpp_2m_sde(model: Model, walk: Walk) -> Iterator[Tensor]:
    """Go twice as far in lambda as `dpmpp_2m` and come back by fresh noise: SDE-DPM-Solver++ (2M), arXiv:2211.01095.

    Draws noise after each network call, the last included, where it is multiplied by 0.
    """
    latents, timesteps, (signals, spreads), lambdas = _begin(walk)
    previous: Tensor | None = None
    for i in walk.steps:
        output = model(latents, timesteps[i])
        original = original_from_output(output, latents, (signals[i], spreads[i]), walk.schedule.config.prediction_type)
        h = lambdas[i + 1] - lambdas[i]
        factor = signals[i + 1] * (1 - torch.exp(-2 * h))
        stepped = (spreads[i + 1] / spreads[i] * torch.exp(-h)) * latents.float() + factor * original
        if previous is not None and i + 1 < walk.num_inference_steps:
            slope = (1 / ((lambdas[i] - lambdas[i - 1]) / h)) * (original - previous)
            stepped = stepped + 0.5 * factor * slope
        stepped = stepped + spreads[i + 1] * (1 - torch.exp(-2 * h)).sqrt() * walk.draw_noise()
        previous, latents = original, stepped.to(output.dtype)
        yield latents


def _corrector_weights(h: Tensor, ratio: Tensor) -> Tensor:
    """Solve for UniC-2's weights, [2]: of x_0 at the point before and at the end of a step, each against its start.

    Args:
        h: the step in lambda, 0-d.
        ratio: where the point before lies from the start, in units of h, 0-d.
    """
    phi_1 = torch.expm1(-h)
    phi_2 = phi_1 / -h - 1
    phi_3 = phi_2 / -h - 0.5
    powers = torch.stack([torch.ones(2), torch.stack([ratio, torch.ones(())])])  # of both points' places: [2, 2]
    return torch.linalg.solve(powers, torch.stack([phi_2 / phi_1, phi_3 * 2 / phi_1]))


def unipc(model: Model, walk: Walk) -> Iterator[Tensor]:
    """Predict from the calls before, then correct by the call at the end: UniPC-2, arXiv:2302.04867, alg. 1 and 2.

    In its form for x_0, with B(h) = exp(h) - 1. The call at the end of a step serves as that at the start of the next,
    so that the correction costs nothing; the last step, which ends at x_0, has none.
    """
    latents, timesteps, (signals, spreads), lambdas = _begin(walk)

    def call(sample: Tensor, i: int) -> Tensor:
        output = model(sample, timesteps[i])
        return original_from_output(output, sample, (signals[i], spreads[i]), walk.schedule.config.prediction_type)

    previous: Tensor | None = None
    original = call(latents, walk.first_step)
    for i in walk.steps:
        h = lambdas[i + 1] - lambdas[i]
        factor = signals[i + 1] * torch.expm1(-h)
        first_order = spreads[i + 1] / spreads[i] * latents - factor * original
        if i + 1 == walk.num_inference_steps:  # h is infinite
            yield first_order
        elif previous is None:
            yield first_order
            at_end = call(first_order, i + 1)
            latents = first_order - factor * (0.5 * (at_end - original))
            previous, original = original, at_end
        else:
            ratio = (lambdas[i - 1] - lambdas[i]) / h
            slope = (previous - original) / ratio
            predicted = first_order - factor * (0.5 * slope)
            yield predicted
            at_end = call(predicted, i + 1)
            weights = _corrector_weights(h, ratio)
            latents = first_order - factor * (weights[0] * slope + weights[1] * (at_end - original))
            previous, original = original, at_end
