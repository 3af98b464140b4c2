"""What is written into a picture, read back by A1111's parser and by our own."""

import json
import re
from dataclasses import asdict, replace

import pytest
from PIL import Image

from minisd.a1111_text import parameters_text
from minisd.config import DEFAULT_OUTPUT
from minisd.errors import UsageError
from minisd.images import save_png
from minisd.lora_choice import LoRAChoice, lora_hashes, prompt_with_loras
from minisd.picture_record import LoRARecord, Origin, PictureRecord, read_record, recorded_options, to_json
from minisd.sample_config import SampleConfig
from minisd.samplers import SAMPLERS
from minisd.sampling import SamplingSettings

A1111_PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def read_as_a1111(text):
    """`parse_generation_parameters` of A1111's infotext_utils.py, written anew."""
    *lines, last = text.strip().split("\n")
    if len(A1111_PARAMETER.findall(last)) < 3:
        lines, last = [*lines, last], ""
    prompts = {"Prompt": [], "Negative prompt": []}
    current = "Prompt"
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            current, line = "Negative prompt", line[16:].strip()
        prompts[current].append(line)
    found = {name: "\n".join(lines) for name, lines in prompts.items()}
    for name, value in A1111_PARAMETER.findall(last):
        if value[:1] == '"' == value[-1:]:
            value = json.loads(value)
        if size := re.fullmatch(r"(\d+)x(\d+)", value):
            found[f"{name}-1"], found[f"{name}-2"] = size.groups()
        else:
            found[name] = value
    return found


def lora(name, strength=0.8, short_hash="0123456789ab"):
    return LoRAChoice(DEFAULT_OUTPUT / name, strength, "f" * 64, short_hash)


@pytest.mark.parametrize(
    ("prompt", "negative"),
    [
        ("a castle by the sea", "blurred, text"),
        ('a "red, green" sign: Steps: 3, Seed: 4, Size: 5x5 \\ (word:1.2)', "a: b, c: d, e: f"),
        ("caf\xe9 \U0001f408", None),
        ("two\nlines", "Negative prompt: two\nNegative prompt: lines"),
        ("", "only negative"),
    ],
)
def test_a1111_reads_back_everything(prompt, negative):
    loras = [lora("style.safetensors"), lora('od"d, na:me.safetensors', -0.25)]
    settings = SamplingSettings(
        height=512, width=768, negative_prompt=negative, num_inference_steps=30, guidance_scale=6.5, karras=True,
        clip_skip=1, strength=0.6,
    )  # fmt: skip
    details = ["Model hash: 0123456789", *lora_hashes(loras)]
    text = parameters_text(settings, prompt_with_loras(prompt, loras, 0.5), 7, "my, model.safetensors", details)
    found = read_as_a1111(text)
    one_line = " ".join(prompt.split())
    assert found.pop("Prompt") == f'{one_line} <lora:style:0.4> <lora:od"d, na:me:-0.125>'.strip()
    assert found.pop("Negative prompt") == " ".join((negative or "").split())
    assert found == {
        "Steps": "30", "Sampler": "DPM++ 2M", "Schedule type": "Karras", "CFG scale": "6.5", "Seed": "7",
        "Size-1": "768", "Size-2": "512", "Model hash": "0123456789", "Model": "my, model",
        "Lora hashes": 'style: 0123456789ab, od"d, na:me: 0123456789ab', "Denoising strength": "0.6", "Clip skip": "2",
        "Version": "minisd",
    }  # fmt: skip


def test_what_was_not_used_is_not_said():
    found = read_as_a1111(parameters_text(SamplingSettings(height=8, width=8), "cat", 0, "a/b"))
    assert found.keys() == {"Prompt", "Negative prompt", "Steps", "Sampler", "Schedule type", "CFG scale", "Seed",
                            "Size-1", "Size-2", "Model", "Version"}  # fmt: skip
    assert (found["Negative prompt"], found["Schedule type"], found["Model"]) == ("", "Uniform", "b")


def test_each_sampler_has_a_name_there():
    names = {
        read_as_a1111(parameters_text(SamplingSettings(height=8, width=8, scheduler=name), "", 0, ""))["Sampler"]
        for name in SAMPLERS
    }
    assert len(names) == len(SAMPLERS)
    assert {"Euler a", "DPM++ 2M SDE", "PLMS", "UniPC", "LCM", "Heun", "DDIM"} < names


# --- the record ---

ORIGIN = Origin(model_id="0" * 40, init_image_sha256="", torch="2", device="cpu", threads=1)
CONFIG = SampleConfig(prompt=("a\0b \U0001f408\nNegative prompt: c",), negative_prompt="", seed=4, model="owner/name")
RECORD = PictureRecord(
    options=json.loads(json.dumps(recorded_options(asdict(CONFIG)))),
    seeds=(3, 4, 5),
    place=1,
    loras=(LoRARecord(name="style.safetensors", sha256="f" * 64, strength=0.1 + 0.2),),
    origin=ORIGIN,
)


def written(path, record):
    save_png(Image.new("RGB", (8, 8)), path, parameters="a", record=record, overwrite=True)
    return path


def test_a_record_survives_the_way_into_a_picture_and_back(tmp_path):
    path = written(tmp_path / "a.png", to_json(RECORD))
    assert read_record(path) == RECORD
    assert Image.open(path).info["parameters"] == "a"


def test_a_record_holds_every_option_that_a_picture_depends_on():
    """A new option of sample.py goes into the record unless it is named here."""
    without = {"prompts_file", "lora", "strength_sweep", "num_images", "init_image", "batch_size", "output",
               "overwrite", "from_png", "debug"}  # fmt: skip
    assert RECORD.options.keys() == asdict(CONFIG).keys() - without


def test_a_record_that_does_not_fit_is_left_out_whole(tmp_path, caplog):
    fits = to_json(replace(RECORD, options=dict(RECORD.options, prompt=["\u732b" * 10_000])))
    assert read_record(written(tmp_path / "a.png", fits)).options["prompt"] == ["\u732b" * 10_000]
    written(tmp_path / "b.png", to_json(replace(RECORD, options=dict(RECORD.options, prompt=["\u732b" * 11_000]))))
    assert "too long for a record" in caplog.text
    with pytest.raises(UsageError, match="no record"):
        read_record(tmp_path / "b.png")


DAMAGED = {
    "nothing": {},
    "no seeds": {"seeds": []},
    "a place beyond them": {"place": 3},
    "a place that is true": {"place": True},
    "a negative seed": {"seeds": [-1, 2, 3]},
    "seeds that are text": {"seeds": "345"},
    "options that are a list": {"options": []},
    "a folder to write to": {"options": {"prompt": ["a"], "output": "/tmp", "overwrite": True}},
    "a path for a name": {"loras": [{"name": "../secret", "sha256": "f", "strength": 1}]},
    "a strength that is no number": {"loras": [{"name": "a", "sha256": "f", "strength": float("nan")}]},
    "a field too many": {"extra": 1},
    "an origin without device": {"origin": {"model_id": "", "init_image_sha256": "", "torch": "", "threads": 1}},
    "threads that are text": {"origin": {**asdict(ORIGIN), "threads": "1"}},
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_record_is_refused_in_one_line(tmp_path, what):
    raw = json.loads(to_json(RECORD))
    path = written(tmp_path / "a.png", json.dumps(raw | DAMAGED[what] if DAMAGED[what] else {}))
    with pytest.raises(UsageError, match=r"a\.png: its record is damaged") as error:
        read_record(path)
    assert "\n" not in str(error.value)


def test_what_has_no_record_is_refused_in_one_line(tmp_path):
    (tmp_path / "text.png").write_bytes(b"no picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    written(tmp_path / "foreign.png", None)
    written(tmp_path / "list.png", "[]")
    written(tmp_path / "deep.png", "[" * 20_000)
    written(tmp_path / "later.png", json.dumps(json.loads(to_json(RECORD)) | {"version": 2}))
    (tmp_path / "folder.png").mkdir()
    said = {
        "nowhere.png": "no such file", "folder.png": "no such file", "text.png": "cannot be read as a PNG",
        "photo.jpg": "cannot be read as a PNG", "foreign.png": "no record of minisd", "list.png": "damaged",
        "deep.png": "damaged", "later.png": "another version",
    }  # fmt: skip
    for name, words in said.items():
        with pytest.raises(UsageError, match=words) as error:
            read_record(tmp_path / name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)


def test_differences_are_said():
    now = replace(ORIGIN, torch="3", model_id="sha256:1")
    assert now.differences(ORIGIN) == [f"the model was {'0' * 40!r} and is 'sha256:1'", "torch was '2' and is '3'"]
    assert ORIGIN.differences(ORIGIN) == []
