"""The end of train.py: the report, and the way to the Hub; and what is refused for that at the beginning."""

import json
from dataclasses import replace
from functools import partial

import pytest

import train
from minisd.errors import NetworkError, UsageError, run_script
from tests.e2e.running import config_for
from tests.fake_hub import fake_hub, log_in, send_to

REPO, TOKEN = "someone/style", "hf_secret_token"
TO_HUB = {"push_to_hub": True, "hub_model_id": REPO}


@pytest.fixture(scope="module")
def complete(tiny_folder, dataset, tmp_path_factory):
    """A run of one step, started as the script does it. Started again, it has only its end to do."""
    config = config_for(tiny_folder, dataset, tmp_path_factory.mktemp("complete"), max_train_steps=1)
    train.main(config)
    return config


def test_the_report_is_written_when_the_run_is_done(complete):
    page = complete.output / "report.html"
    assert "complete after 1 steps" in page.read_text()
    page.unlink()
    train.main(replace(complete, report=False))
    assert not page.exists()


def test_a_report_that_cannot_be_written_is_a_warning(complete, caplog):
    page = complete.output / "report.html"
    page.unlink(missing_ok=True)
    page.mkdir()
    assert run_script(partial(train.main, complete), debug=False) == 0
    page.rmdir()
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert warning.getMessage().startswith(f"the report could not be written: {page}: ")


def test_a_run_publishes_itself_and_is_done_even_if_the_hub_fails(complete, tmp_path, monkeypatch, capsys):
    log_in(TOKEN, tmp_path, monkeypatch)
    (tmp_path / "repository").mkdir()
    start = partial(run_script, partial(train.main, replace(complete, **TO_HUB)), debug=False)
    with fake_hub(tmp_path / "repository", REPO, 500, "/commit/", token=TOKEN) as served:
        send_to(served, monkeypatch)
        assert start() == NetworkError.exit_code
        assert "The run itself is complete. To publish it later: python -m minisd.publish" in capsys.readouterr().err
        assert json.loads((complete.output / "run_status.json").read_text())["state"] == "done"
        assert (complete.output / "report.html").exists()
        served.failure = None
        assert start() == 0
        assert served.commits == [["README.md", "recipe.json", "style.safetensors"]]
    published = (tmp_path / "repository" / "style.safetensors").read_bytes()
    assert published == (complete.output / "lora.safetensors").read_bytes()


def test_without_a_token_nothing_is_loaded(complete, tmp_path, monkeypatch, capsys):
    log_in(TOKEN, tmp_path, monkeypatch)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(train, "prepare", None)
    config = replace(complete, output=tmp_path / "run", **TO_HUB)
    assert run_script(partial(train.main, config), debug=False) == UsageError.exit_code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"minisd: error E-USAGE: {REPO}: to publish on the Hub you must be logged in")
    assert [path.name for path in config.output.iterdir()] == ["run.lock"]


def test_a_trial_reports_and_publishes_nothing(complete, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(train, "check_can_push", None)
    monkeypatch.setattr(train, "show", None)
    config = replace(complete, output=tmp_path / "run", cache_dir=complete.cache_folder, preflight=True, **TO_HUB)
    train.main(config)
    assert sorted(path.name for path in config.output.iterdir()) == ["run.lock"]
