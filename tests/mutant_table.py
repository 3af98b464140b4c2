"""The mutants: one small, plausible error each, and the tests that must notice it. tests/mutants.py runs them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        name: a few words; also what `--only` takes.
        file: from the root of the repository.
        old: text that occurs in the file exactly once.
        new: what it becomes.
        breaks: what is then wrong.
        tests: files, or single tests, as pytest takes them: few and fast ones.
    """

    name: str
    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]


DDPM = ("tests/parity/test_ddpm.py",)
UNET = ("tests/parity/test_unet.py",)
VAE = ("tests/parity/test_vae.py",)
TEXT = ("tests/parity/test_text_conditioning.py",)
WALKS = ("tests/parity/test_samplers.py::test_text_to_image_equals_the_oracle",)
LORA = ("tests/unit/test_lora.py",)
DORA = ("tests/parity/test_dora.py",)
RESIZE = ("tests/unit/test_lora_resize.py",)
TRAINING = ("tests/unit/test_training.py",)
PLAN = ("tests/unit/test_plan.py",)
BUCKETS = ("tests/unit/test_buckets.py",)
BATCHES = ("tests/unit/test_batches.py",)
CHECKPOINT = ("tests/unit/test_checkpoint.py",)
POWER_CUT = ("tests/faults/test_writer.py::test_power_cuts_lose_nothing_that_was_saved",)
NORMS = ("tests/e2e/test_gradient_norm.py",)

MUTANTS = (
    # The noise
    Mutant(
        "roots of add_noise", "minisd/ddpm.py", "return abar.sqrt(), (1 - abar).sqrt()", "return abar, 1 - abar",
        "noise and signal are mixed by their variances", DDPM,
    ),
    Mutant(
        "sign of eps", "minisd/ddpm.py", "(sample - spread * output) / signal", "(sample + spread * output) / signal",
        "the noise is added again instead of taken away", DDPM,
    ),
    Mutant(
        "sign of v", "minisd/ddpm.py", "(signal * noise - spread * latents)", "(spread * latents - signal * noise)",
        "the velocity points the other way", DDPM,
    ),
    Mutant(
        "target of v", "minisd/ddpm.py", "return self.velocity(latents, noise, timesteps)", "return noise",
        "a v-prediction model is taught the noise", TRAINING,
    ),
    Mutant(
        "linear betas", "minisd/ddpm.py", "config.beta_start**0.5, config.beta_end**0.5, steps",
        "config.beta_start, config.beta_end, steps", "the schedule is another one", DDPM,
    ),
    Mutant(
        "zero terminal SNR", "minisd/ddpm.py", "(root - last) * (first / (first - last))", "(root - last)",
        "the last timestep is pure noise, and the first one is not what it was", DDPM,
    ),
    Mutant(
        "SNR of amplitudes", "minisd/ddpm.py",
        "return self.alphas_cumprod[timesteps] / (1 - self.alphas_cumprod[timesteps])",
        "return (self.alphas_cumprod[timesteps] / (1 - self.alphas_cumprod[timesteps])).sqrt()",
        "min-SNR weighs by the root of the ratio", TRAINING,
    ),
    Mutant(
        "the larger variance", "minisd/ddpm.py", "((1 - abar_prev) / (1 - abar) * (1 - alpha))", "(1 - alpha)",
        "DDPM's reverse step adds beta instead of the posterior's variance", DDPM,
    ),
    # The networks
    Mutant(
        "sine before cosine", "minisd/layers.py", "[angles.cos(), angles.sin()]", "[angles.sin(), angles.cos()]",
        "the network is told another time", ("tests/parity/test_timestep_embedding.py",),
    ),
    Mutant(
        "padding of the VAE", "minisd/layers.py", "(0, 1, 0, 1)", "(1, 0, 1, 0)",
        "latents are those of a shifted picture", VAE,
    ),
    Mutant(
        "heads and widths", "minisd/layers.py", "t.unflatten(-1, (heads, -1))", "t.unflatten(-1, (-1, heads))",
        "as many heads as a head is wide", UNET,
    ),
    Mutant(
        "scale of attention", "minisd/layers.py", "F.scaled_dot_product_attention(q, k, v)",
        "F.scaled_dot_product_attention(q, k, v, scale=1.0)", "no division by sqrt(d)", UNET,
    ),
    Mutant(
        "activation of the time", "minisd/layers.py", "self.time_emb_proj(F.silu(temb))", "self.time_emb_proj(temb)",
        "residual blocks get the time without SiLU", UNET,
    ),
    Mutant(
        "halves of GEGLU", "minisd/unet.py", "value, gate = self.proj(x)", "gate, value = self.proj(x)",
        "the value is the gate", UNET,
    ),
    Mutant(
        "tanh for GELU", "minisd/unet.py", "F.gelu(gate)", 'F.gelu(gate, approximate="tanh")',
        "the approximation instead of the function", UNET,
    ),
    Mutant(
        "eps of the transformers", "minisd/unet.py", "channels, eps=1e-6)", "channels, eps=1e-5)",
        "the UNet's epsilon where the checkpoints have another", UNET,
    ),
    Mutant(
        "eps of the VAE", "minisd/vae.py", "NORM_EPS = 1e-6", "NORM_EPS = 1e-5",
        "the UNet's epsilon in the VAE", VAE,
    ),
    Mutant(
        "order of skip and hidden", "minisd/unet.py", "torch.cat([x, skips.pop()], dim=1)",
        "torch.cat([skips.pop(), x], dim=1)", "the weights for one read the other", UNET,
    ),
    Mutant(
        "odd sizes", "minisd/unet.py", "x = upsample(x, (skips[-1].shape[-2], skips[-1].shape[-1]))",
        "x = upsample(x)", "sides of an odd number of latents do not meet their skips", UNET,
    ),
    Mutant(
        "scaling factor", "minisd/vae.py", "posterior.sample(noise) * vae", "posterior.sample(noise) / vae",
        "latents of a standard deviation far from 1", VAE,
    ),
    Mutant(
        "variance for deviation", "minisd/vae.py", "torch.exp(0.5 * self.logvar)", "torch.exp(self.logvar)",
        "the posterior is sampled with its variance", VAE,
    ),
    Mutant(
        "state of the end mark", "minisd/text.py", "[len(chunk) + 1 for chunk in chunks]",
        "[len(chunk) for chunk in chunks]", "XL's pooled prompt is that of the last word", TEXT,
    ),
    Mutant(
        "XL's last layer", "minisd/text.py", "output.hidden_states[-1 - clip_skip - penultimate]",
        "output.hidden_states[-1 - clip_skip]", "XL reads the last layer instead of the one before", TEXT,
    ),
    Mutant(
        "mean of a weighted prompt", "minisd/text.py", "weighted * (before / after)", "weighted * (after / before)",
        "what (word:1.2) does to the mean is doubled instead of undone", TEXT,
    ),
    Mutant(
        "queries, keys, values", "minisd/ldm_keys.py", 'for name in "qkv"', 'for name in "kqv"',
        "OpenCLIP's one projection is split in the wrong order",
        ("tests/parity/test_single_file.py::test_values_are_those_of_the_folder",),
    ),
    # The samplers
    Mutant(
        "second order of DPM++", "minisd/multistep_samplers.py", "stepped = stepped - 0.5 * factor * slope",
        "stepped = stepped + 0.5 * factor * slope", "the correction goes the wrong way", WALKS,
    ),
    Mutant(
        "Euler ancestral's noise", "minisd/sigma_samplers.py", "walk.draw_noise() * sigma_up",
        "walk.draw_noise() * sigma_to", "more noise comes back than was taken away", WALKS,
    ),
    Mutant(
        "Heun's mean", "minisd/sigma_samplers.py", "(slope + slope_to) / 2", "slope_to",
        "the slope of one end instead of both", WALKS,
    ),
    Mutant(
        "DDIM's direction", "minisd/vp_samplers.py", "(1 - abar_prev - std**2).sqrt()", "(1 - abar_prev).sqrt()",
        "with eta the variance is above 1", WALKS,
    ),
    Mutant(
        "Adams and Bashforth", "minisd/vp_samplers.py", "(23 * outputs[-1] - 16 *", "(23 * outputs[-1] + 16 *",
        "PNDM's third step extrapolates the wrong way", WALKS,
    ),
    Mutant(
        "Karras' levels", "minisd/sampler_grids.py", "* (1 / max(num_inference_steps - 1, 1))",
        "* (1 / num_inference_steps)", "the last noise level is not the lowest", WALKS,
    ),
    Mutant(
        "offset of leading timesteps", "minisd/sampler_grids.py", " + config.steps_offset).flip(0)", ").flip(0)",
        "every timestep is one too low", WALKS,
    ),
    Mutant(
        "order of guidance", "minisd/guidance.py", "unguided, prompted = call(", "prompted, unguided = call(",
        "guidance leads away from the prompt",
        ("tests/e2e/test_sample.py::test_pictures_equal_diffusers_to_one_level_in_255",),
    ),
    Mutant(
        "share of rescaling", "minisd/guidance.py", "phi * (guided * factor) + (1 - phi) * guided",
        "(1 - phi) * (guided * factor) + phi * guided", "a little rescaling is nearly all of it",
        ("tests/unit/test_guidance.py",),
    ),
    Mutant(
        "seed of a picture", "minisd/sample_plan.py", "config.seed + image for", "config.seed for",
        "all pictures of a prompt are the same one",
        ("tests/e2e/test_sample.py::test_a_picture_depends_on_its_seed_alone",),
    ),
    # The adapters
    Mutant(
        "alpha over rank", "minisd/lora_layers.py", "self.lora_scale * self.alpha / self.rank",
        "self.lora_scale * self.rank / self.alpha", "the strength is the inverse", LORA,
    ),
    Mutant(
        "sign of a merge", "minisd/lora_layers.py", "total += adapter.factor *", "total -= adapter.factor *",
        "merging takes the adapter away", LORA,
    ),
    Mutant(
        "a start that is no zero", "minisd/lora_targets.py", "torch.zeros(out, rank", "torch.ones(out, rank",
        "a new adapter changes the model", LORA,
    ),
    Mutant(
        "frozen base", "minisd/lora.py", "parameter.requires_grad_(False)", "parameter.requires_grad_(True)",
        "the base's weights get gradients", LORA,
    ),
    Mutant(
        "norm of DoRA", "minisd/lora_layers.py", "norm = total.flatten(1)", "norm = weight.flatten(1)",
        "rows are divided by the length of the base's", DORA,
    ),
    Mutant(
        "alpha in the file", "minisd/lora_writer.py", "torch.tensor(lora.alpha,", "torch.tensor(lora.rank,",
        "other programs draw with another strength", ("tests/unit/test_lora_writer.py",),
    ),
    Mutant(
        "down for up", "minisd/lora_dialects.py", '".lora_A.weight": "down"', '".lora_A.weight": "up"',
        "PEFT's matrices change places", ("tests/parity/test_lora_file.py::test_we_read_what_diffusers_writes",),
    ),
    Mutant(
        "rank in a sum", "minisd/lora_resize.py", "lora.alpha / lora.rank * len(down) / alpha",
        "lora.alpha / lora.rank / alpha", "LoRAs added up are as weak as their ranks are many", RESIZE,
    ),
    Mutant(
        "rank in a split", "minisd/lora_resize.py", "values[:rank] * rank / lora.alpha", "values[:rank] / lora.alpha",
        "a LoRA brought to a lower rank is too weak", RESIZE,
    ),
    # A step of training
    Mutant(
        "min-SNR for eps", "minisd/training.py", "torch.clamp(gamma / snr, max=1)", "torch.clamp(snr / gamma, max=1)",
        "steps of little noise count most, not least", TRAINING,
    ),
    Mutant(
        "min-SNR for v", "minisd/training.py", "limited / (snr + 1)", "limited / snr",
        "weights of the noise for a velocity", TRAINING,
    ),
    Mutant(
        "cosine", "minisd/training.py", "0.5 * (1 + math.cos(", "0.5 * (1 - math.cos(",
        "the learning rate rises to the end", TRAINING,
    ),
    Mutant(
        "warmup off by one", "minisd/training.py", "learning_rate * (step + 1) / warmup_steps",
        "learning_rate * step / warmup_steps", "the first update has a rate of 0", TRAINING,
    ),
    Mutant(
        "weight decay", "minisd/optimizer.py", "weight_decay=weight_decay, fused=True", "weight_decay=0.0, fused=True",
        "--weight-decay does nothing", TRAINING,
    ),
    Mutant(
        "clipping", "train.py", "clip_grad_norm_(parameters, max_norm)", "clip_grad_norm_(parameters, math.inf)",
        "--max-grad-norm does nothing",
        ("tests/e2e/test_train.py::test_clipping_bounds_the_gradient_that_adam_sees",),
    ),
    Mutant(
        "division of a loss", "train.py", "(run.accumulation_steps * dist.world_size)", "dist.world_size",
        "gradients grow with --gradient-accumulation-steps", NORMS,
    ),
    Mutant(
        "order of unscaling", "train.py", "scaler.unscale_(optimizer)", "scaler.get_scale()",
        "float16's gradients are clipped 65536 times too large", NORMS,
    ),
    Mutant(
        "all-reduce", "minisd/distributed.py", "torch.distributed.all_reduce(flat)", "flat.clone()",
        "every process learns alone", ("tests/unit/test_distributed.py",),
    ),
    Mutant(
        "order of the positions", "minisd/plan.py", "(step * accumulation_steps + micro_step) * world_size + rank",
        "(step * world_size + rank) * accumulation_steps + micro_step", "another split shows another order", PLAN,
    ),
    Mutant(
        "the last batch", "minisd/plan.py", "full = -(-len(bucket) // self.images_per_step)",
        "full = (len(bucket) // self.images_per_step)", "pictures that fill no batch are dropped", PLAN,
    ),
    Mutant(
        "nearest bucket", "minisd/buckets.py", "abs(_shape(size) - shape)", "abs(_shape(size) + shape)",
        "upright pictures are cut to lying ones", BUCKETS,
    ),
    Mutant(
        "covering", "minisd/buckets.py", "scale = max(", "scale = min(", "pictures do not cover their buckets", BUCKETS,
    ),
    Mutant(
        "mirrored latents", "minisd/latent_cache.py", "/{self.geometry.size}/{self.flip}", "/{self.geometry.size}",
        "a mirrored picture and its original share a place in the cache", ("tests/unit/test_latent_cache.py",),
    ),
    Mutant(
        "flip", "minisd/batches.py", "self.random_flip and draws.flip(seed, position)", "self.random_flip and False",
        "no picture is mirrored", BATCHES,
    ),
    Mutant(
        "XL's mirrored crop", "minisd/batches.py", "- geometry.size[1] - left", "- left",
        "XL is told a corner that is not where it was cut", ("tests/e2e/test_train_xl.py",),
    ),
    Mutant(
        "caption dropout", "minisd/batches.py", "position) < self.caption_dropout", "position) > self.caption_dropout",
        "captions are left out where they should be kept", BATCHES,
    ),
    Mutant(
        "one noise for two", "minisd/draws.py", 'generator_for("posterior"', 'generator_for("noise"',
        "the latents are sampled with the noise that is then added", ("tests/unit/test_draws.py",),
    ),
    # What is on the disk
    Mutant(
        "fsync", "minisd/atomic.py", "os.fsync(descriptor)  # the error", "pass  # the error",
        "a power cut leaves empty files under their names", POWER_CUT,
    ),
    Mutant(
        "rename before writing", "minisd/atomic.py", "write_synced(staged, data)\n            staged.rename(path)",
        "staged.touch()\n            staged.rename(path)\n            write_synced(path, data)",
        "a file has its name before it is whole",
        ("tests/unit/test_lora_writer.py::test_a_file_appears_whole_or_not_at_all",),
    ),
    Mutant(
        "durable names", "minisd/checkpoint.py", "staging.rename(final)\n        sync_folder(final.parent)",
        "staging.rename(final)", "a power cut takes a checkpoint away that was reported", POWER_CUT,
    ),
    Mutant(
        "verified before named", "minisd/checkpoint.py", "verify_checkpoint(staging)\n        aside = ", "aside = ",
        "what the disk has garbled becomes the newest checkpoint", CHECKPOINT,
    ),
    Mutant(
        "manifest check", "minisd/checkpoint.py", "hashlib.sha256(data).hexdigest() != digest", "False",
        "a flipped bit is loaded", CHECKPOINT,
    ),
    Mutant(
        "newest checkpoint", "minisd/checkpoint.py", "in reversed(candidates)", "in candidates",
        "a run goes on from its oldest checkpoint", CHECKPOINT,
    ),
    Mutant(
        "Adam's moments", "minisd/optimizer.py", 'tensors[f"{name}/{item}"]', 'tensors[f"{name}/exp_avg"]',
        "a resumed run takes one moment for both", CHECKPOINT,
    ),
    Mutant(
        "weights of a resumed run", "minisd/run_state.py", "    copy_lora_weights(weights, state.unet)\n", "",
        "a resumed run starts with new adapters",
        ("tests/e2e/test_resume.py::test_stopped_four_times_and_read_by_workers",),
    ),
)  # fmt: skip
