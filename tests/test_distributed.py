"""Several processes: DistributedDataParallel both ways round, noise of each rank's own, FSDP2, `finetune` by torchrun.

What a process does is a function of tests/support/rank_worker.py, of the name that a test gives.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import processes, rank_worker, sample
from support.nets import SmallNet, small_batch, step_gradients

import fqt_compile
from fqt_compile.errors import ConfigError
from fqt_compile.finetune import finetune
from fqt_compile.finetune import training as job
from fqt_compile.finetune.checkpoint import CheckpointError
from fqt_compile.finetune.ranks import Ranks
from fqt_compile.kernels import noise

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
RANKS = 2
LIMIT = 300  # seconds
SEEDS = 32


def run_ranks(cases: list[str], folder: Path) -> None:
    """Run cases in processes with the environment that torchrun gives them; show what a failing one said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(RANKS)}
    command = [rank_worker.__file__, str(folder), *cases]
    environments = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(RANKS)]
    started = [processes.Process(command, environment) for environment in environments]
    try:
        done = [process.wait(LIMIT) for process in started]
    finally:
        for process in started:
            process.process.kill()
    assert [each.returncode for each in done] == [0] * RANKS, "\n".join(each.stderr[-3000:] for each in done)
    print(done[0].stdout)


@pytest.mark.rotates(2)
@pytest.mark.slow
def test_two_ranks(tmp_path):
    """The cases in one pair of processes, which takes as long to start as any of them."""
    chosen = sample.some("ranks", ["native", "fsdp", "finetuned"])
    run_ranks(["noise", "ddp", *chosen], tmp_path)
    if "finetuned" in chosen:
        compare_with_one_process(tmp_path)


def compare_with_one_process(folder: Path) -> None:
    """Both read the same images in the same order; BatchNorm normalizes by 8 of them instead of 16, dropout differs."""
    settings = rank_worker.settings_of(folder / "one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "compile_step", lambda model, config: model)
        one = finetune(settings, rank_worker.Console(quiet=True))["methods"]["fqt"]
    two = json.loads((folder / "whole" / "results.json").read_text())["methods"]["fqt"]
    assert {file.name for file in (folder / "whole").iterdir()} == {file.name for file in settings.out.iterdir()}
    assert two["loss_history"] == pytest.approx(one["loss_history"], rel=0.1)
    assert two["accuracy"] == pytest.approx(one["accuracy"], abs=0.1)
    with pytest.raises(CheckpointError, match="setting 'processes' is 1, but the checkpoint was written with 2"):
        finetune(dataclasses.replace(settings, out=folder / "whole", resume=True), rank_worker.Console(quiet=True))


@pytest.mark.rotates(4)
@pytest.mark.slow
def test_finetune_by_torchrun(tmp_path):
    """The command itself: rank 0 writes and prints."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    stages = (
        "--size 8 --limit 96 --batch 32 --epochs 1 --qat-epochs 0 --methods fqt --option lowering=eager --threads 1"
    )
    run = ["fqt_compile.cli", "finetune", "--arch", f"{rank_worker.__file__}:small", *stages.split()]
    command = [*torchrun, "-m", *run, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("stage fqt, epoch 1") == done.stdout.count("written: ") == 1
    report = json.loads((tmp_path / "run" / "results.json").read_text())
    assert report["settings"]["processes"] == RANKS
    assert report["methods"]["fqt"]["steps_timed"] == 96 // 32 - job.WARM_STEPS


@pytest.mark.parametrize(("batch", "remedy"), [(64, "63 or 66"), (2, "3")])
def test_a_batch_that_does_not_divide(batch, remedy):
    with pytest.raises(ConfigError, match=f"'batch': got {batch} for 3 processes; .*a multiple of 3.*--batch {remedy}"):
        Ranks(0, 3).require_divisible(batch)


def test_shares_are_the_batches_of_one_process():
    data = job.load_data("digits", size=8, limit=50)
    ranks = [Ranks(rank, 2) for rank in range(2)]
    loaders = [data.train_loader(16, torch.Generator().manual_seed(0), each) for each in ranks]
    whole = data.train_loader(16, torch.Generator().manual_seed(0))
    assert len(loaders[0]) == len(whole) == 3
    for batch, *parts in zip(whole, *loaders, strict=True):
        for wanted, *shares in zip(batch, *parts, strict=True):
            assert torch.equal(torch.cat(shares), wanted)
    tested = torch.cat([labels for each in ranks for _, labels in data.test_batches(16, each)])
    assert torch.equal(tested.sort().values, data.test_labels.sort().values)


def test_noise_of_ranks_averages_out(monkeypatch):
    """On the same data, two ranks that are seeded alike have half the variance of one; with its noise they had all."""
    model, (x, y) = SmallNet(), small_batch()
    step = fqt_compile.eager(model)

    def drawn(rank: int) -> torch.Tensor:
        monkeypatch.setattr(noise, "rank", lambda: rank)
        return torch.stack([step_gradients(step, x, y, seed)[1]["conv1.weight"] for seed in range(SEEDS)])

    one, other = drawn(0), drawn(1)
    ratio = ((one + other) / 2).var(0).sum() / one.var(0).sum()
    assert 0.35 < ratio < 0.7


def test_reports_look_through_ddp(tmp_path):
    """DDP needs a group even in one process; what is inside is what is explained, and computed by its definition."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, (x, y) = rank_worker.small(), small_batch()
        parallel = torch.nn.parallel.DistributedDataParallel(torch.compile(model, backend="fqt1bit"))
        assert [site.decision for site in fqt_compile.explain(parallel, x).sites] == ["float", "packed", "float"]
        wanted = step_gradients(fqt_compile.eager(model), x, y)
        assert step_gradients(fqt_compile.eager(parallel), x, y)[0] == wanted[0]
        assert fqt_compile.gradient_noise(parallel, [(x, y)], seeds=2).layers
    finally:
        torch.distributed.destroy_process_group()
