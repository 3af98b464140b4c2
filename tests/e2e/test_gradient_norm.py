"""The gradient norm of a step, as it is logged and clipped: the same however the step is computed."""

import pytest

import train
from tests.e2e.running import ALONE, config_for, metrics_of


@pytest.fixture(scope="module")
def norm_of(tiny_folder, dataset, tmp_path_factory):
    """Options -> gradient norm of the first step."""

    def norm(**options):
        output = tmp_path_factory.mktemp("run")
        train.train(config_for(tiny_folder, dataset, output, max_train_steps=1, **options), ALONE)
        return metrics_of(output)[0]["grad_norm"]

    return norm


def test_four_micro_steps_have_the_norm_of_one_batch_of_four(norm_of):
    together = norm_of(train_batch_size=4, gradient_accumulation_steps=1)
    assert norm_of(train_batch_size=1, gradient_accumulation_steps=4) == pytest.approx(together, rel=1e-4)


def test_the_norm_in_float16_is_of_the_true_gradients_and_not_of_the_scaled_ones(norm_of):
    one = {"train_batch_size": 1, "gradient_accumulation_steps": 1}
    assert norm_of(**one, mixed_precision="fp16") == pytest.approx(norm_of(**one), rel=0.05)
