"""Which pictures are drawn together, and which number each gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minisd.picture_record import PictureRecord
from minisd.sample_config import SampleConfig


@dataclass(frozen=True)
class Batch:
    """Pictures drawn in one go.

    Attributes:
        config: of one prompt.
        seeds: of the pictures.
        numbers: place among the seeds -> number of the picture. A place that is not here is drawn and thrown away.
        lora_factor: what the LoRAs' strengths are multiplied by.
    """

    config: SampleConfig
    seeds: Sequence[int]
    numbers: Mapping[int, int]
    lora_factor: float = 1.0


def plan(configs: Sequence[SampleConfig], record: PictureRecord | None, sweep: Sequence[float]) -> list[Batch]:
    """Cut the pictures into batches of one prompt and one strength.

    Args:
        configs: a prompt each.
        record: of the picture to repeat. Unless other seeds are asked for, the pictures that it was drawn together with
            are drawn again: its last bits depend on how many they are.
        sweep: factors of the LoRAs' strengths; pictures are numbered prompt by prompt, seed by seed, then by factor.
    """
    batches = []
    for index, config in enumerate(configs):
        seeds = [config.seed + image for image in range(config.num_images)]
        row, size = index * config.num_images, config.batch_size
        if record is not None and size == 1 and seeds == [record.seeds[record.place]]:
            groups = [(list(record.seeds), {record.place: row})]
        else:
            groups = [
                (seeds[i : i + size], {place: row + i + place for place in range(len(seeds[i : i + size]))})
                for i in range(0, len(seeds), size)
            ]
        for group, rows in groups:
            for column, factor in enumerate(sweep):
                numbers = {place: row * len(sweep) + column for place, row in rows.items()}
                batches.append(Batch(config, group, numbers, factor))
    return batches
