"""The report of a run: what it reads, what it leaves out, what it says, and that nothing in it can do harm."""

import html.parser
import json
import math
import os
import random
import re
import socket
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minisd import html_page
from minisd.command_line import parse_args
from minisd.config import TrainConfig
from minisd.errors import DataError
from minisd.images import save_png
from minisd.report import facts
from minisd.report.commands import Command, recipe_of, repeat_along_run, repeat_evaluation, repeat_training
from minisd.report.curves import MAX_POINTS, Line, make_chart, thin, ticks
from minisd.report.evaluation import read_evaluation
from minisd.report.pictures import show
from minisd.report.run_files import json_lines, read_run, series, without_folders
from minisd.report.views import along_run, sweep_table
from minisd.report.write import write_report
from minisd.sample_config import SampleConfig
from tests.report_run import PROMPTS, STEPS, drawing, text_of, write_dataset, write_evaluation, write_run, write_status

HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onload='alert(1)",
    "</style><link rel=stylesheet href=//evil.example>",
    "\u202ereversed\u202c \u2066isolated",
    "{{ 7 * 7 }} {% raw %} | `code` <!-- --",
    "javascript:alert(1)",
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data", ["8bit castle", "8bit cat", "dog"])
    write_run(tmp_path / "out", tmp_path / "data", validation_split=0.3)
    write_evaluation(tmp_path / "out")
    return tmp_path / "out"


class Page(html.parser.HTMLParser):
    """The elements of a page: (tag, attributes), and all its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, kind: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == kind]


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def words_of(command: Command) -> list[str]:
    """The arguments that a shell makes of a command."""
    assert not command.missing
    shown = re.sub("^python (sample|train).py", r"printf '%s\\0'", command.line)
    return subprocess.run(["sh", "-c", shown], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]


# --- what is in the folder ---


def test_a_run_is_read_whole(run: Path) -> None:
    found = read_run(run)
    assert (found.state, found.step, found.total_steps, found.checkpoints) == ("complete", 20, 20, (10, 20))
    assert found.final_lora
    assert found.metrics["loss"][0] == (1, 0.35)
    assert found.validation["held_out"]["ratio"] == [(0, 1.0), (10, 0.95), (20, 0.9)]
    assert found.validation["train"]["3"] == [(0, 0.7), (10, 0.7), (20, 0.7)]
    assert found.samples == dict.fromkeys(STEPS, ("00-0.png", "01-0.png"))
    assert found.held_out == ["000.png"]
    assert dict(facts.machine(found)) == {
        "device": "cpu", "processes": "2", "torch": "2.9", "speed": "8 pictures a second", "a step takes": "0.5 s",
        "all steps": "10 s", "pictures seen": "80", "most memory": "1.50 GB",
    }  # fmt: skip


def test_a_torn_or_foreign_line_costs_that_line_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    odd = ['{"step": 1, "loss": 1}', "[1]", "7", "", "\0", '{"step": true, "loss": 9}', "[" * 100_000,
           '{"step": 2, "loss": NaN, "lr": "a"}', f'{{"step": 3, "loss": 1{400 * "0"}}}', '{"step": -1, "loss": 1}',
           f'{{"step": 1{400 * "0"}, "loss": 1}}', '{"step": 4, "loss": 2.5}', '{"step": 5, "lo']  # fmt: skip
    path.write_text("\n".join(odd))
    assert series(json_lines(path)) == {"loss": [(1, 1), (4, 2.5)]}
    assert json_lines(tmp_path / "none") == []


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", ["8bit castle"])
    write_run(tmp_path / "out", tmp_path / "data")
    for path in sorted((tmp_path / "out").rglob("*"), reverse=True):
        if path.name != "config.json":
            path.rmdir() if path.is_dir() else path.unlink()
    page = page_of(tmp_path / "out")
    assert "not complete (step 0 of 20)" in page.text
    assert "No pictures yet" in page.text
    with pytest.raises(DataError, match=r"expected the --output of a run"):
        write_report(tmp_path / "data")


@pytest.mark.parametrize("damage", ["cut", "noise", "lists", "gone"])
def test_damaged_files_do_not_hold_up_the_page(run: Path, damage: str) -> None:
    names = ("metrics.jsonl", "validation.jsonl", "probe.json", "pictures.csv", "run_status.json",
             "evaluation/evaluation.json", "checkpoints/step-000020/state.json",
             "samples/step-000010/00-0.png")  # fmt: skip
    for path in (run / name for name in names):
        content = path.read_bytes()
        path.unlink()
        if damage != "gone":
            halved = content[: len(content) // 2]
            path.write_bytes({"cut": halved, "noise": bytes(range(256)), "lists": b"[[], {}]"}[damage])
        read_run(run)
        read_evaluation(run)
    assert "alpha / rank 1" in page_of(run).text


def test_an_evaluation_is_read_with_its_sweep_or_not_at_all(run: Path) -> None:
    evaluation = read_evaluation(run)
    assert evaluation is not None
    table = sweep_table(read_run(run), evaluation)
    assert table is not None
    assert all(column.drawn[1].shown.address for column in table.columns)
    for odd in (math.inf, math.nan, "a", None):
        write_evaluation(run, pick={"step": odd, "why": ""})
        assert read_evaluation(run) is None


def test_how_a_run_stands(run: Path) -> None:
    here, gone = socket.gethostname(), subprocess.Popen(["true"])
    gone.wait()
    for values, wanted in [
        ({"state": "running", "pid": os.getpid(), "host": here}, "running (step 20 of 20)"),
        ({"state": "running"}, "running (step 20 of 20)"),  # on another machine: nothing is known
        ({"state": "running", "pid": gone.pid, "host": here}, "killed; the same command goes on (step 20 of 20)"),
        ({"state": "preempted"}, "stopped; the same command goes on (step 20 of 20)"),
        ({"state": "failed", "error": "no"}, "failed (step 20 of 20)"),
        ({"state": "done"}, "complete after 20 steps"),
    ]:
        write_status(run, **values)
        assert facts.state(read_run(run))[0] == wanted


def test_nothing_outside_the_run_and_the_data_is_read(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    drawing(500, run.parent / "secret.png")
    secret = show(run.parent / "secret.png", 384).address
    (run / "evaluation" / "link.png").symlink_to(run.parent / "secret.png")
    (run / "samples" / "step-000030").symlink_to(run.parent)
    assert not along_run(read_run(run)).cells[-1].drawn[30].shown.address
    (run / "samples" / "step-000030").unlink()
    content = json.loads((run / "evaluation" / "evaluation.json").read_text())
    honest = len(page_of(run).all("img"))
    names = ["../../secret.png", str(run.parent / "secret.png"), "link.png", "step-000010/00.png\0", ".", ""]
    for name in names:
        for row in content["rows"]:
            row["pictures"] = [name, name]
            row["nearest"] = [{"training": name, "likeness": 1, "copy": True}] * 2
        (run / "evaluation" / "evaluation.json").write_text(json.dumps(content))
        page = page_of(run)
        assert secret not in {image.get("src") for image in page.all("img")}
        assert len(page.all("img")) < honest, name
    content["rows"][1]["lora"] = "../../secret.safetensors"
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(content))
    assert read_evaluation(run) is None
    assert "evaluation.json is left out" in caplog.text


# --- what the page says ---


def test_what_was_said_anywhere_is_text_and_nothing_else(tmp_path: Path) -> None:
    names = ['a"><img src=x onerror=alert(1)>.png', "b.png", *(f"{i}.png" for i in range(len(HOSTILE) - 2))]
    write_dataset(tmp_path / "data", HOSTILE, names)
    write_run(tmp_path / "out", tmp_path / "data", validation_prompts=tuple(HOSTILE), trigger="8bit<i>")
    write_evaluation(tmp_path / "out", tuple(HOSTILE), judge=HOSTILE[0], pick={"step": 10, "why": HOSTILE[1]})
    write_status(tmp_path / "out", state="failed", error=HOSTILE[0])
    page = page_of(tmp_path / "out")
    assert len(page.all("script")) == len(page.all("style")) == len(page.all("link")) == 1
    assert not {tag for tag, _ in page.elements} & {"iframe", "object", "embed", "base", "form", "meta/", "i/"}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert not [name for _, attributes in page.elements for name in attributes if name == "style"]
    assert all((image["src"] or "data:").startswith("data:image/") or image.get("id") for image in
               [{"src": None, **image} for image in page.all("img")])  # fmt: skip
    assert all((link["href"] or "").startswith("#") for link in page.all("a"))
    for text in HOSTILE:
        assert text in page.text, text
    assert "49" not in page.text.split("reversed", 1)[0][-200:]
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv")]
    here = Path(facts.__file__).parent
    assert policy == html_page.policy(*((here / f"report.{kind}").read_text() for kind in ("js", "css")))
    assert policy.startswith("default-src 'none'; ")


def test_the_page_tells_no_folder_user_or_host(run: Path) -> None:
    where = run.parent.as_posix()
    write_status(run, state="failed", error=f"{where}/deep/file.png: cannot be read on secret-host. Free '/a b/c'.")
    text = write_report(run).read_text()
    assert "file.png: cannot be read on this machine" in text
    assert where not in text
    assert "secret-host" not in text
    assert without_folders("a /x/y/z b ~/k/l 1/2 and/or C:\\w\\v, './u/t'") == "a z b l 1/2 and/or v, './u/t'"
    assert without_folders("'/a b/c d/e f': no, \"/g's h/i\" or '/j'") == "'e f': no, \"i\" or '/j'"


def test_the_recipe_begins_with_what_is_not_the_default(tmp_path: Path) -> None:
    config = TrainConfig(
        data=tmp_path / "data", rank=4, trigger="8bit", buckets=False, init_lora=Path("/a/b.safetensors")
    )
    changed = {option.name: (option.value, option.default) for option in facts.options(config) if option.is_changed}
    assert changed == {
        "--data": ("data", ""), "--buckets": ("no", "yes"), "--trigger": ("8bit", ""), "--rank": ("4", "16"),
        "--init-lora": ("b.safetensors", ""),
    }  # fmt: skip
    assert facts.sentence(config) == (
        "A LoRA of rank 4 (alpha / rank 1) in the attention projections of stable-diffusion-v1-5/stable-diffusion-v1-5,"
        " called up by \u201c8bit\u201d."
    )


def test_data_that_is_gone_is_shown_by_its_names(run: Path) -> None:
    (run.parent / "data" / "001.png").unlink()
    page = page_of(run)
    assert "cannot be read from here" in page.text
    assert page.text.count("missing") >= 3
    assert "002.png" in page.text


def test_a_long_run_with_large_pictures_stays_small(tmp_path: Path) -> None:
    captions = [f"8bit picture {index}" for index in range(3)]
    write_dataset(tmp_path / "data", captions)
    for index in range(3):
        drawing(index, tmp_path / "data" / f"{index:03d}.png", size=512)
    prompts = tuple(f"prompt {index}" for index in range(8))
    out = tmp_path / "out"
    write_run(out, tmp_path / "data", max_train_steps=2000, validation_prompts=prompts)
    line = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    chance = random.Random(0)
    lines = [line | {"step": step, "loss": chance.random(), "grad_norm": chance.random()} for step in range(1, 2001)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    # As hard to compress as a photo, and the same file for all, which is quicker to write.
    noise = tmp_path / "noise.png"
    save_png(Image.effect_noise((512, 512), 60).convert("RGB"), noise, parameters=text_of("noise", 0, 0))
    for step in range(0, 2001, 250):
        for index in range(len(prompts)):
            path = out / "samples" / f"step-{step:06d}" / f"{index:02d}-0.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.hardlink_to(noise)
    assert write_report(out).stat().st_size < 10e6


def test_of_too_many_steps_the_first_the_last_and_some_between_are_shown(run: Path) -> None:
    for step in range(30, 5000, 10):
        (run / "samples" / f"step-{step:06d}").mkdir()
        (run / "samples" / f"step-{step:06d}" / "00-0.png").touch()
    along = along_run(read_run(run))
    assert (along.steps[0], along.steps[-1], len(along.steps), along.all_steps) == (0, 4990, 120, 500)


# --- curves ---


def test_thinning_keeps_both_ends_every_extreme_and_the_order() -> None:
    chance = random.Random(1)
    points = [(step, chance.random()) for step in range(1, 100_001)]
    points[54_321] = (54_322, 50.0)
    points[77_777] = (77_778, -50.0)
    kept = thin(points)
    assert len(kept) <= MAX_POINTS
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert {(54_322, 50.0), (77_778, -50.0)} <= set(kept) <= set(points)
    assert kept == sorted(kept)
    assert thin(points[:MAX_POINTS]) == points[:MAX_POINTS]


def test_marks_are_round_evenly_spaced_and_cover_the_curve() -> None:
    assert ticks(0, 600, 4) == (0, 200, 400, 600)
    assert ticks(0.011, 0.335, 4) == pytest.approx((0, 0.1, 0.2, 0.3, 0.4))
    chance = random.Random(2)
    for _ in range(2000):
        low = chance.uniform(-1, 1) * 10 ** chance.uniform(-8, 6)
        high = low + 10 ** chance.uniform(-8, 6)
        marks = ticks(low, high, 4)
        assert marks[0] <= low + 1e-6 * (high - low)
        assert marks[-1] >= high - 1e-6 * (high - low)
        assert 2 <= len(marks) <= 7
        steps = [b - a for a, b in pairwise(marks)]
        assert all(math.isclose(step, steps[0], rel_tol=1e-3) for step in steps)
    assert ticks(0, 9, 4, whole=True) == (0, 5, 10)
    assert len(ticks(5, 5, 4)) >= 2
    assert len(ticks(0, 0, 4)) >= 2


def test_a_curve_is_drawn_to_scale() -> None:
    chart = make_chart("Loss", [Line("loss", "raw", [(0, 0.0), (50, 0.1), (100, 0.4)])], 100)
    assert chart is not None
    assert (chart.steps, chart.labels) == ((0, 25, 50, 75, 100), ["0.4", "0.3", "0.2", "0.1", "0.0"])
    assert chart.path(chart.lines[0]) == "M0.0 300.0L500.0 225.0L1000.0 0.0"
    assert json.loads(chart.data)["lines"][0]["points"] == [[0, 0.0], [50, 0.1], [100, 0.4]]
    assert make_chart("Nothing", [Line("none", "raw", [])], 100) is None


# --- the lines that draw pictures again ---


def test_the_line_of_a_picture_along_the_run_gives_sample_py_what_it_needs(run: Path) -> None:
    found = read_run(run)
    for index, prompt in enumerate(PROMPTS):
        recipe = recipe_of(text_of(prompt, 10, 3), found.config)
        assert recipe is not None
        options: Any = parse_args(SampleConfig, words_of(repeat_along_run(found, recipe, 10, f"{index:02d}-0")))
        assert (options.prompt, options.seed, options.lora) == (
            (prompt,),
            3,
            ("out/checkpoints/step-000010/lora.safetensors",),
        )
        assert (options.model, options.num_images, options.precision) == ("pocket", 1, "float32")
        assert (options.num_inference_steps, options.guidance_scale, options.height, options.width) == (25, 7.5, 64, 64)
        assert options.output == Path(f"drawn-again/step-000010/{index:02d}-0")


@pytest.mark.parametrize(
    "prompt",
    ["--lora none", "-x", "", "$(id) 'a' \"b\" \\", "a\\", "#!*?~", "\u732b caf\u00e9", "a=b --seed=7", "; rm -r *"],
)
def test_a_prompt_comes_out_of_a_shell_as_it_went_in(run: Path, prompt: str) -> None:
    found = read_run(run)
    recipe = recipe_of(text_of(prompt, 10, 0), found.config)
    options: Any = parse_args(SampleConfig, words_of(repeat_along_run(found, recipe, 10, "00-0")))
    assert (options.prompt, options.seed) == ((prompt,), 0)


@pytest.mark.parametrize("prompt", ["a\x1b[2Jb", "\u202eb", "a\u2066b", "\x07"])
def test_what_would_show_otherwise_than_it_is_gets_no_line(run: Path, prompt: str) -> None:
    found = read_run(run)
    command = repeat_along_run(found, recipe_of(text_of(prompt, 10, 0), found.config), 10, "00-0")
    assert command == Command(missing="Its prompt has characters that are not for a command line.")


def test_nor_does_a_line_with_such_an_option(run: Path) -> None:
    """config.json may come from a stranger."""
    content = json.loads((run / "config.json").read_text())
    for name, option in [("output", "output"), ("model", "model"), ("revision", "revision")]:
        (run / "config.json").write_text(json.dumps(content | {name: "a\x1b[201~\nid"}))
        found = read_run(run)
        recipe = recipe_of(text_of("a", 10, 0), found.config)
        command = repeat_along_run(found, recipe, 10, "00-0")
        assert command.missing.startswith(f"Its {'lora' if option == 'output' else option} has characters")
        assert bool(repeat_training(found).missing) == (name == "output")
        write_report(run)


def test_training_again_is_the_same_run_and_publishes_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.loads((run / "config.json").read_text())
    hub = {"push_to_hub": True, "hub_model_id": "a/b", "hub_private_repo": True, "hub_license": "mit"}
    monkeypatch.chdir(run.parent)
    for more in ({}, hub):
        (run / "config.json").write_text(json.dumps(content | more))
        options: Any = parse_args(TrainConfig, words_of(repeat_training(read_run(run))))
        assert options == TrainConfig(**vars(read_run(run).config) | dict.fromkeys(hub, None) | {
            "output": Path("trained-again"), "push_to_hub": False, "hub_private_repo": False})  # fmt: skip


def test_which_lora_a_picture_is_drawn_with_again(run: Path) -> None:
    def lora(step: int) -> str:
        found = read_run(run)
        command = repeat_along_run(found, recipe_of(text_of("a", step, 0), found.config), step, "00-0")
        return command.missing or parse_args(SampleConfig, words_of(command)).lora[0]

    gone = "The checkpoint of this step was not kept, so it cannot be drawn again."
    assert (lora(0), lora(20), lora(15)) == ("none", "out/lora.safetensors", gone)
    write_status(run, state="running")  # lora.safetensors may be that of a shorter run now
    assert lora(20) == "out/checkpoints/step-000020/lora.safetensors"
    (run / "checkpoints" / "step-000020" / "lora.safetensors").unlink()
    assert lora(20) == gone
    content = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(content | {"zero_terminal_snr": True}))
    assert lora(0) == "out/checkpoints/step-000010/lora.safetensors:0"
    (run / "config.json").write_text(json.dumps(content | {"init_lora": "first.safetensors"}))
    assert lora(0) == "first.safetensors"


def test_the_line_of_an_evaluated_picture_has_the_settings_of_the_evaluation(run: Path) -> None:
    found, evaluation = read_run(run), read_evaluation(run)
    assert evaluation is not None
    assert evaluation.sweep is not None
    base, first, _ = evaluation.rows
    for row, lora in [
        (base, "none"),
        (first, "out/checkpoints/step-000010/lora.safetensors"),
        (evaluation.sweep.rows[0], "out/checkpoints/step-000010/lora.safetensors:0.4"),
        (evaluation.sweep.rows[1], "out/checkpoints/step-000010/lora.safetensors"),
    ]:
        command = repeat_evaluation(found, evaluation, row, evaluation.prompts[1], "x")
        options: Any = parse_args(SampleConfig, words_of(command))
        assert (options.lora, options.prompt, options.seed) == ((lora,), (PROMPTS[1],), 1)
        assert (options.scheduler, options.num_inference_steps, options.guidance_scale) == ("euler", 4, 3.25)


def test_a_picture_that_does_not_say_how_it_was_drawn_gets_no_line(run: Path) -> None:
    found = read_run(run)
    for text in (
        "",
        "a cat",
        "a\nb\n" + text_of("c", 1, 1),
        text_of("a", 1, 1).replace("DPM++ 2M", "Euler"),
        "Steps: 1",
    ):
        assert recipe_of(text, found.config) is None
    assert repeat_along_run(found, None, 10, "00-0").missing == "The picture does not say how it was drawn."
    # The text has six digits of the guidance scale.
    exact = TrainConfig(data=run, validation_guidance_scale=7.50000004)
    recipe = recipe_of(text_of("a", 1, 1), exact)
    assert recipe is not None
    assert recipe.guidance_scale == 7.50000004
