"""Pretraining of the pocket model: what is interrupted goes on as if it had not been."""

import pytest

from minisd.pocket import pretrain as module
from minisd.pocket.pretrain import PretrainConfig, pretrain
from minisd.weights import load_model


class StoppedError(BaseException):
    pass


def test_an_interrupted_pretraining_writes_the_same_model(tmp_path, monkeypatch):
    """Stopped once in each stage, after its first update."""
    options = {"scenes": 30, "vae_steps": 2, "decoder_steps": 2, "unet_steps": 2, "save_steps": 1, "device": "cpu"}
    pretrain(PretrainConfig(output=tmp_path / "whole", work_dir=tmp_path / "state-a", **options))

    original = module.State.save

    def save_then_stop(state):
        original(state)
        if state.step == 1:
            raise StoppedError

    halted = PretrainConfig(output=tmp_path / "halted", work_dir=tmp_path / "state-b", **options)
    monkeypatch.setattr(module.State, "save", save_then_stop)
    for _ in range(3):
        with pytest.raises(StoppedError):
            pretrain(halted)
    pretrain(halted)

    names = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    assert len(names) == 12
    for name in names:
        assert (tmp_path / "halted" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    load_model(str(tmp_path / "whole"))
