"""The report of a run in a browser, and its lines: each draws the picture again, to the pixel."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sample
import train
from minisd.command_line import parse_args
from minisd.config import TrainConfig
from minisd.evaluate.evaluation import evaluate
from minisd.evaluate.options import EvaluateConfig
from minisd.report.evaluation import read_evaluation
from minisd.report.run_files import read_run
from minisd.report.views import along_run, checkpoint_table, sweep_table
from minisd.report.write import write_report
from minisd.sample_config import SampleConfig
from tests.e2e.running import ALONE, environment
from tests.report_run import write_dataset, write_evaluation, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian's package of that name)")
LOAD_ALL = "Promise.all([...document.images].filter((image) => image.id !== 'viewer-image').map((i) => i.decode()))"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    write_dataset(folder / "data", ["8bit castle", "8bit cat", "dog"])
    write_run(folder / "out", folder / "data", validation_split=0.3)
    write_evaluation(folder / "out")
    return write_report(folder / "out").as_uri()


@needs_chromium
@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (380, "dark")])
def test_the_page_moves_opens_copies_filters_and_fetches_nothing(
    browser: Any, url: str, tmp_path: Path, width: int, scheme: str
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    requests: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda said: complaints.append(said.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(url)

    # The slider, by keys and by its button.
    def labels() -> set[str]:
        return set(page.locator(".label.now:visible").all_inner_texts()) - {"sample"}

    assert labels() == {"step 20"}
    page.keyboard.press("ArrowLeft")
    assert (labels(), page.locator("#at").inner_text()) == ({"step 10"}, "10")
    page.locator("#step").focus()
    page.keyboard.press("Home")
    assert labels() == {"step 0"}
    page.locator("#play").click()
    page.locator("#at", has_text="20").wait_for()
    page.keyboard.press("ArrowLeft")

    # A picture by itself.
    page.locator(".cell .layer.on button").nth(1).click()
    line = page.locator("#viewer-line code").inner_text()
    assert shlex.split(line.replace("\\\n", " "))[:6] == [
        "python", "sample.py", "--model", "pocket", "--lora", "out/checkpoints/step-000010/lora.safetensors",
    ]  # fmt: skip
    assert page.locator("#viewer-facts").inner_text() == "step 10, seed 0"
    assert page.evaluate("document.getElementById('viewer-image').decode().then(() => 'shown')") == "shown"
    page.locator("#viewer-line button").click()
    page.get_by_text("Copied", exact=True).wait_for()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#viewer-facts").inner_text() == "step 0, seed 0"
    page.keyboard.press("Escape")
    assert not page.evaluate("document.getElementById('viewer').open")
    page.locator(".likeness.copy button").click()
    assert page.locator("#viewer-facts").inner_text() == "checkpoint of step 20, seed 0"
    page.locator("#close").click()

    # Curves and data.
    page.locator(".plot").first.hover()
    assert page.locator(".read").first.inner_text().startswith("step ")
    page.keyboard.press("/")
    page.keyboard.type("8bit cat")
    assert page.locator(".card:visible .name").all_inner_texts() == ["001.png"]
    page.locator("#search").fill("")
    page.locator("#held-out").check(force=True)
    assert page.locator(".card:visible .name").all_inner_texts() == ["000.png"]
    page.locator("#held-out").uncheck(force=True)

    # Every picture is drawn, nothing is wider than the window, and the page is not a blank one.
    page.evaluate(LOAD_ALL)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shot = tmp_path / "page.png"
    page.screenshot(path=shot, full_page=True)
    with Image.open(shot) as image:
        colours = image.convert("RGB").resize((200, 200)).getcolors(40_000)
        assert colours is not None
        assert len(colours) > 500
        corner = image.convert("L").getpixel((3, 3))
        assert isinstance(corner, int)
        assert (corner < 60) == (scheme == "dark")
    # chromium counts the pictures in the page as requests.
    assert [request for request in requests if not request.startswith("data:")] == [url]
    assert complaints == []
    page.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on the pocket model, evaluated, in the folder "out" of the one returned."""
    folder = tmp_path_factory.mktemp("trained")
    write_dataset(folder / "data", ["8bit castle", "8bit cat"])
    options = {"checkpointing_steps": 1, "validation_steps": 1, "learning_rate": 0.1, "report_to": "none", "seed": 3}
    prompts = ("a cat's castle", '--seed 7 "$HOME"')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = TrainConfig(
            data=Path("data"), output=Path("out"), model="pocket", max_train_steps=2, validation_prompts=prompts,
            validation_inference_steps=2, validation_guidance_scale=3.3, trigger="8bit", **options,
        )  # fmt: skip
        train.train(config, ALONE)
        evaluate(
            EvaluateConfig(
                run=Path("out"), prompts=("8bit dog's day",), outside_prompts=("a cup",), num_inference_steps=2,
                sweep_scales=(0.5,),
            )
        )  # fmt: skip
    return folder


def test_each_line_draws_its_picture_again_to_the_pixel(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    run, evaluation = read_run(Path("out")), read_evaluation(Path("out"))
    assert evaluation is not None
    sweep = sweep_table(run, evaluation)
    assert sweep is not None
    along, table = along_run(run), checkpoint_table(run, evaluation)
    (strength,) = sweep.columns
    for drawn, name in [
        (along.cells[1].drawn[0], "samples/step-000000/01-0.png"),
        (along.cells[1].drawn[1], "samples/step-000001/01-0.png"),
        (along.cells[0].drawn[2], "samples/step-000002/00-0.png"),
        (table.columns[0].drawn[0], "evaluation/step-000000/00.png"),
        (table.columns[1].drawn[1], "evaluation/step-000001/01.png"),
        (strength.drawn[0], f"evaluation/{strength.row.pictures[0]}"),
    ]:
        # The shell takes the line apart; sample.py would take seconds to start, each time.
        shown = drawn.command.line.replace("python sample.py", "printf '%s\\0'", 1)
        words = subprocess.run(["sh", "-c", shown], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
        (path,) = sample.sample(parse_args(SampleConfig, words))
        with Image.open(path) as again, Image.open(Path("out") / name) as before:
            assert (np.asarray(again) == np.asarray(before)).all(), name


def test_the_command_writes_the_page_and_says_what_is_wrong_in_a_line(trained: Path) -> None:
    def report(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "minisd.report", *words]
        return subprocess.run(command, cwd=trained, env=environment(), capture_output=True, text=True)

    done = report("--run", "out")
    assert (done.returncode, done.stderr) == (0, "to look at: out/report.html\n")
    text = (trained / "out" / "report.html").read_text()
    assert "complete after 2 steps" in text
    assert str(trained) not in text
    done = report("--run", "data")
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    assert "expected the --output of a run" in done.stderr
    done = report()
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
