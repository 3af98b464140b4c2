"""Train the pocket model from scratch: `python -m minisd.pocket.pretrain`.

First the VAE learns to give back drawn scenes, plain and eight-bit, then its decoder alone; then the UNet and a small
CLIP text encoder learn to draw the plain ones from their captions. All stages run on CPU or GPU and go on where they
were stopped: what is random in a step is a function of (seed, step), so the only state is weights and Adam's moments.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import tyro
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from minisd.atomic import write_atomically
from minisd.ddpm import NoiseSchedule, NoiseScheduleConfig
from minisd.families import SCHEDULER
from minisd.pocket import architecture, scenes, vocabulary
from minisd.training import Precision, lr_at
from minisd.unet import UNet2DConditionModel
from minisd.unet_config import UNetConfig
from minisd.vae import AutoencoderKL, AutoencoderKLConfig, DiagonalGaussian


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretraining of the pocket model."""

    output: Path = Path(__file__).parent / "weights"
    """Folder the model is written to, in diffusers layout, float16."""
    work_dir: Path = Path(".cache/pocket")
    """Folder of the training state; a run goes on from what it finds there."""
    vae_steps: int = 2200
    """Updates of the VAE, 16 pictures each."""
    decoder_steps: int = 1000
    """Further updates of the VAE's decoder alone."""
    unet_steps: int = 3000
    """Updates of the UNet and the text encoder, 64 pictures each."""
    scenes: int = 20_000
    """Drawn scenes to learn from; the VAE sees an eight-bit picture for every three plain ones."""
    save_steps: int = 200
    """Write the training state every this many updates; the model is written at the end."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device to train on."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """dtype of the UNet's and the text encoder's matrix products; weights and their average are float32."""
    seed: int = 0
    """Everything random follows from it."""


def draw_pictures(count: int, seed: int, style: str) -> Tensor:
    """Draw scenes 0 .. count - 1 of a series: [count, 3, 64, 64] uint8."""
    pictures = np.empty((count, scenes.SIZE, scenes.SIZE, 3), np.uint8)
    for index in tqdm(range(count), desc=f"draw {style}", unit="picture"):
        pictures[index] = np.asarray(scenes.draw(scenes.scene_at(index, seed), style))
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


class State:
    """Weights, their running average and Adam's moments of one stage, and how they go to disk and back."""

    def __init__(self, path: Path, modules: dict[str, nn.Module], learning_rate: float) -> None:
        self.path = path
        self.parameters = {f"{name}.{k}": p for name, m in modules.items() for k, p in m.named_parameters()}
        self.average = {k: p.detach().clone() for k, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01
        )
        self.step = 0
        if path.exists():
            self._load()

    def update(self, loss: Tensor, lr: float) -> None:
        """Make one update from a scalar loss at learning rate `lr`: clip, AdamW, running average."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(0.999, self.step / (self.step + 10))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.parameters.values()], 1 - decay)

    def save(self) -> None:
        """Write everything, in the place of the old file."""
        tensors = {f"model.{k}": p.detach() for k, p in self.parameters.items()}
        tensors |= {f"average.{k}": p for k, p in self.average.items()}
        for key, parameter in self.parameters.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{key}"] = self.optimizer.state[parameter][moment]
        tensors = {k: v.contiguous().cpu() for k, v in tensors.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, safetensors.torch.save(tensors, {"step": str(self.step)}))

    def _load(self) -> None:
        with safe_open(self.path, framework="pt") as file:
            self.step = int(file.metadata()["step"])
            for key, parameter in self.parameters.items():
                parameter.data.copy_(file.get_tensor(f"model.{key}"))
                self.average[key].copy_(file.get_tensor(f"average.{key}"))
                self.optimizer.state[parameter] = {"step": torch.tensor(float(self.step))} | {
                    moment: file.get_tensor(f"{moment}.{key}").to(parameter) for moment in ("exp_avg", "exp_avg_sq")
                }

    def averaged(self, name: str) -> dict[str, Tensor]:
        """The averaged weights of one module, by its own keys."""
        return {k.removeprefix(f"{name}."): v for k, v in self.average.items() if k.startswith(f"{name}.")}


def generator_at(config: PretrainConfig, stage: int, step: int) -> torch.Generator:
    """The source of everything random in one update."""
    return torch.Generator().manual_seed((config.seed * 3 + stage) * 1_000_000_007 + step)


def vae_loss(vae: AutoencoderKL, pixel_values: Tensor, noise: Tensor) -> Tensor:
    """Absolute error of the picture and of its edges, plus a light pull of the latents towards N(0, 1).

    Pictures [B, 3, 64, 64] in [-1, 1] and standard normal noise [B, 4, 16, 16] -> a scalar.
    """
    posterior = vae.encode(pixel_values)
    error = vae.decode(posterior.sample(noise)) - pixel_values
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (posterior.mean.square() + posterior.logvar.exp() - 1 - posterior.logvar).mean()
    return error.abs().mean() + 0.5 * edges + 1e-4 * kl


def fit_vae(
    config: PretrainConfig,
    state: State,
    vae: AutoencoderKL,
    pictures: Tensor,
    stage: int,
    steps: int,
    highest_lr: float,
) -> None:
    """Train what `state` holds of the autoencoder on pictures [N, 3, 64, 64] uint8, up to `steps` updates."""
    name = state.path.stem
    bar = tqdm(range(state.step, steps), name, initial=state.step, total=steps, unit="step")
    for step in bar:
        generator = generator_at(config, stage, step)
        batch = pictures[torch.randint(len(pictures), (16,), generator=generator)]
        pixel_values = batch.to(config.device).float() / 127.5 - 1
        noise = torch.randn((16, 4, 16, 16), generator=generator).to(config.device)
        loss = vae_loss(vae, pixel_values.contiguous(memory_format=torch.channels_last), noise)
        lr = lr_at(step, learning_rate=highest_lr, warmup_steps=50, max_train_steps=steps, scheduler="cosine")
        state.update(loss, lr)
        bar.set_postfix(loss=f"{loss.item():.4f}")
        if state.step % config.save_steps == 0 or state.step == steps:
            state.save()


def train_vae(config: PretrainConfig, pictures: Tensor) -> AutoencoderKL:
    """Train the autoencoder on pictures [N, 3, 64, 64] uint8, then its decoder alone: that sharpens pictures and leaves
    the latents as they are.
    """
    torch.manual_seed(config.seed)
    vae = AutoencoderKL(AutoencoderKLConfig.from_json(architecture.VAE))
    vae = vae.to(config.device).to(memory_format=torch.channels_last)
    whole = State(config.work_dir / "vae.safetensors", {"vae": vae}, 1e-3)
    fit_vae(config, whole, vae, pictures, 0, config.vae_steps, 1e-3)
    vae.load_state_dict(whole.averaged("vae"))

    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    parts: dict[str, nn.Module] = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    half = State(config.work_dir / "decoder.safetensors", parts, 5e-4)
    fit_vae(config, half, vae, pictures, 2, config.decoder_steps, 5e-4)
    for name, part in parts.items():
        part.load_state_dict(half.averaged(name))
    return vae.requires_grad_(False)


@torch.no_grad()
def encode_pictures(config: PretrainConfig, vae: AutoencoderKL, pictures: Tensor) -> DiagonalGaussian:
    """Encode pictures [N, 3, 64, 64] uint8, each once: unscaled moments [N, 4, 16, 16] on the CPU, 8 KiB a picture."""
    moments = []
    for batch in tqdm(pictures.split(64), desc="encode", unit="batch"):
        posterior = vae.encode(batch.to(config.device).float() / 127.5 - 1)
        moments.append(torch.stack([posterior.mean, posterior.logvar]).cpu())
    mean, logvar = torch.cat(moments, dim=1)
    return DiagonalGaussian(mean, logvar)


def caption_of(scene: scenes.Scene, rng: random.Random) -> str:
    """A caption of the scene, often less than whole: people will not always name a colour and a time.

    One in ten is empty, for classifier-free guidance (arXiv:2207.12598). One in ten begins with words that mean
    nothing here, so that the model draws through words it does not know.
    """
    if rng.random() < 0.1:
        return ""
    whole = scenes.caption(scene)
    before, after = whole.split(scene.subject)
    if rng.random() < 0.15:
        before = rng.choice(("illustration of a ", "illustration of "))
    text = before + scene.subject + (after if rng.random() < 0.85 else "")
    if rng.random() < 0.05:
        text = text.removeprefix("illustration of ")
    if rng.random() < 0.1:
        letters = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 5)))
        text = f"{rng.choice((*vocabulary.COMMON_WORDS.split(), letters, rng.choice(string.digits) + 'bit'))} {text}"
    return text


def train_unet(config: PretrainConfig, vae: AutoencoderKL, pictures: Tensor) -> None:
    """Train the UNet and the text encoder on the latents of plain pictures [N, 3, 64, 64] uint8, with min-SNR weights
    (arXiv:2303.09556).
    """
    posterior = encode_pictures(config, vae, pictures)
    scaling_factor = round(1 / posterior.mean.std().item(), 5)

    torch.manual_seed(config.seed)
    tokenizer = CLIPTokenizer.from_pretrained(config.output / "tokenizer")
    text_encoder = CLIPTextModel(CLIPTextConfig(**architecture.text_encoder(len(tokenizer)))).to(config.device)
    unet = UNet2DConditionModel(UNetConfig.from_json(architecture.UNET))
    unet = unet.to(config.device).to(memory_format=torch.channels_last)
    schedule = NoiseSchedule(NoiseScheduleConfig.from_json(SCHEDULER))
    snr = schedule.snr(torch.arange(1000))
    weights = snr.clamp(max=5) / snr

    state = State(config.work_dir / "unet.safetensors", {"unet": unet, "text_encoder": text_encoder}, 1e-3)
    bar = tqdm(range(state.step, config.unet_steps), "UNet", initial=state.step, total=config.unet_steps, unit="step")
    for step in bar:
        generator = generator_at(config, 1, step)
        index = torch.randint(len(pictures), (64,), generator=generator)
        captions = [
            caption_of(scenes.scene_at(int(i), config.seed), random.Random(f"{config.seed} {step} {k}"))
            for k, i in enumerate(index)
        ]
        draws = torch.randn((2, 64, 4, 16, 16), generator=generator)
        timesteps = torch.randint(1000, (64,), generator=generator)
        latents = DiagonalGaussian(posterior.mean[index], posterior.logvar[index]).sample(draws[0]) * scaling_factor
        noisy_latents = schedule.add_noise(latents, draws[1], timesteps)
        input_ids = tokenizer(
            captions, padding="max_length", max_length=vocabulary.MAX_LENGTH, return_tensors="pt"
        ).input_ids

        # All weights learn here, so they are float32, and autocast makes copies in the dtype of the matrix products.
        device_type, mode = torch.device(config.device).type, config.mixed_precision
        with torch.autocast(device_type, dtype=Precision(mode, device_type).dtype, enabled=mode != "no"):
            encoder_hidden_states = text_encoder(input_ids.to(config.device)).last_hidden_state
            sample = noisy_latents.to(config.device, memory_format=torch.channels_last)
            model_pred = unet(sample, timesteps.to(config.device), encoder_hidden_states)
        error = F.mse_loss(model_pred.float(), draws[1].to(config.device), reduction="none").mean((1, 2, 3))
        loss = (error * weights[timesteps].to(config.device)).mean()
        lr = lr_at(step, learning_rate=1e-3, warmup_steps=100, max_train_steps=config.unet_steps, scheduler="cosine")
        state.update(loss, lr)
        bar.set_postfix(loss=f"{loss.item():.4f}")
        if state.step % config.save_steps == 0 or state.step == config.unet_steps:
            state.save()
    trained = {name: state.averaged(name) for name in ("unet", "text_encoder")} | {"vae": dict(vae.state_dict())}
    architecture.export(config.output, trained, scaling_factor, len(tokenizer))


def pretrain(config: PretrainConfig) -> None:
    """Run all stages, or what is left of them, and write the model."""
    words = [word for subject in scenes.SUBJECTS for word in subject.split()] + list(scenes.COLOURS)
    words += ["illustration", *scenes.TIMES, *vocabulary.COMMON_WORDS.split()]
    vocabulary.write_tokenizer(config.output / "tokenizer", words)
    plain = draw_pictures(config.scenes, config.seed, "plain")
    eight_bit = draw_pictures(config.scenes // 3, config.seed + 1, "8bit")
    vae = train_vae(config, torch.cat([plain, eight_bit]))
    train_unet(config, vae, plain)


if __name__ == "__main__":
    pretrain(tyro.cli(PretrainConfig))
