"""How a job of several processes starts, ends and fails: launchers, mistakes, deaths, and going on afterwards."""

import os
import signal
import socket
import subprocess
import sys

import pytest
from helpers import ROOT, make_base, metrics, run_process, succeed, sums, write_rows

from lit_llama.devices.launch import barrier


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    make_base(folder / "base")
    write_rows(folder / "data" / "train.json", sums(40))
    write_rows(folder / "data" / "validation.json", sums(53)[40:])
    return folder, ["--checkpoint_dir", folder / "base", "--data", folder / "data", "--start_layer", 1]


def torchrun(*flags: object) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *map(str, flags)]


@pytest.fixture
def start():
    """Starts a command in the background; what is left of it and its children when the test ends is killed."""
    started = []

    def begin(arguments: list) -> subprocess.Popen:
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
        started.append(subprocess.Popen([*map(str, arguments)], cwd=ROOT, text=True, start_new_session=True, **pipes))
        return started[-1]

    yield begin
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # all have ended
            pass


def errors(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.processes
def test_two_nodes_are_two_devices(start, places, tmp_path):
    _, flags = places
    flags = [*flags, "--train.max_steps", 4, "--train.batch_size", 4, "--train.eval_every", 2, "--eval_samples", 4]
    flags += ["--precision", "32-true", "--out_dir"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    agents = []
    for node in range(2):
        agent = torchrun("--nnodes", 2, "--node_rank", node, "--nproc_per_node", 1)
        agent += ["--master_addr", "127.0.0.1", "--master_port", port, "finetune/adapter.py", "--num_nodes", 2]
        agents.append(start([*agent, *flags, tmp_path / "two"]))
    printed = []
    for agent in agents:
        stdout, stderr = agent.communicate(timeout=300)
        assert agent.returncode == 0, stderr
        printed.append(stdout)
    assert "exact match after" in printed[0] and printed[1] == ""  # rank 0 alone speaks
    succeed("finetune/adapter.py", *flags, tmp_path / "one")
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), abs=1e-5)
        assert float(one["val_loss"] or 0) == pytest.approx(float(two["val_loss"] or 0), abs=1e-5)


@pytest.mark.parametrize(
    "environment, message",
    [
        (
            dict(TORCHELASTIC_RUN_ID="1", WORLD_SIZE="4", LOCAL_WORLD_SIZE="2", RANK="0", LOCAL_RANK="0"),
            "torchrun started 2 processes on a node and 4 in all.*pass --devices 2 --num_nodes 2",
        ),
        (
            dict(SLURM_NTASKS="16", SLURM_NTASKS_PER_NODE="8", SLURM_JOB_NAME="lora", SLURM_PROCID="0"),
            "srun started 8 processes on a node and 16 in all.*pass --devices 8 --num_nodes 2",
        ),
    ],
)
def test_flags_that_are_not_the_launchers_are_refused(monkeypatch, environment, message):
    from lit_llama.common.errors import UserError
    from lit_llama.devices.launch import check_launcher, launch_sharded

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        check_launcher(devices=1, num_nodes=1)
    if "TORCHELASTIC_RUN_ID" in environment:
        with pytest.raises(UserError, match=message):
            launch_sharded(devices=1, num_nodes=1, quantize=None)
    else:  # so does an sbatch script look to a plain python, which may answer on one device
        assert launch_sharded(devices=1, num_nodes=1, quantize=None) is None
    world, per_node = (int(value) for name, value in environment.items() if "WORLD" in name or "NTASKS" in name)
    check_launcher(devices=per_node, num_nodes=world // per_node)
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")  # srun --pty bash, and the script started by hand
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    check_launcher(devices=1, num_nodes=1)


def test_a_mistake_is_told_once(places, tmp_path):
    _, flags = places
    wrong = ["--devices", 2, "--train.batch_size", 1, "--start_layer", 7, "--out_dir", tmp_path / "o"]
    result = run_process("finetune/adapter.py", *flags, *wrong)
    assert result.stdout.count("note: --train.batch_size 1 gives work to only 1 of 2 devices") == 1
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert len(errors(result.stderr)) == 1 and "start_layer 7 must be between 0 and 2" in errors(result.stderr)[0]


def test_a_barrier_that_fails_says_what_for():
    class Alone:
        def barrier(self):
            raise RuntimeError("Timed out waiting 1800000ms")

    with pytest.raises(RuntimeError, match="^rank 0 waited for the others to save the state: Timed out .*ms"):
        barrier(Alone(), "save the state")
