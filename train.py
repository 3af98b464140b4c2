"""Train a LoRA into Stable Diffusion's UNet.

    python train.py --data DIR                                      one process
    torchrun --nproc-per-node=2 train.py --data DIR --output OUT    one process a GPU (gloo on CPU)

The loop is in `train`. A step is one optimizer update; a micro-step is one forward and backward pass. Everything random
about a sample is a function of (seed, its position in the run): see minisd/draws.py. Which picture it shows is the
plan's affair: see minisd/plan.py.
"""

import sys

from minisd.interruptions import StopRequest

STOP = StopRequest()
if __name__ == "__main__":
    STOP.install()  # before anything slow: a signal must not find a process that cannot answer it

from minisd.command_line import as_json, parse_args
from minisd.config import TrainConfig

CONFIG = parse_args(TrainConfig) if __name__ == "__main__" else None  # before torch: --help and refusals at once

import json
import logging
import math
import os
import socket
import time
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minisd import draws
from minisd.batches import Batch
from minisd.distributed import (
    Distributed,
    gather,
    process_group,
    set_timeout,
    sum_gradients,
    sum_over_ranks,
    wait_for_all,
)
from minisd.errors import MinisdError, Stopped, run_script
from minisd.guards import check_loss_scale, naming_sizes, refuse_non_finite
from minisd.hub_upload import check_can_push
from minisd.latent_cache import encode_moments
from minisd.lora import lora_parameters, lora_weights
from minisd.lora_writer import lora_bytes
from minisd.preflight import preflight
from minisd.publish import Publish, publish
from minisd.report.write import write_report
from minisd.run import Run, batches_from, prepare
from minisd.run_lock import output_lock
from minisd.run_state import save_run, write_if_new
from minisd.run_status import RunReport, reported
from minisd.trackers import MetricsLog, check_report_to
from minisd.training import diffusion_loss, latents_of, lr_at
from minisd.validation import is_due, validate

log = logging.getLogger("train")


def train(config: TrainConfig, dist: Distributed, stop: StopRequest = STOP, report: RunReport | None = None) -> Path:
    """Train an adapter; returns the path of the LoRA file.

    Args:
        config: the options.
        dist: this process among the others. All run this function; the main one writes.
        stop: how a signal asks for an end: the step is finished and saved first.
        report: told of every checkpoint.

    Raises:
        MinisdError: bad data, weights, checkpoint or settings, a full disk, or a loss that is not finite.
        Stopped: a signal came; the run goes on when it is started again.
    """
    run = prepare(config, dist, stop)
    unet, optimizer, scaler, progress = run.state.unet, run.state.optimizer, run.state.scaler, run.state.progress
    parameters = [parameter for _, parameter in lora_parameters(unet)]  # a list: AdamW would use an iterator up
    resumed_at = progress.step
    if report is not None:
        report.resumed(resumed_at)
    batches = batches_from(config, dist, run)
    told = MetricsLog(config.output, config.report_to, json.loads(as_json(config))) if dist.is_main else nullcontext()
    bar = tqdm(total=run.max_train_steps, initial=resumed_at, desc="train", unit="step", disable=not dist.is_main)

    with stop.deferred(), told as metrics:  # from here on a signal waits for the end of the step
        batch = next(batches, None)
        while True:
            if is_due(config, progress.step, run.max_train_steps):
                resumed = progress.step == resumed_at
                if not validate(config, dist, run, metrics, stop, resumed=resumed):  # measured when the run goes on
                    checkpoint = None if resumed else save(config, dist, run)
                    if report is not None and dist.is_main and checkpoint is not None:
                        report.saved(progress.step, checkpoint)
                    raise Stopped(stop.reason or "another process was asked to", checkpoint=checkpoint)
            if progress.step >= run.max_train_steps:
                break
            started = time.monotonic()
            lr = lr_at(
                progress.step - progress.skipped_steps,
                learning_rate=config.learning_rate,
                warmup_steps=config.lr_warmup_steps,
                max_train_steps=run.max_train_steps,
                scheduler=config.lr_scheduler,
            )
            for group in optimizer.param_groups:
                group["lr"] = lr

            loss_sum = torch.zeros((), device=dist.device)  # stays there: nothing waits inside an accumulation
            positions: list[int] = []
            for _ in range(run.accumulation_steps):
                assert batch is not None
                positions += batch.positions
                loss = loss_of(config, run, batch.to(dist.device))
                # The mean over the step's images: over the micro-batch already, over micro-steps and ranks by division.
                loss = loss / (run.accumulation_steps * dist.world_size)
                scaler.scale(loss).backward()
                loss_sum += loss.detach()
                batch = next(batches, None)  # read and drawn while the device works

            sum_gradients(dist, parameters)
            scaler.unscale_(optimizer)  # so that the true gradients are clipped, not the scaled ones
            max_norm = config.max_grad_norm if config.max_grad_norm > 0 else math.inf
            norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
            asked = loss_sum.new_tensor(float(stop.requested))  # one is asked to stop: all do, after this step
            total = sum_over_ranks(dist, torch.stack([loss_sum, asked]))
            mean_loss, stopping, grad_norm = *total.tolist(), norm.item()  # the one place that waits for the device
            if not math.isfinite(mean_loss) or (not math.isfinite(grad_norm) and not scaler.is_enabled()):
                raise refuse_non_finite(
                    config.output,
                    dist,
                    progress.step,
                    mean_loss=mean_loss,
                    own_loss=loss_sum.item(),
                    grad_norm=grad_norm,
                    lr=lr,
                    loss_scale=scaler.get_scale(),
                    pictures=[run.samples.path_of(position).name for position in positions],
                )
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            progress.step += 1
            if report is not None:
                report.step = progress.step
            skipped = scaler.get_scale() < scale  # float16 overflow: no update, and the rate waits, too
            progress.skipped_steps += skipped
            progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if skipped else 0
            check_loss_scale(progress.step, progress.skipped_in_a_row, scaler.get_scale())
            if progress.step == resumed_at + 1:
                set_timeout(dist, config.dist_timeout)

            if metrics is not None:
                seconds = time.monotonic() - started
                values = {
                    "loss": mean_loss,
                    "lr": lr,
                    "grad_norm": grad_norm,
                    "images_seen": progress.step * run.images_per_step,
                    "skipped": progress.skipped_steps,
                    "seconds": round(seconds, 4),
                    "images_per_second": round(run.images_per_step / seconds, 2),
                }
                metrics.log(progress.step, values)
                bar.set_postfix(loss=f"{mean_loss:.4f}", lr=f"{lr:.2e}", skipped=progress.skipped_steps, refresh=False)
                bar.update()
            if progress.step % config.checkpointing_steps == 0 or progress.step == run.max_train_steps or stopping:
                checkpoint = save(config, dist, run)
                if report is not None and dist.is_main:
                    report.saved(progress.step, checkpoint)
            if stopping:
                raise Stopped(stop.reason or "another process was asked to", checkpoint=checkpoint)
    bar.close()
    return finish(config, dist, run)


def loss_of(config: TrainConfig, run: Run, batch: Batch) -> Tensor:
    """The loss of a micro-batch on its device: latents drawn, noised, denoised."""
    moments = batch.moments
    if moments is None:
        assert batch.pixel_values is not None
        moments = encode_moments(run.model.vae, batch.pixel_values)
    latents = latents_of(run.model.vae, moments, batch.posterior_noise)  # [B, 4, h, w] float32
    if config.lora_dropout:
        torch.manual_seed(draws.dropout_seed(config.seed, batch.positions[0]))
    return diffusion_loss(
        run.predict,
        run.schedule,
        latents,
        batch.noise,
        batch.timesteps,
        batch.conditioning(run.precision.dtype),
        dtype=run.precision.dtype,
        snr_gamma=config.snr_gamma,
    )


def save(config: TrainConfig, dist: Distributed, run: Run) -> Path:
    """Save the run where it stands, on the main rank; returns the checkpoint's path on all."""
    if dist.is_main:
        circumstances = {
            "world_size": dist.world_size,
            "train_batch_size": config.train_batch_size,
            "gradient_accumulation_steps": run.accumulation_steps,
            "steps_per_epoch": run.samples.plan.steps_per_epoch,
            "epoch": run.state.progress.step // run.samples.plan.steps_per_epoch,
            "images_seen": run.state.progress.step * run.images_per_step,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": str(dist.device),
        }
        save_run(config, run.state, circumstances)
    wait_for_all(dist)
    return config.output / "checkpoints" / f"step-{run.state.progress.step:06d}"


def finish(config: TrainConfig, dist: Distributed, run: Run) -> Path:
    """Write OUTPUT/lora.safetensors, on the main rank."""
    path = config.output / "lora.safetensors"
    if dist.is_main:
        weights = {"unet": lora_weights(run.state.unet)}
        write_if_new(path, lora_bytes(weights, run.state.info, lora_format=config.lora_format))
        log.info("complete: %s", path)
    wait_for_all(dist)
    return path


def main(config: TrainConfig) -> None:
    """Join the other processes, take the output folder, and train."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    check_report_to(config.report_to)
    with STOP.raising(), process_group() as dist, naming_sizes(config), ExitStack() as stack:
        if not dist.is_main:
            logging.getLogger().setLevel(logging.WARNING)
        if dist.is_main:
            # Ranks whose torchrun was killed are still at their last save.
            stack.enter_context(output_lock(config.output, patience=5))
            if config.hub_model_id is not None and not config.preflight:
                private, license_name = config.hub_private_repo, config.hub_license
                check_can_push(config.hub_model_id, private=private, license_name=license_name)
        wait_for_all(dist)
        if config.preflight:
            preflight(config, dist, train)
            return
        report = stack.enter_context(reported(config.output, dist.rank))
        report.processes = [(host, pid) for host, pid in gather(dist, [socket.gethostname(), os.getpid()])]
        train(config, dist, STOP, report)
    if dist.is_main:  # after run_status.json says that the run is done
        show(config)


def show(config: TrainConfig) -> None:
    """Write the report of a complete run, and publish the run, where that is asked for. On the main rank.

    Raises:
        MinisdError: the run cannot be published; where the Hub is the reason, it says how to publish later.
    """
    if config.report:
        try:
            write_report(config.output)
        except MinisdError as error:  # the run itself is whole, and the report can be written at any time
            log.warning("the report could not be written: %s", error)
    if config.hub_model_id is not None:
        private, license_name = config.hub_private_repo, config.hub_license
        publish(Publish(run=config.output, hub_model_id=config.hub_model_id, license=license_name, private=private))


if __name__ == "__main__":
    assert CONFIG is not None
    rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    sys.exit(run_script(partial(main, CONFIG), debug=CONFIG.debug, prefix=rank))
