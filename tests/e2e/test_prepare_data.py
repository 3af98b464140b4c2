"""prepare_data.py as a user runs it: from a folder, or a keyword, to a dataset that train.py trains on."""

import io
import re
import subprocess
import sys
from functools import partial

import pytest
from PIL import Image

import prepare_data
from minisd.data import read_dataset, survey
from minisd.errors import run_script
from minisd.pocket import scenes
from minisd.prepare import collect as collect_module
from minisd.prepare.options import All, Caption, Captioner, Clean, Collect, Crawl, Report, Rules
from minisd.prepare.table import read_pictures, read_rejected
from tests.e2e.running import ROOT, environment
from tests.hostile_server import FakeInternet, HostileServer, body
from tests.tiny_blip import write_tiny_blip


def run(*words, env=None):
    command = [sys.executable, str(ROOT / "prepare_data.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment() | (env or {}))


def drawing(index, size=(96, 64)):
    return scenes.draw(scenes.scene_at(index, 5), "8bit").resize(size, Image.Resampling.NEAREST)


def jpeg(index):
    data = io.BytesIO()
    drawing(index).save(data, "JPEG", quality=92)
    return data.getvalue()


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip")
    write_tiny_blip(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eight drawings, one with a caption; a copy, a smaller copy, a strip, a thing that is no picture, a text."""
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(8):
        drawing(index).save(folder / f"{index}.png")
    (folder / "3.txt").write_text("my own words, with a comma", encoding="utf-8")
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    drawing(1, (80, 53)).save(folder / "smaller.png")
    drawing(9, (400, 64)).save(folder / "strip.png")
    (folder / "page.jpg").write_text("<html>not found</html>")
    (folder / "notes.txt").write_text("buy milk")
    return folder


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_from_a_folder_to_a_training_run(pictures, blip, tmp_path):
    before, data = files(pictures), tmp_path / "data"
    words = ("all", "--from", pictures, "--output", data, "--min-side", 48, "--caption-model", blip, "--resolution", 64)
    first = run(*words, "--prefix", "8bit illustration of")
    assert first.returncode == 0, first.stderr
    assert "8 kept; left out: 1 duplicate, 1 near-duplicate, 1 not a picture, 1 too narrow" in first.stderr
    assert files(pictures) == before

    kept = read_pictures(data)
    assert [row.original for row in kept] == [f"{index}.png" for index in range(8)]
    assert kept[3].text == "my own words, with a comma"
    assert all(row.text.startswith("8bit illustration of ") for row in kept if row is not kept[3])
    page = (data / "report.html").read_text(encoding="utf-8")
    assert all(row.file_name in page for row in kept)

    # Again: nothing is left to do, and nothing is done. Only the page says when it was made.
    done = files(data)
    second = run(*words, "--prefix", "8bit illustration of")
    assert second.returncode == 0, second.stderr
    changed = {str(name) for name, content in files(data).items() if done.get(name) != content}
    assert changed <= {"report.html", "run.lock"}

    train = [sys.executable, "train.py", "--model", "pocket", "--data", str(data), "--output", str(tmp_path / "lora")]
    options = [
        "--max-train-steps",
        "2",
        "--train-batch-size",
        "4",
        "--report-to",
        "none",
        "--gradient-accumulation-steps",
        "1",
    ]
    trained = subprocess.run([*train, *options], capture_output=True, text=True, cwd=ROOT, env=environment())
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "lora" / "lora.safetensors").exists()


def test_from_a_keyword_to_a_dataset(blip, tmp_path, monkeypatch, caplog):
    """The same with the whole crawl, in process, against a loopback server that plays Bing and the pictures' hosts."""
    with HostileServer() as server:
        links = [f"https://art{index % 3}.example/{index}.jpg" for index in range(9)]
        for index, link in enumerate(links):
            server.on(link.removeprefix("https://"), body(jpeg(index), "image/jpeg"))
        server.on("art0.example/0.jpg", body(b"<html>gone</html>", "image/jpeg"))
        found = "".join(f'<a m="{{&quot;murl&quot;:&quot;{link}&quot;}}"></a>' for link in links)
        server.on("www.bing.com/images/async", body(found.encode(), "text/html"))
        monkeypatch.setattr(collect_module, "Fetcher", FakeInternet(server).fetcher)
        options = All(
            output=tmp_path / "data",
            query="8bit illustration",
            limit=8,  # as many as there are
            resolution=64,
            rules=Rules(min_side=48),
            captioner=Captioner(caption_model=str(blip)),
        )
        caplog.set_level("INFO")
        prepare_data.prepare(options)
        hits = server.hits.total()
        prepare_data.prepare(options)
        assert server.hits.total() == hits  # all is there: not even the search is asked again

    assert "8 wanted, 8 kept; left out: 1 not a picture" in caplog.text
    kept = read_pictures(tmp_path / "data")
    assert len(kept) == 8
    assert {row.source_url for row in kept} == set(links[1:])
    assert all(row.query == "8bit illustration" and row.fetched_at and row.text for row in kept)
    assert [row.source_url for row in read_rejected(tmp_path / "data")] == [links[0]]
    examples = read_dataset(tmp_path / "data")
    assert [found.sha256 for found in survey(examples, quiet=True)] == [row.sha256 for row in kept]


REFUSALS = {
    "neither": (("all", "--output", "{tmp}/x"), 2, "expected --query WORDS or --from FOLDER, got neither"),
    "both": (("all", "--output", "{tmp}/x", "--query", "a", "--from", "{tmp}"), 2, "got both"),
    "no query": (("collect", "--query", " ", "--output", "{tmp}/x"), 2, "expected words to search for"),
    "no folder": (("clean", "--from", "{tmp}/none", "--output", "{tmp}/x"), 3, "expected a folder of pictures"),
    "empty folder": (("clean", "--from", "{tmp}", "--output", "{tmp}/x"), 3, "expected pictures to keep, got none"),
    "nothing collected": (("clean", "--output", "{tmp}/x"), 3, "Collect pictures first"),
    "root": (("clean", "--from", "{tmp}", "--output", "/"), 2, "expected a folder for one dataset"),
    "home": (("all", "--from", "{tmp}", "--output", "{tmp}"), 2, "expected a folder for one dataset"),
    "itself": (("clean", "--from", "{tmp}/a", "--output", "{tmp}/a"), 2, "expected another folder"),
    "no data": (("caption", "--data", "{tmp}/none"), 3, "no such folder"),
    "no data to show": (("report", "--data", "{tmp}/none"), 3, "no such folder"),
    "no data to serve": (("serve", "--data", "{tmp}/none", "--no-browser"), 3, "no such folder"),
    "no table": (("caption", "--data", "{tmp}/a"), 3, "expected train/metadata.csv or metadata.csv, got neither"),
    "no colour": (("clean", "--output", "{tmp}/x", "--background", "whiite"), 2, "expected a colour's name"),
    "unknown": (("clean", "--outptu", "x"), 2, "--output"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_one_line_and_leaves_nothing(name, tmp_path):
    (tmp_path / "a").mkdir()
    words, code, message = REFUSALS[name]
    result = run(*(word.format(tmp=tmp_path) for word in words), env={"HOME": str(tmp_path)})
    assert result.returncode == code, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("minisd:")]
    assert message in line
    assert "Traceback" not in result.stderr
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in made} <= {"run.lock", "rejected.csv"}


@pytest.mark.parametrize("command", ["all", "collect", "clean", "report", "serve"])
def test_only_captions_are_for_several_processes(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = {
        "all": All(output=tmp_path, source=tmp_path / "a"),
        "collect": Collect(crawl=Crawl(query="x"), output=tmp_path),
        "clean": Clean(output=tmp_path),
        "report": Report(data=tmp_path),
        "serve": prepare_data.Serve(data=tmp_path),
    }[command]
    assert run_script(partial(prepare_data.prepare, options), debug=False) == 2
    assert "without torchrun" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_two_at_once_in_one_folder_are_refused(tmp_path):
    holder = "import time; from pathlib import Path; from minisd.run_lock import output_lock\n"
    holder += f"with output_lock(Path({str(tmp_path)!r})): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, cwd=ROOT, env=environment()) as other:
        try:
            other.stdout.readline()
            result = run("caption", "--data", tmp_path)
            assert result.returncode == 10
            assert f"in use by process {other.pid}" in result.stderr
        finally:
            other.kill()


def test_help_and_cleaning_need_no_torch():
    code = "import sys, prepare_data; from minisd.prepare import clean, collect, report, serve; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment())
    assert loaded.returncode == 0, loaded.stderr
    assert "torch" not in loaded.stdout.split()


def test_every_option_of_all_is_that_of_its_stage():
    """`all` passes on every option its stages have, but for those that say where they work."""
    changed = All(
        output="out", query="q", limit=7, min_images=2, safe_search=False, filter="line", max_minutes=3.0,
        follow_symlinks=True, resolution=96, rules=Rules(min_side=9), captioner=Captioner(trigger="pxl"),
    )  # fmt: skip
    collect, clean, caption, report = changed.stages()
    assert collect == Collect(
        crawl=Crawl(query="q", limit=7, min_images=2, safe_search=False, filter="line", max_minutes=3.0),
        output="out",
        rules=Rules(min_side=9),
    )
    assert clean == Clean(output="out", follow_symlinks=True, rules=Rules(min_side=9))
    assert caption == Caption(data="out", captioner=Captioner(trigger="pxl"))
    assert report == Report(data="out", resolution=96, trigger="pxl")


def test_help_names_every_command():
    said = run("--help").stdout
    assert all(re.search(rf"\b{name}\b", said) for name in ("all", "collect", "clean", "caption", "report", "serve"))
