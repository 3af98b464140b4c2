"""The options of train.py, and how all options are checked. sample_config.py has those of sample.py.

Option names are those of diffusers' training scripts where the meaning is the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from minisd.errors import UsageError

DEFAULT_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
DEFAULT_OUTPUT = Path("output")
DEFAULT_STEPS = 2000
MAX_SPLIT = 0.5  # of --validation-split: most pictures are there to be trained on


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a LoRA into the attention projections of Stable Diffusion's UNet."""

    data: Path
    """Folder of pictures with captions: DATA/train/metadata.csv with columns file_name,text (or metadata.jsonl, or a
    .txt file beside each picture, one caption a line)."""
    output: Path = DEFAULT_OUTPUT
    """Folder for lora.safetensors, report.html, metrics.jsonl, config.json, run_status.json, checkpoints/, samples/."""
    model: str = DEFAULT_MODEL
    """Base model: a repo id on the Hub, a folder in diffusers layout, a single .safetensors file, or "pocket", the
    small model in this folder."""
    revision: str | None = None
    """Branch, tag or commit of the repo on the Hub."""
    variant: str | None = None
    """Variant of the weight files, such as fp16."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the base model predicts, where its file does not say: a single file of SD 2.x."""

    resolution: int | None = None
    """Training pictures have about resolution^2 pixels; the model's own size if not given."""
    buckets: bool = True
    """Keep each picture's shape, nearly: pictures of like shape are trained together. --no-buckets cuts squares."""
    bucket_step: int | None = None
    """Sides of the buckets are multiples of this many pixels; 64 if not given, less for a model of small pictures."""
    upscale: bool = False
    """Enlarge pictures that are smaller than their bucket, instead of giving them a smaller one."""
    center_crop: bool = True
    """Crop the middle of each picture; --no-center-crop takes a random part each time, and needs --no-cache-latents."""
    random_flip: bool = False
    """Mirror every other picture at random."""
    caption_dropout: float = 0.1
    """Share of samples trained without their caption, which keeps classifier-free guidance healthy."""
    max_caption_tokens: int = 225
    """Captions are cut there. One of more than 75 tokens is read in chunks, and then all are padded to as many."""
    trigger: str | None = None
    """The word that calls the style up: put in front of captions and validation prompts that do not have it, or in the
    place of [trigger] in them, and written into the LoRA file."""
    cache_latents: bool = True
    """Encode each picture once, before training; --no-cache-latents encodes it each time it comes up."""
    cache_dir: Path | None = None
    """Folder of cached latents and text embeddings; OUTPUT/cache if not given. Runs may share one."""

    train_batch_size: int = 1
    """Pictures in one forward pass of one process (a micro-step)."""
    gradient_accumulation_steps: int | None = None
    """Micro-steps in an optimizer update (a step); 4 if neither this nor --global-batch-size is given."""
    global_batch_size: int | None = None
    """Pictures in a step, over all processes and micro-steps; gives the accumulation."""
    max_train_steps: int | None = None
    """Length of the run in steps. Give this or --num-train-epochs; 2000 steps if neither."""
    num_train_epochs: int | None = None
    """Length of the run in epochs, rounded up to whole steps."""
    dataloader_num_workers: int = 0
    """Processes that read pictures ahead, for each training process."""

    learning_rate: float = 1e-4
    """Highest learning rate."""
    lr_scheduler: Literal["cosine", "constant"] = "cosine"
    """What the learning rate does after the warmup: fall to zero by a half cosine, or stay."""
    lr_warmup_steps: int = 0
    """Steps of linear warmup."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """AdamW, or the one of bitsandbytes with moments of 8 bits (pip install bitsandbytes)."""
    weight_decay: float = 1e-2
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """dtype of the frozen weights and of the activations. The adapter and Adam's moments are always float32."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, a third more time."""
    compile: bool = False
    """Compile the UNet with torch.compile: minutes at the start, faster steps after it."""
    snr_gamma: float | None = None
    """Weight the loss by min(SNR, gamma) / SNR (min-SNR); 5 is usual, no weighting if not given."""
    noise_offset: float = 0.0
    """Shift the noise of each channel as a whole by this much of a normal draw, for darker and lighter pictures."""
    zero_terminal_snr: bool = False
    """Let the noise schedule end in pure noise, for a v-prediction model whose own does not."""

    rank: int = 16
    """Rank of the adapters."""
    alpha: float | None = None
    """The adapters are scaled by alpha / rank; alpha is rank if not given."""
    lora_dropout: float = 0.0
    """Dropout on the adapters' input."""
    lora_targets: Literal["attn", "attn+ff", "all"] = "attn"
    """Layers that get an adapter: the attention projections, the feed-forward layers too, or convolutions as well."""
    lora_format: Literal["kohya", "peft"] = "kohya"
    """Names in OUTPUT/lora.safetensors: those that every program reads, or those of diffusers and PEFT."""
    init_lora: Path | None = None
    """Start from the weights of this LoRA file, with a fresh optimizer. Not a way to resume."""

    checkpointing_steps: int = 500
    """Save the state of the run every this many steps, and at its end."""
    checkpoints_total_limit: int = 3
    """Checkpoints kept, the newest ones; at least 2."""
    resume_from_checkpoint: str = "latest"
    """"latest" goes on from the newest sound checkpoint in OUTPUT, if any; "never" sets an earlier run aside and starts
    anew; or the path of a checkpoint."""
    allow_change: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Resume although this option, or "dataset", differs from the checkpoint's; may be given several times."""

    validation_prompts: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Draw this prompt before training, along the run and at its end; may be given several times."""
    validation_steps: int = 250
    """Draw the validation prompts, and measure the validation loss, every this many steps."""
    validation_num_images: int = 1
    """Pictures of each validation prompt, from seed, seed + 1 ..."""
    validation_inference_steps: int = 25
    """Sampler steps of a validation picture."""
    validation_guidance_scale: float = 7.5
    """Guidance of a validation picture."""
    validation_data: Path | None = None
    """Folder of captioned pictures, like DATA, that are not trained on: along the run, the loss on some of them and on
    some training pictures is compared with the base model's."""
    validation_split: float = 0.0
    """Hold about this share of DATA back for that, instead of --validation-data; which pictures follows from their
    content and the seed."""
    report_to: Literal["auto", "tensorboard", "wandb", "none"] = "auto"
    """Where curves and pictures are shown, beside metrics.jsonl; auto is TensorBoard if it is installed."""
    report: bool = True
    """Write OUTPUT/report.html at the end: recipe, data, curves and pictures on one page."""

    push_to_hub: bool = False
    """At the end, publish the LoRA with a model card and sample pictures on the Hugging Face Hub. Needs --hub-model-id
    and a token of yours (hf auth login, or HF_TOKEN in the environment)."""
    hub_model_id: str | None = None
    """The repository to publish to, USER/NAME. It is made when the run starts, if it is not there."""
    hub_private_repo: bool = False
    """If the repository is made, only you can see it."""
    hub_license: str | None = None
    """Licence on the model card, in the Hub's spelling: openrail++, cc-by-4.0 ... If not given, that of the base's
    family: creativeml-openrail-m for SD 1.x, openrail++ for SD 2.x and XL."""

    preflight: bool = False
    """Do not train: try three steps, a picture, a save and a reload, and say what the run will need."""
    dist_timeout: float = 300.0
    """Seconds that processes wait for each other after the first step before the run is given up."""
    seed: int = 0
    """Everything random about the run follows from it."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        if self.max_train_steps is not None and self.num_train_epochs is not None:
            raise UsageError("--max-train-steps and --num-train-epochs exclude each other. Leave one out.")
        if self.gradient_accumulation_steps is not None and self.global_batch_size is not None:
            raise UsageError("--gradient-accumulation-steps and --global-batch-size exclude each other. Leave one out.")
        if self.validation_data is not None and self.validation_split:
            raise UsageError("--validation-data and --validation-split exclude each other. Leave one out.")
        if self.push_to_hub != (self.hub_model_id is not None):
            raise UsageError("--push-to-hub and --hub-model-id USER/NAME go together. Give both, or none.")
        if not self.push_to_hub and (self.hub_private_repo or self.hub_license is not None):
            raise UsageError("--hub-private-repo and --hub-license are for --push-to-hub. Leave them out, or add it.")
        if self.hub_model_id is not None:
            check_hub_model_id(self.hub_model_id)
        if self.cache_latents and not self.center_crop:
            raise UsageError(
                "--no-center-crop: random crops cannot be cached. Add --no-cache-latents, or leave it out."
            )
        for name in ("train_batch_size", "gradient_accumulation_steps", "global_batch_size", "max_train_steps",
                     "num_train_epochs", "rank", "checkpointing_steps", "resolution", "bucket_step",
                     "validation_steps", "validation_num_images", "validation_inference_steps"):  # fmt: skip
            value = getattr(self, name)
            if value is not None:
                check(name, value, value >= 1, "a whole number of at least 1")
        check("learning_rate", self.learning_rate, 0 < self.learning_rate < 1, "a number between 0 and 1, such as 1e-4")
        tokens = self.max_caption_tokens
        check("max_caption_tokens", tokens, 1 <= tokens <= 1500, "from 75 to 1500")
        check("alpha", self.alpha, self.alpha is None or 0 < self.alpha < 1e6, "a positive number")
        check("snr_gamma", self.snr_gamma, self.snr_gamma is None or 0 < self.snr_gamma < 1e6, "a positive number")
        check("dist_timeout", self.dist_timeout, 1 <= self.dist_timeout < 1e6, "seconds, at least 1")
        check("noise_offset", self.noise_offset, 0 <= self.noise_offset <= 1, "a number from 0 to 1, such as 0.05")
        guidance = self.validation_guidance_scale
        check("validation_guidance_scale", guidance, 0 <= guidance < 1000, "a number from 0 to 1000")
        for name in ("lora_dropout", "caption_dropout"):
            check(name, getattr(self, name), 0 <= getattr(self, name) < 1, "a share from 0 up to, not including, 1")
        split = self.validation_split
        check("validation_split", split, 0 <= split <= MAX_SPLIT, f"a share from 0 to {MAX_SPLIT}, such as 0.1")
        for name in ("lr_warmup_steps", "weight_decay", "max_grad_norm", "dataloader_num_workers", "seed"):
            check(name, getattr(self, name), 0 <= getattr(self, name) < 2**63, "0 or more")
        check("checkpoints_total_limit", self.checkpoints_total_limit, self.checkpoints_total_limit >= 2,
               "at least 2: the newest may be the one being written")  # fmt: skip
        if self.trigger is not None and not self.trigger.strip():
            raise UsageError("--trigger is empty. Give a word, or leave it out.")

    @property
    def scale_alpha(self) -> float:
        """Alpha, or its default."""
        return float(self.rank) if self.alpha is None else self.alpha

    @property
    def cache_folder(self) -> Path:
        """Where latents and text embeddings are cached."""
        return self.output / "cache" if self.cache_dir is None else self.cache_dir

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-steps in a step of `world_size` processes.

        Raises:
            UsageError: --global-batch-size cannot be split so; names the nearest sizes that can.
        """
        if self.global_batch_size is None:
            return 4 if self.gradient_accumulation_steps is None else self.gradient_accumulation_steps
        micro = world_size * self.train_batch_size
        steps, rest = divmod(self.global_batch_size, micro)
        if rest:
            nearest = " or ".join(str(size) for size in (steps * micro, (steps + 1) * micro) if size)
            raise UsageError(
                f"--global-batch-size {self.global_batch_size}: {world_size} processes of --train-batch-size "
                f"{self.train_batch_size} make multiples of {micro}. Choose {nearest}, or another --train-batch-size."
            )
        return steps


def check(name: str, value: Any, ok: bool, wanted: str) -> None:
    """Refuse the value of an option. Raises UsageError if it is not `ok`."""
    if not ok:
        raise UsageError(f"--{name.replace('_', '-')} {value}: expected {wanted}.")


def check_hub_model_id(name: str) -> None:
    """Refuse what cannot be the name of a repository of one's own on the Hub. Raises UsageError."""
    # The Hub's rule: letters, digits, "-", "_", "."; none of "-" and "." at an end, nor "--" and ".."; at most 96.
    well_formed = re.fullmatch(r"[A-Za-z0-9][\w.-]*/\w(?:[\w.-]*\w)?", name, re.ASCII)
    if not well_formed or "--" in name or ".." in name or name.endswith(".git") or len(name) > 96:
        raise UsageError(f"--hub-model-id {name}: expected USER/NAME, of letters, digits, '-', '_' and '.'.")
