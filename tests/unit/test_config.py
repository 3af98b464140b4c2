"""The checks of the options, and what follows from what."""

from pathlib import Path

import pytest

from minisd.config import TrainConfig
from minisd.errors import UsageError
from minisd.sample_config import SampleConfig


def test_defaults_follow_from_each_other():
    assert TrainConfig(data="x", rank=8).scale_alpha == 8.0
    assert TrainConfig(data="x", alpha=2.0).scale_alpha == 2.0


@pytest.mark.parametrize("options", [{}, {"prompt": ("a",), "num_images": 0}, {"prompt": ("a",), "seed": -1},
                                     {"prompt": ("a",), "guidance_scale": float("nan")},
                                     {"prompt": ("a",), "height": 0}])  # fmt: skip
def test_sample_options_are_checked(options):
    with pytest.raises(UsageError):
        SampleConfig(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"validation_split": 0.1, "validation_data": Path("y")}, "--validation-data and --validation-split exclude"),
        ({"validation_split": -0.1}, r"--validation-split -0.1: expected a share from 0 to 0.5, such as 0.1"),
        ({"validation_split": 0.51}, "--validation-split 0.51: expected a share"),
        ({"validation_split": float("nan")}, "--validation-split nan: expected a share"),
        ({"push_to_hub": True}, "--push-to-hub and --hub-model-id USER/NAME go together"),
        ({"hub_model_id": "me/mine"}, "--push-to-hub and --hub-model-id USER/NAME go together"),
        *(
            ({"push_to_hub": True, "hub_model_id": name}, f"--hub-model-id {name}: expected USER/NAME")
            for name in ("mine", "me/", "/mine", "a/b/c", "me/x--y", "me/x..y", "me/.x", "me/x.git", "me/x y",
                         "m" * 95 + "/x")
        ),
    ],
)  # fmt: skip
def test_training_options_that_cannot_be_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        TrainConfig(data="x", **options)


def test_names_of_repositories_pass():
    for name in ("me/mine", "Some-Org/sd_1.5-lora", "m" * 94 + "/x"):
        assert TrainConfig(data="x", push_to_hub=True, hub_model_id=name).hub_model_id == name
