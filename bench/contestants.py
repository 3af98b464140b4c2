"""Three programs that do one training step on the same UNet: minisd, diffusers' script, and that script with caches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import diffusers
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import send_to_device
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from models import Setting, Size, Weights, encoders, fill, unet_on_meta
from peft import LoraConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minisd import draws
from minisd.batches import Batch, collate
from minisd.ddpm import NoiseSchedule, NoiseScheduleConfig
from minisd.distributed import Distributed, sum_gradients
from minisd.lora import TARGETS, inject_lora, lora_parameters
from minisd.optimizer import make_optimizer
from minisd.training import Precision, diffusion_loss, latents_of, lr_at
from minisd.vae import AutoencoderKL, AutoencoderKLConfig
from minisd.weights import suits_channels_last

RANK, TOKENS, STEPS, WARMUP = 16, 77, 15_000, 100
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-4, 1e-2, 1.0


class Contestant(Protocol):
    """A program that trains."""

    name: str

    def step(self) -> float:
        """Make one optimizer update; returns its loss."""
        ...


class Minisd:
    """The step of train.py with cached moments and embeddings, the draws and the collation of its batches included."""

    name = "minisd"

    def __init__(self, setting: Setting, weights: Weights) -> None:
        size, device = setting.size, setting.device
        self.setting, self.positions = setting, 0
        self.dist = Distributed(0, 1, device)
        self.precision = Precision(setting.precision, device.type)
        self.unet = unet_on_meta(size)
        fill(self.unet, weights, setting)
        inject_lora(self.unet, TARGETS["attn"], rank=RANK, alpha=RANK)
        setting.to_layout(self.unet, shipped=suits_channels_last(device))
        with torch.device("meta"):
            self.vae = AutoencoderKL(AutoencoderKLConfig())  # only its scaling factor is read
        self.schedule = NoiseSchedule(NoiseScheduleConfig(), device)
        self.predict = torch.compile(self.unet) if setting.compile else self.unet
        self.parameters = [parameter for _, parameter in lora_parameters(self.unet)]
        self.optimizer = make_optimizer("adamw", self.parameters, LEARNING_RATE, WEIGHT_DECAY)
        self.scaler = self.precision.scaler()
        self.shape = (4, size.latent, size.latent)
        self.moments = torch.randn(1, 2, *self.shape).to(setting.dtype)
        self.embedding = torch.randn(1, TOKENS, size.prompt).to(setting.dtype)
        self.batch = self.next_batch()

    def next_batch(self) -> Batch:
        batch = collate([self.sample(self.positions + index) for index in range(self.setting.batch_size)])
        self.positions += self.setting.batch_size
        return batch.pin_memory() if self.setting.device.type == "cuda" else batch

    def sample(self, position: int) -> Batch:
        return Batch(
            positions=[position],
            indices=[0],
            timesteps=torch.tensor([draws.timestep(0, position, self.schedule.config.num_train_timesteps)]),
            noise=draws.noise(0, position, self.shape).unsqueeze(0),
            posterior_noise=draws.posterior_noise(0, position, self.shape).unsqueeze(0),
            encoder_hidden_states=self.embedding,
            text_embeds=None,
            time_ids=None,
            moments=self.moments,
            pixel_values=None,
        )

    def loss(self, batch: Batch) -> Tensor:
        assert batch.moments is not None
        latents = latents_of(self.vae, batch.moments, batch.posterior_noise)
        return diffusion_loss(
            self.predict,
            self.schedule,
            latents,
            batch.noise,
            batch.timesteps,
            batch.conditioning(self.precision.dtype),
            dtype=self.precision.dtype,
        )

    def step(self) -> float:
        lr = lr_at(
            self.positions, learning_rate=LEARNING_RATE, warmup_steps=WARMUP, max_train_steps=STEPS, scheduler="cosine"
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self.loss(self.batch.to(self.setting.device))
        self.scaler.scale(loss).backward()
        self.batch = self.next_batch()  # while the device works
        sum_gradients(self.dist, self.parameters)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        mean_loss, grad_norm = loss.item(), norm.item()
        assert math.isfinite(mean_loss)
        assert math.isfinite(grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return mean_loss


def make_accelerator(setting: Setting) -> Accelerator:
    # It keeps its settings in class attributes, and would refuse others.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(
        mixed_precision=setting.precision,
        cpu=setting.device.type == "cpu",
        dynamo_backend="inductor" if setting.compile else "no",
    )


class Peer:
    """The step of diffusers' examples/text_to_image/train_text_to_image_lora.py, release 0.35 and later.

    Args:
        setting: as for minisd.
        weights: of the UNet.
        cached: read latents and embeddings instead of encoding pictures and captions, which the script cannot do.
    """

    def __init__(self, setting: Setting, weights: Weights, accelerator: Accelerator, *, cached: bool) -> None:
        self.name = "diffusers, cached" if cached else "diffusers"
        self.setting, self.accelerator, self.cached = setting, accelerator, cached
        size, device, dtype, batch_size = setting.size, setting.device, setting.dtype, setting.batch_size
        with torch.device("meta"):
            unet = diffusers.UNet2DConditionModel.from_config(size.unet_config)
        fill(unet, weights, setting)
        unet.add_adapter(
            LoraConfig(
                r=RANK,
                lora_alpha=RANK,
                init_lora_weights="gaussian",
                target_modules=["to_k", "to_q", "to_v", "to_out.0"],
            )
        )
        if setting.precision == "fp16":
            cast_training_params(unet, dtype=torch.float32)
        setting.to_layout(unet, shipped=False)
        self.schedule = diffusers.DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        )
        # The script's own: AdamW uses the iterator up, and there is nothing left to clip.
        self.lora_layers = filter(lambda parameter: parameter.requires_grad, unet.parameters())
        optimizer = torch.optim.AdamW(
            self.lora_layers, lr=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=WEIGHT_DECAY, eps=1e-8
        )
        scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=WARMUP, num_training_steps=STEPS)
        self.unet, self.optimizer, self.lr_scheduler = accelerator.prepare(unet, optimizer, scheduler)
        if cached:
            self.batch = {
                "latents": torch.randn(batch_size, 4, size.latent, size.latent).to(dtype),
                "encoder_hidden_states": torch.randn(batch_size, TOKENS, size.prompt).to(dtype),
            }
        else:
            with torch.device(device):
                self.vae, self.text_encoder = encoders(size)
            self.vae.to(device, dtype=dtype).requires_grad_(False)
            self.text_encoder.to(device, dtype=dtype).requires_grad_(False)
            pixels = size.latent * 8
            self.batch = {
                "pixel_values": torch.rand(batch_size, 3, pixels, pixels) * 2 - 1,
                "input_ids": torch.randint(49_406, (batch_size, TOKENS)),
            }

    def encoded(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Latents and embeddings of a batch on the device."""
        if self.cached:
            return batch["latents"], batch["encoder_hidden_states"]
        latents = self.vae.encode(batch["pixel_values"].to(dtype=self.setting.dtype)).latent_dist.sample()
        latents = latents * self.vae.config.scaling_factor
        return latents, self.text_encoder(batch["input_ids"], return_dict=False)[0]

    def loss(self, latents: Tensor, noise: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        noisy_latents = self.schedule.add_noise(latents, noise, timesteps)
        model_pred = self.unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
        return F.mse_loss(model_pred.float(), noise.float(), reduction="mean")

    def step(self) -> float:
        accelerator, device, batch_size = self.accelerator, self.setting.device, self.setting.batch_size
        with accelerator.accumulate(self.unet):
            latents, encoder_hidden_states = self.encoded(send_to_device(self.batch, device))
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, self.schedule.config.num_train_timesteps, (batch_size,), device=device).long()
            loss = self.loss(latents, noise, timesteps, encoder_hidden_states)
            avg_loss = accelerator.gather(loss.repeat(batch_size)).mean()
            train_loss = avg_loss.item()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(self.lora_layers, MAX_GRAD_NORM)
            self.optimizer.step()
            self.lr_scheduler.step()
            self.optimizer.zero_grad()
        loss.detach().item()  # for the progress bar
        return train_loss


def flops_of_image(size: Size) -> int:
    """Floating-point operations of minisd's forward and backward pass for one image, counted without computing.

    Nothing in them may ask for a number: the tensors hold none. On a GPU, asking would be waiting.
    """
    meta = torch.device("meta")
    step = Minisd(Setting(size, meta, "no", 1), unet_on_meta(size).state_dict())
    # Attention as the products it consists of: not all of its kernels are known to the counter.
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops})
    with counter, sdpa_kernel(SDPBackend.MATH):
        step.loss(step.batch.to(meta)).backward()
    return counter.get_total_flops()


def addmm_flops(out: Sequence[int], a: Sequence[int], b: Sequence[int], **_: Any) -> int:
    """The adapters' in-place form, which the counter does not know: its arguments are the tensors' shapes."""
    return 2 * a[0] * a[1] * b[1]
