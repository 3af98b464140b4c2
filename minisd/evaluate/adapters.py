"""A model whose adapters become those of one checkpoint after the other."""

from __future__ import annotations

import logging
from dataclasses import replace

from minisd.config import TrainConfig
from minisd.errors import WeightsError
from minisd.evaluate.run_folder import Candidate
from minisd.lora import copy_lora_weights, lora_weights, set_lora_scale
from minisd.lora_reader import load_lora
from minisd.run_setup import add_adapter
from minisd.weights import StableDiffusion

log = logging.getLogger(__name__)

ADAPTER = "default"  # its name in the UNet, as in training


class Checkpoints:
    """The adapters of a run in its model, which is the same to the last bit as it was in training.

    Args:
        model: changed: its UNet gets adapters, at strength 0.
        run: the run's options.
    """

    def __init__(self, model: StableDiffusion, run: TrainConfig) -> None:
        self._unet, self._folder = model.unet, run.output
        add_adapter(replace(run, init_lora=None), self._unet)
        self._unet.eval()
        self.set_strength(0)

    def put_in(self, candidate: Candidate) -> bool:
        """Make the model that of a checkpoint, at strength 1; False if the run has deleted the checkpoint meanwhile.

        Raises:
            WeightsError: the file cannot be read, or is for other layers.
        """
        if candidate.lora is None:
            self.set_strength(0)
            return True
        path = self._folder / candidate.lora
        try:
            weights = load_lora(path, {"unet": self._unet}).parts["unet"]
        except WeightsError:
            if path.exists():
                raise
            log.warning("passing over step %d: the run has deleted its checkpoint", candidate.step)
            return False
        kinds = {name: (lora.rank, lora.alpha) for name, lora in lora_weights(self._unet).items()}
        if {name: (lora.rank, lora.alpha) for name, lora in weights.items()} != kinds:
            raise WeightsError(
                f"{path}: for other layers, or of another rank or alpha, than the run's config.json says."
            )
        copy_lora_weights(weights, self._unet)
        self.set_strength(1)
        return True

    def set_strength(self, lora_scale: float) -> None:
        """Scale the adapters; 0 is exactly the base model."""
        set_lora_scale(self._unet, ADAPTER, lora_scale)
