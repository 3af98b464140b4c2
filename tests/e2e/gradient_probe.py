"""Run train.py's loop and keep what each step was made of: samples, noise, and gradients after the all-reduce.

Used in-process, and under torchrun as `gradient_probe.py RUNS.json`, where RUNS.json maps a file to write to a run's
options. Adam is replaced by an update that does not depend on the gradients, so that rounding in one step cannot be
amplified into the next, and all steps can be compared to rounding.
"""

import hashlib
import json
import sys
from unittest import mock

import safetensors.torch
import torch

import train
from minisd.command_line import parse_args
from minisd.config import TrainConfig
from minisd.distributed import gather, process_group


def probe(config, dist):
    """{"step/parameter index": gradient} of a whole run, and {position: what was drawn and read for it}."""
    gradients, drawn = {}, {}
    steps = iter(range(1_000_000))
    original_clip, original_loss = torch.nn.utils.clip_grad_norm_, train.loss_of

    def clip(parameters, max_norm):
        step = next(steps)
        gradients.update({f"{step}/{i:03d}": p.grad.clone() for i, p in enumerate(parameters)})
        return original_clip(parameters, max_norm)

    def loss_of(config, run, batch):
        for i, position in enumerate(batch.positions):
            tensors = (batch.noise[i], batch.posterior_noise[i], batch.encoder_hidden_states[i])
            content = b"".join(tensor.numpy().tobytes() for tensor in tensors)
            found = [batch.indices[i], int(batch.timesteps[i]), hashlib.sha256(content).hexdigest()]
            drawn[str(position)] = found
        return original_loss(config, run, batch)

    def step(optimizer):
        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    moves = torch.arange(parameter.numel(), dtype=torch.float32).sin().view_as(parameter)
                    parameter += 0.02 * moves

    with (
        mock.patch.object(torch.nn.utils, "clip_grad_norm_", clip),
        mock.patch.object(train, "loss_of", loss_of),
        mock.patch.object(torch.optim.AdamW, "step", step),
        mock.patch.object(train, "save", lambda config, dist, run: config.output),
    ):
        train.train(config, dist)
    everyone = {}
    for part in gather(dist, drawn):
        assert not everyone.keys() & part.keys()
        everyone |= part
    return gradients, everyone


if __name__ == "__main__":
    with open(sys.argv[1]) as file:  # noqa: PTH123
        runs = json.load(file)
    with process_group() as dist:
        for name, words in runs.items():
            gradients, drawn = probe(parse_args(TrainConfig, words), dist)
            data = safetensors.torch.save(gradients, metadata={"drawn": json.dumps(drawn)})
            with open(f"{name}.rank{dist.rank}.safetensors", "wb") as file:  # noqa: PTH123
                file.write(data)
