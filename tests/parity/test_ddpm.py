"""The noise schedule against diffusers' DDPMScheduler, its laws, and the reading of scheduler_config.json."""

import diffusers
import pytest
import torch

from minisd.ddpm import NoiseSchedule, NoiseScheduleConfig
from minisd.errors import WeightsError
from minisd.samplers import default_spacing

pytestmark = pytest.mark.filterwarnings("ignore:__array__")  # diffusers with numpy 2

PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
COMMON = {
    **BETAS,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "_diffusers_version": "0.6.0",
}
# The scheduler_config.json of four models of the Hub.
HUB = {
    "sd-1.5": {"_class_name": "PNDMScheduler", **COMMON},
    "sd-2.1-base": {"_class_name": "PNDMScheduler", **COMMON, "clip_sample": False, "prediction_type": "epsilon"},
    "sd-2.1": {"_class_name": "DDIMScheduler", **COMMON, "clip_sample": False, "prediction_type": "v_prediction"},
    "sdxl": {
        "_class_name": "EulerDiscreteScheduler",
        **COMMON,
        "clip_sample": False,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "interpolation_type": "linear",
        "use_karras_sigmas": False,
        "sample_max_value": 1.0,
    },
}


def draw(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
def test_tables_equal_the_oracle(beta_schedule, zero_snr):
    ours = NoiseSchedule(NoiseScheduleConfig(beta_schedule=beta_schedule, rescale_betas_zero_snr=zero_snr))
    oracle = diffusers.DDPMScheduler(
        **{**BETAS, "beta_schedule": beta_schedule}, num_train_timesteps=1000, rescale_betas_zero_snr=zero_snr
    )
    torch.testing.assert_close(ours.betas, oracle.betas, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ours.alphas_cumprod, oracle.alphas_cumprod, rtol=1e-6, atol=1e-9)


def test_stable_diffusion_numbers():
    schedule = NoiseSchedule(NoiseScheduleConfig())
    at = [0, 1, 250, 500, 750, 998, 999]
    expected = torch.tensor([0.99914998, 0.99829602, 0.67379230, 0.27633247, 0.05616980, 0.00471670, 0.00466010])
    torch.testing.assert_close(schedule.alphas_cumprod[at], expected, rtol=0, atol=1e-7)
    betas = torch.tensor([0.00085, 0.0008546986, 0.0048149535, 0.012])
    torch.testing.assert_close(schedule.betas[[0, 1, 500, 999]], betas, rtol=1e-6, atol=0)
    snr = schedule.snr(torch.tensor([0, 500, 999]))
    torch.testing.assert_close(snr, torch.tensor([1175.44, 0.381850, 0.00468191]), rtol=1e-5, atol=0)
    zero = NoiseSchedule(NoiseScheduleConfig(rescale_betas_zero_snr=True)).alphas_cumprod[[0, 1, 500, 998, 999]]
    expected = torch.tensor([0.99914998, 0.99823350, 0.24101864, 1.968e-7, 0.0])
    torch.testing.assert_close(zero, expected, rtol=1e-3, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_add_noise_and_velocity_equal_the_oracle(dtype, tolerance):
    ours, oracle = NoiseSchedule(NoiseScheduleConfig()), diffusers.DDPMScheduler(**BETAS)
    latents, noise, timesteps = draw(0, dtype), draw(1, dtype), torch.tensor([0, 500, 999])
    for got, expected in [
        (ours.add_noise(latents, noise, timesteps), oracle.add_noise(latents, noise, timesteps)),
        (ours.velocity(latents, noise, timesteps), oracle.get_velocity(latents, noise, timesteps)),
    ]:
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("timestep", [0, 500, 999])
def test_step_equals_the_oracle(timestep, prediction_type, dtype, tolerance):
    ours = NoiseSchedule(NoiseScheduleConfig(prediction_type=prediction_type))
    oracle = diffusers.DDPMScheduler(**BETAS, prediction_type=prediction_type, clip_sample=False)
    output, sample, noise = draw(0, dtype), draw(1, dtype), draw(2, dtype) if timestep else None
    got = ours.step(output, timestep, timestep - 1, sample, noise)
    expected = oracle.step(output, timestep, sample, generator=torch.Generator().manual_seed(2)).prev_sample
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_output_gives_back_latents_and_noise(prediction_type):
    schedule = NoiseSchedule(NoiseScheduleConfig(prediction_type=prediction_type))
    latents, noise, timesteps = draw(0), draw(1), torch.tensor([0, 500, 999])
    noisy = schedule.add_noise(latents, noise, timesteps)
    target = schedule.target(latents, noise, timesteps)
    expected = {"epsilon": noise, "v_prediction": schedule.velocity(latents, noise, timesteps), "sample": latents}
    assert torch.equal(target, expected[prediction_type])
    torch.testing.assert_close(schedule.predict_original(target, noisy, timesteps), latents, rtol=0, atol=1e-10)
    torch.testing.assert_close(schedule.predict_epsilon(target, noisy, timesteps), noise, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_latents_get_their_noise_at_t_0(dtype):
    schedule = NoiseSchedule(NoiseScheduleConfig())
    latents, noise, timesteps = torch.zeros(3, 4, 8, 8, dtype=dtype), draw(1, dtype), torch.tensor([0, 1, 2])
    noisy = schedule.add_noise(latents, noise, timesteps)
    assert noisy.dtype == dtype
    exact = schedule.add_noise(latents.double(), noise.double(), timesteps)
    torch.testing.assert_close(noisy.double(), exact, rtol=0.005, atol=1e-7)
    assert schedule.predict_epsilon(noise, noisy, timesteps).dtype == dtype


def test_to_moves_both_tables():
    moved = NoiseSchedule(NoiseScheduleConfig()).to("meta")
    assert moved.betas.device.type == moved.alphas_cumprod.device.type == "meta"


def test_hub_configs_are_read():
    read = {name: NoiseScheduleConfig.from_json(data, xl=name == "sdxl") for name, data in HUB.items()}
    sd15 = NoiseScheduleConfig(set_alpha_to_one=False)
    assert read["sd-1.5"] == read["sd-2.1-base"] == sd15
    assert read["sd-2.1"] == NoiseScheduleConfig(
        set_alpha_to_one=False, prediction_type="v_prediction", class_name="DDIMScheduler"
    )
    assert read["sdxl"] == NoiseScheduleConfig(
        set_alpha_to_one=False, timestep_spacing="leading", class_name="EulerDiscreteScheduler"
    )
    assert NoiseScheduleConfig.from_json({}) == NoiseScheduleConfig()


@pytest.mark.parametrize("model", HUB)
@pytest.mark.parametrize(
    ("sampler", "oracle_class"),
    [
        ("ddpm", diffusers.DDPMScheduler),
        ("ddim", diffusers.DDIMScheduler),
        ("euler", diffusers.EulerDiscreteScheduler),
        ("euler-a", diffusers.EulerAncestralDiscreteScheduler),
        ("dpm++2m", diffusers.DPMSolverMultistepScheduler),
    ],
)
def test_default_spacing_is_what_swapping_the_scheduler_gives(model, sampler, oracle_class):
    config = NoiseScheduleConfig.from_json(HUB[model], xl=model == "sdxl")
    of_the_folder = getattr(diffusers, HUB[model]["_class_name"]).from_config(HUB[model])
    swapped = oracle_class.from_config(of_the_folder.config)
    assert default_spacing(config, sampler) == swapped.config.timestep_spacing
    assert config.steps_offset == swapped.config.steps_offset
    assert config.prediction_type == swapped.config.prediction_type
    assert config.set_alpha_to_one == swapped.config.get("set_alpha_to_one", False)


def test_steps_offset_follows_the_pipelines():
    assert NoiseScheduleConfig.from_json({"steps_offset": 0}).steps_offset == 1
    assert NoiseScheduleConfig.from_json({"steps_offset": 0}, xl=True).steps_offset == 0
    assert NoiseScheduleConfig.from_json({}, xl=True).steps_offset == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("trained_betas", [0.1, 0.2]),
        ("beta_schedule", "sigmoid"),
        ("beta_start", "0.1"),
        ("beta_end", 1.5),
        ("num_train_timesteps", True),
        ("num_train_timesteps", 0),
        ("prediction_type", "flow_prediction"),
        ("timestep_spacing", "karras"),
        ("thresholding", True),
        ("variance_type", "learned_range"),
        ("final_sigmas_type", "sigma_min"),
        ("use_exponential_sigmas", True),
        ("sigma_max", 80.0),
        ("shift", 3.0),
        ("_class_name", "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(field, value):
    with pytest.raises(WeightsError) as refusal:
        NoiseScheduleConfig.from_json({**HUB["sd-1.5"], field: value})
    assert field in str(refusal.value)
    assert repr(value) in str(refusal.value)
    assert "supported: " in str(refusal.value)


def test_inert_fields_are_accepted_and_xl_may_not_clip():
    solver = {"solver_order": 3, "algorithm_type": "sde-dpmsolver++", "lambda_min_clipped": -float("inf")}
    assert NoiseScheduleConfig.from_json({**HUB["sd-1.5"], **solver, "clip_sample": True}).prediction_type == "epsilon"
    assert NoiseScheduleConfig.from_json({"use_karras_sigmas": True, "use_beta_sigmas": False}).use_karras_sigmas
    with pytest.raises(WeightsError, match="clip_sample"):
        NoiseScheduleConfig.from_json({"clip_sample": True}, xl=True)
