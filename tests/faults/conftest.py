"""Where the faults happen."""

import tempfile
from pathlib import Path

import pytest

from tests.faults.harness import SOAK


@pytest.fixture
def disk(tmp_path):
    """An empty folder: in memory for the quick run, where an fsync is nothing, on a real disk for the long one."""
    if SOAK or not Path("/dev/shm").is_dir():
        yield tmp_path
    else:
        with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="minisd-faults-") as folder:
            yield Path(folder)
