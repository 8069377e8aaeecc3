"""How a job of several processes starts, ends and fails: launchers, mistakes, deaths, and going on afterwards."""

import socket

import pytest
import torch
from helpers import job, metrics, run_process, succeed

from lit_llama.common.errors import UserError
from lit_llama.devices.launch import barrier, check_launcher, multiplies_bf16


@pytest.fixture
def flags(folder):
    return ["--checkpoint_dir", folder / "base", "--data", folder / "sums", "--start_layer", 1]


@pytest.mark.processes
def test_two_nodes_are_two_devices(flags, tmp_path):
    flags = [*flags, "--train.max_steps", 4, "--train.batch_size", 4, "--train.eval_every", 2, "--eval_samples", 4]
    flags += ["--precision", "32-true", "--out_dir"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    torchrun = ["--nnodes", 2, "--nproc_per_node", 1, "--master_addr", "127.0.0.1", "--master_port", port]
    script = ["finetune/adapter.py", "--num_nodes", 2, *flags, tmp_path / "two"]
    first, second = (job(*script, torchrun=[*torchrun, "--node_rank", node]) for node in range(2))
    with first as agent, second as other:
        (printed, stderr), (nothing, _) = agent.communicate(timeout=300), other.communicate(timeout=300)
    assert agent.returncode == other.returncode == 0, stderr
    assert "exact match after" in printed and nothing == ""  # rank 0 alone speaks
    succeed("finetune/adapter.py", *flags, tmp_path / "one")
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), abs=1e-5)
        assert float(one["val_loss"] or 0) == pytest.approx(float(two["val_loss"] or 0), abs=1e-5)


TORCHRUN = dict(TORCHELASTIC_RUN_ID="1", WORLD_SIZE="16", LOCAL_WORLD_SIZE="8")
SRUN = dict(SLURM_NTASKS="16", SLURM_NTASKS_PER_NODE="8", SLURM_JOB_NAME="lora")


@pytest.mark.parametrize("environment", [TORCHRUN, SRUN])
def test_flags_that_are_not_the_launchers_are_refused(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="8 processes were started on a node and 16 in all.* --devices 8 --num_nodes 2"):
        check_launcher(devices=1, num_nodes=1)
    check_launcher(devices=8, num_nodes=2)
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")  # srun --pty bash, and the script started by hand
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    check_launcher(devices=1, num_nodes=1)


@pytest.mark.parametrize("instructions", [True, False])
def test_a_cpu_with_bfloat16_instructions_is_recognized(monkeypatch, instructions):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: instructions)
    assert multiplies_bf16(torch.device("cpu")) == instructions


def test_a_barrier_that_fails_says_what_for():
    class Alone:
        def barrier(self):
            raise RuntimeError("Timed out waiting 1800000ms")

    with pytest.raises(RuntimeError, match="^rank 0 waited for the others to save the state: Timed out .*ms"):
        barrier(Alone(), "save the state")


@pytest.mark.processes
def test_a_mistake_is_told_once(flags, tmp_path):
    wrong = ["--devices", 2, "--train.batch_size", 1, "--start_layer", 7, "--out_dir", tmp_path / "o"]
    result = run_process("finetune/adapter.py", *flags, *wrong)
    assert result.stdout.count("note: --train.batch_size 1 gives work to only 1 of 2 devices") == 1
    assert result.returncode == 2 and "Traceback" not in result.stderr
    (error,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert "start_layer 7 must be between 0 and 2" in error
