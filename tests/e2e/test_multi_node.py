"""Two nodes of one process each are one node of two: docs/multi-node.md, played on one machine."""

import json
import socket
import subprocess
import sys

from tests.e2e.running import ROOT, config_for, environment, metrics_of, options_of, state_of, torchrun


def start_node(number, port, *words):
    """Start what docs/multi-node.md has each node start; the nodes have loopback addresses of their own."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=style", f"--local-addr=127.0.0.{number + 1}",
    ]  # fmt: skip
    return subprocess.Popen(
        [*command, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment() | {"GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip


def test_two_nodes_of_one_process_equal_one_node_of_two(tiny_folder, dataset, tmp_path):
    options = {"max_train_steps": 2, "gradient_accumulation_steps": 1}
    together = config_for(tiny_folder, dataset, tmp_path / "together", **options)
    done = torchrun("train.py", *options_of(together), processes=2)
    assert done.returncode == 0, done.stderr

    apart = config_for(tiny_folder, dataset, tmp_path / "apart", **options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [start_node(number, port, "train.py", *options_of(apart)) for number in (0, 1)]
    try:
        said = [node.communicate(timeout=120)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    assert state_of(apart.output, 2) == state_of(together.output, 2)
    assert metrics_of(apart.output) == metrics_of(together.output)
    assert json.loads((apart.output / "run_status.json").read_text())["state"] == "done"
