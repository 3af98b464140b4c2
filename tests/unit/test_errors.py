"""The family of errors: exit codes, one line, nothing hostile on the terminal."""

from pathlib import Path

import pytest

from minisd import errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError("x"), 2),
        (errors.DataError("x"), 3),
        (errors.WeightsError("x"), 4),
        (errors.NetworkError("x"), 5),
        (errors.DiskError("x"), 6),
        (OSError(28, "No space left on device", "/a/b"), 6),
        (errors.NonFiniteError("x"), 7),
        (errors.OutOfMemoryError("x"), 8),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 8),
        (errors.CheckpointError("x"), 9),
        (errors.OutputInUseError("x"), 10),
        (KeyboardInterrupt(), 130),
        (errors.Stopped("SIGINT"), 130),
        (errors.Stopped("SIGINT", Path("step-000002")), 75),
        (errors.Stopped("SIGTERM"), 75),
        (RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:40123\nsecond line"), 1),
        (RuntimeError("[unbound_buffer.cc:84] Timed out waiting 5000ms for recv operation to complete"), 1),
        (type("DistBackendError", (RuntimeError,), {})("NCCL error"), 1),
    ],
)
def test_exit_codes_and_one_line(error, code, capsys):
    def fail():
        raise error

    assert errors.run_script(fail, debug=False) == code
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "Traceback" not in said


def test_a_bug_of_ours_shows_its_traceback(capsys):
    def fail():
        raise KeyError("oops")

    assert errors.run_script(fail, debug=False) == 1
    assert "Traceback" in capsys.readouterr().err
    assert errors.run_script(lambda: None, debug=False) == 0


def test_debug_adds_the_traceback(capsys):
    def fail():
        raise errors.DataError("bad")

    assert errors.run_script(fail, debug=True) == 3
    assert "Traceback" in capsys.readouterr().err


def test_control_characters_are_escaped(capsys):
    def fail():
        raise errors.DataError("a\x1b[31m\nb\u202e.png: not a picture")

    errors.run_script(fail, debug=False)
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert said.count("\n") == 1
    assert "\\x1b" in said


def test_a_stop_is_no_exception_and_says_how_to_go_on(capsys):
    def work():
        try:
            raise errors.Stopped("SIGTERM", Path("run/checkpoints/step-000002"))
        except Exception:
            pass

    assert errors.run_script(work, debug=False, prefix="[rank 0] ") == 75
    said = capsys.readouterr().err
    assert said.startswith("[rank 0] minisd: stopped (SIGTERM); saved run/checkpoints/step-000002. The same command")
    assert "error" not in said


def test_a_lost_peer_is_told_from_a_bug():
    known = errors.translate(RuntimeError("[pair.cc:547] Connection reset by peer"))
    assert isinstance(known, errors.PeerError)
    assert "--dist-timeout" in str(known)
    assert errors.translate(RuntimeError("shape mismatch")) is None
    assert errors.translate(KeyError("Connection reset by peer")) is None
