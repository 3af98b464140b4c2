"""The noise schedule: how much noise each timestep holds, and the arithmetic between latents, noise and velocity.

All that a trainer needs of diffusion, and the reverse step of the original paper; the samplers are in samplers.py.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps        DDPM, arXiv:2006.11239, eq. 4
    v_t = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0        progressive distillation, arXiv:2202.00512, section 4

Shapes: B batch, h w the height and width of the latents, T = num_train_timesteps. abar_t is `alphas_cumprod[t]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from minisd.errors import WeightsError

BetaSchedule = Literal["scaled_linear", "linear", "squaredcos_cap_v2"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
TimestepSpacing = Literal["leading", "linspace", "trailing"]
Factors = tuple[Tensor, Tensor]  # sqrt(abar) and sqrt(1 - abar), broadcast over the latents

# Diffusers' classes for a discrete epsilon, v or x0 model. The others (flow matching, EDM) are another diffusion.
_CLASSES = """PNDM DDIM DDPM LCM TCD EulerDiscrete EulerAncestralDiscrete HeunDiscrete LMSDiscrete KDPM2Discrete
    KDPM2AncestralDiscrete DPMSolverMultistep DPMSolverSinglestep DPMSolverSDE UniPCMultistep DEISMultistep"""
# Fields that take one of a few values; the values left out would change the numbers.
_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "_class_name": tuple(f"{name}Scheduler" for name in _CLASSES.split()),
    "beta_schedule": get_args(BetaSchedule),
    "prediction_type": get_args(PredictionType),
    "timestep_spacing": get_args(TimestepSpacing),
    **dict.fromkeys(("rescale_betas_zero_snr", "use_karras_sigmas", "set_alpha_to_one"), (False, True)),
    "trained_betas": (None,),
    "thresholding": (False,),
    "variance_type": (None, "fixed_small"),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "final_sigmas_type": ("zero",),
    "original_inference_steps": (50,),
    "timestep_scaling": (10.0,),
}
# Numbers: the type, and the bounds a value must lie strictly between.
_RANGES: Mapping[str, tuple[type[int] | type[float], float, float]] = {
    "num_train_timesteps": (int, 1, 1_000_000),
    "beta_start": (float, 0, 1),
    "beta_end": (float, 0, 1),
    "steps_offset": (int, -1, 2),
}
# Fields of diffusers' scheduler classes that change nothing here: they choose or tune a solver (the user names the
# sampler), belong to thresholding (refused above), or clip latents (Stable Diffusion's pipeline turns it off).
_INERT = """skip_prk_steps clip_sample clip_sample_range dynamic_thresholding_ratio sample_max_value solver_order
    solver_type solver_p algorithm_type predict_x0 disable_corrector lower_order_final euler_at_final
    lambda_min_clipped flow_shift time_shift_type"""


@dataclass(frozen=True)
class NoiseScheduleConfig:
    """What a model's scheduler_config.json says about its diffusion; the defaults are Stable Diffusion's.

    Args:
        num_train_timesteps: T, the number of noise levels.
        beta_start: variance of the noise added at t = 0, in (0, 1).
        beta_end: variance of the noise added at t = T - 1, in (0, 1).
        beta_schedule: how betas go from one to the other; "squaredcos_cap_v2" ignores both ends.
        prediction_type: what the network outputs: the noise, the velocity, or x_0.
        steps_offset: added to every timestep of "leading" spacing.
        timestep_spacing: None when the file does not say; each sampler then has its own (samplers.default_spacing).
        rescale_betas_zero_snr: make the last timestep pure noise (arXiv:2305.08891, algorithm 1).
        set_alpha_to_one: abar after DDIM's last step is 1 rather than abar_0. None, the file does not say, is True.
        use_karras_sigmas: the model is sampled on the Karras grid unless the user says otherwise.
        class_name: the diffusers class the file was written for.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: BetaSchedule = "scaled_linear"
    prediction_type: PredictionType = "epsilon"
    steps_offset: int = 1
    timestep_spacing: TimestepSpacing | None = None
    rescale_betas_zero_snr: bool = False
    set_alpha_to_one: bool | None = None
    use_karras_sigmas: bool = False
    class_name: str = "PNDMScheduler"

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, xl: bool = False) -> NoiseScheduleConfig:
        """Read a Hub scheduler_config.json strictly: what cannot be honoured is refused, not ignored.

        A field left out takes Stable Diffusion's value, not the default of the diffusers class. Two follow diffusers'
        pipelines instead: latents are never clipped, and `steps_offset` is 1 whatever the file says, except that
        StableDiffusionXLPipeline takes the file's (0 when left out).

        Args:
            data: the parsed JSON.
            xl: the folder is Stable Diffusion XL.

        Raises:
            WeightsError: a field is unknown, or its value is not supported.
        """
        values: dict[str, Any] = {}
        known = {field.name for field in fields(cls)}
        for name, value in data.items():
            if name in _CHOICES:
                if value not in _CHOICES[name]:
                    raise _refusal(name, value, *_CHOICES[name])
            elif name in _RANGES:
                kind, low, high = _RANGES[name]
                if isinstance(value, bool) or not isinstance(value, kind) or not low < value < high:
                    raise _refusal(name, value, f"{kind.__name__} above {low} and below {high}")
            elif value and name not in _INERT.split() and not name.startswith("_"):
                raise _refusal(name, value, "the field absent or off")
            if name.removeprefix("_") in known:
                values[name.removeprefix("_")] = value
        if xl and data.get("clip_sample"):
            raise _refusal("clip_sample", True, False)
        values["steps_offset"] = values.get("steps_offset", 0) if xl else 1
        return cls(**values)


def _refusal(name: str, value: object, *supported: object) -> WeightsError:
    return WeightsError(f"scheduler_config.json: {name} is {value!r}; supported: {' or '.join(map(str, supported))}")


def make_betas(config: NoiseScheduleConfig) -> Tensor:
    """Build the variances of the forward process, [T] float32, in the roundings of diffusers."""
    steps = config.num_train_timesteps
    if config.beta_schedule == "squaredcos_cap_v2":
        # Improved DDPM, arXiv:2102.09672, eq. 17.
        abar = [math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(steps + 1)]
        betas = torch.tensor([min(1 - abar[t + 1] / abar[t], 0.999) for t in range(steps)])
    elif config.beta_schedule == "scaled_linear":
        # Linear in sqrt(beta): latent diffusion's schedule, arXiv:2112.10752.
        betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, steps, dtype=torch.float32) ** 2
    else:
        betas = torch.linspace(config.beta_start, config.beta_end, steps, dtype=torch.float32)
    return zero_terminal_snr(betas) if config.rescale_betas_zero_snr else betas


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(abar) so that it ends at exactly 0 and starts where it was (arXiv:2305.08891, alg. 1).

    Betas [T] -> betas [T]. The last one is 1.
    """
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    alphas_cumprod = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


def original_from_output(output: Tensor, sample: Tensor, factors: Factors, prediction_type: PredictionType) -> Tensor:
    """Solve sample = signal x_0 + spread eps for x_0, given what the network made of the sample.

    Args:
        output: of the network, [B, 4, h, w]: eps, v or x_0.
        sample: x_t, [B, 4, h, w].
        factors: (signal, spread), 0-d or [B, 1, 1, 1]; for eps the signal must not be 0.
        prediction_type: which of the three the output is.

    Returns:
        [B, 4, h, w] in the dtype that torch promotes them to.
    """
    signal, spread = factors
    if prediction_type == "epsilon":
        return (sample - spread * output) / signal
    return signal * sample - spread * output if prediction_type == "v_prediction" else output


def epsilon_from_output(output: Tensor, sample: Tensor, factors: Factors, prediction_type: PredictionType) -> Tensor:
    """Solve the same equation for eps, with the arguments and the result of `original_from_output`.

    It is the spread that must not be 0, for x_0.
    """
    signal, spread = factors
    if prediction_type == "v_prediction":
        return signal * output + spread * sample
    return output if prediction_type == "epsilon" else (sample - signal * output) / spread


class NoiseSchedule:
    """The tables of a config, on one device, and the closed forms that read them.

    Latents, noise and outputs are [B, 4, h, w] of any float dtype; timesteps are int64 [B] in [0, T). Arithmetic is in
    float32 at least, and the result has the latents' dtype: in bfloat16 abar_0 is 1, and t = 0 would get no noise.
    (`step`, a sampler's, computes in the latents' dtype with float32 factors, as the samplers of diffusers do.)

    Attributes:
        config: what it was built from.
        betas: [T] float32.
        alphas_cumprod: [T] float32, falling from about 1 to about 0: the share of signal in the variance of x_t.
    """

    def __init__(self, config: NoiseScheduleConfig, device: torch.device | str = "cpu") -> None:
        betas = make_betas(config)  # always on the CPU, so that every device holds the same bits
        self.config = config
        self.betas = betas.to(device)
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0).to(device)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """Return this schedule with its tables on `device`. Call it once: the methods never move a table."""
        return NoiseSchedule(self.config, device)

    def _factors(self, timesteps: Tensor, dtype: torch.dtype) -> Factors:
        # [B] -> [B, 1, 1, 1], so that they broadcast over [B, 4, h, w]
        abar = self.alphas_cumprod[timesteps].to(torch.promote_types(dtype, torch.float32)).view(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t of the latents x_0: DDPM, arXiv:2006.11239, eq. 4."""
        signal, spread = self._factors(timesteps, latents.dtype)
        return (signal * latents + spread * noise).to(latents.dtype)

    def velocity(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return v, what a v-prediction network is trained on: arXiv:2202.00512, section 4."""
        signal, spread = self._factors(timesteps, latents.dtype)
        return (signal * noise - spread * latents).to(latents.dtype)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the network should have output, by the model's own prediction type: noise, v or x_0."""
        if self.config.prediction_type == "v_prediction":
            return self.velocity(latents, noise, timesteps)
        return noise if self.config.prediction_type == "epsilon" else latents

    def snr(self, timesteps: Tensor) -> Tensor:
        """Return the signal-to-noise ratio abar / (1 - abar), [B] float32 from 0 up (min-SNR, arXiv:2303.09556)."""
        return self.alphas_cumprod[timesteps] / (1 - self.alphas_cumprod[timesteps])

    def predict_original(self, model_output: Tensor, sample: Tensor, timesteps: Tensor) -> Tensor:
        """Return the x_0 that the network's output implies for the noisy `sample`."""
        factors = self._factors(timesteps, sample.dtype)
        return original_from_output(model_output, sample, factors, self.config.prediction_type).to(sample.dtype)

    def predict_epsilon(self, model_output: Tensor, sample: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noise that the network's output implies for the noisy `sample`."""
        factors = self._factors(timesteps, sample.dtype)
        return epsilon_from_output(model_output, sample, factors, self.config.prediction_type).to(sample.dtype)

    def step(
        self, model_output: Tensor, timestep: int, prev_timestep: int, sample: Tensor, noise: Tensor | None
    ) -> Tensor:
        """Draw x_{prev_timestep} given x_timestep: DDPM, arXiv:2006.11239, eq. 7, with the smaller variance.

        Args:
            model_output: of the network at `timestep`, [B, 4, h, w].
            timestep: in [0, T).
            prev_timestep: the next one to visit, less than `timestep`; negative for the clean latents.
            sample: x_t, [B, 4, h, w].
            noise: a standard normal draw, [B, 4, h, w]; None for the mean alone, which is what t = 0 takes.

        Returns:
            [B, 4, h, w] in the dtype of `sample`.
        """
        # 0-d float32 factors, as in diffusers: they leave the dtype of the latents alone.
        abar = self.alphas_cumprod[timestep]
        abar_prev = self.alphas_cumprod[prev_timestep] if prev_timestep >= 0 else torch.ones_like(abar)
        alpha = abar / abar_prev  # of the whole jump, which may skip timesteps
        factors = abar.sqrt(), (1 - abar).sqrt()
        original = original_from_output(model_output, sample, factors, self.config.prediction_type)
        mean = (abar_prev.sqrt() * (1 - alpha) / (1 - abar)) * original
        mean = mean + (alpha.sqrt() * (1 - abar_prev) / (1 - abar)) * sample
        if noise is None:
            return mean
        variance = ((1 - abar_prev) / (1 - abar) * (1 - alpha)).clamp(min=1e-20)
        return mean + variance.sqrt() * noise
