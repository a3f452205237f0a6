"""What a process of tests/test_distributed.py does: ``python rank_worker.py FOLDER CASE...``, as torchrun starts it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))
import fqt_compile
from fqt_compile import backend
from fqt_compile.errors import FQTWarning
from fqt_compile.finetune import FinetuneSettings, finetune
from fqt_compile.finetune import training as job
from fqt_compile.kernels.noise import SEEDS, rank_bits
from support.nets import small_batch

EAGER = {"lowering": "eager"}
KEPT = 2  # of 8 samples, with 4 bits
BUCKET_MB = 1  # the least; `Wide` has two of them


def gradients(step: nn.Module, x: Tensor, y: Tensor, seed: int = 5) -> dict[str, Tensor]:
    """Of one step from a random state that all ranks have; added to those that are there."""
    torch.manual_seed(seed)
    nn.functional.cross_entropy(step(x), y).backward()
    names = {name.replace("_orig_mod.", "").removeprefix("module."): p for name, p in step.named_parameters()}
    return {name: full(p.grad).clone() for name, p in names.items() if p.grad is not None}


def full(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def mean(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Over ranks."""
    averaged = {name: value.clone() for name, value in values.items()}
    for value in averaged.values():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return averaged


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def share(*tensors: Tensor) -> list[Tensor]:
    return [tensor.chunk(dist.get_world_size())[dist.get_rank()].clone() for tensor in tensors]


@contextlib.contextmanager
def packed_layers() -> Iterator[list[list[str]]]:
    """Of every graph that is compiled within: the names of its packed layers."""
    found, run_pipeline = [], backend.run_pipeline

    def noted(*args, **kwargs):
        state = run_pipeline(*args, **kwargs)
        found.append([site.name for site in state.sites if site.packed])
        return state

    backend.run_pipeline = noted
    try:
        yield found
    finally:
        backend.run_pipeline = run_pipeline


class Wide(nn.Module):
    """Two packed layers of 1 MB each, which DDP's buckets would put into different graphs."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (64, 512, 512, 512)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(sizes))
        self.head = nn.Linear(512, 10)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


def wrapped(model: nn.Module, way: str) -> nn.Module:
    """Both ways round: DDP of what is compiled, and what DDP makes compiled."""
    torch._dynamo.reset()
    model.zero_grad()
    if way == "ddp of compiled":
        compiled = torch.compile(model, backend="fqt1bit", options=EAGER)
        return DistributedDataParallel(compiled, bucket_cap_mb=BUCKET_MB, find_unused_parameters=True)
    del model.unused
    parallel = DistributedDataParallel(model, bucket_cap_mb=BUCKET_MB, static_graph=True)
    return torch.compile(parallel, backend="fqt1bit", options=EAGER)


def ddp(folder: Path) -> None:
    """One graph with the layers of the model, whatever DDP's buckets; the mean of the ranks' gradients, bit for bit."""
    torch.manual_seed(0)
    model = Wide()
    x, y = share(torch.randn(16, 64), torch.randint(0, 10, (16,)))
    alone = fqt_compile.eager(model, EAGER)
    local = gradients(alone, x, y)
    layers = [site.name for site in alone._fqt_plan if site.decision == "packed"]
    assert layers == ["layers.1", "layers.2"]
    twice = {name: value + value for name, value in local.items()}
    x.requires_grad_()
    for way in ("ddp of compiled", "compiled ddp"):
        x.grad = None
        step = wrapped(model, way)
        with packed_layers() as found:
            assert_equal(gradients(step, x, y), mean(local))
            assert int(x.grad.flatten(1).any(1).sum()) == KEPT
            model.zero_grad()
            with getattr(step, "_orig_mod", step).no_sync():
                assert_equal(gradients(step, x, y), local)
            assert_equal(gradients(step, x, y), mean(twice))
        assert found == [layers], way


def noise(folder: Path) -> None:
    """Ranks that are seeded alike draw seeds of their own."""
    torch.manual_seed(5)
    seeds = [torch.empty((), dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(seeds, torch.ops.fqt.draw_seed(torch.device("cpu")))
    torch.manual_seed(5)
    drawn = int(torch.randint(0, SEEDS, ()))
    assert list(map(int, seeds)) == [drawn ^ rank_bits(rank) for rank in range(len(seeds))]


def native(folder: Path) -> None:
    """Native kernels inside DDP: near eager FQT, and an exact continuation from one checkpoint of both ranks."""
    torch.manual_seed(0)
    model = small()
    x, y = share(*small_batch(16))
    wanted = mean(gradients(fqt_compile.eager(model), x, y))
    model.zero_grad()
    run = Training(model)
    for name, gradient in gradients(run.step, x, y).items():
        limit = 1e-4 * wanted[name].abs().max() + 1e-6
        assert (gradient - wanted[name]).abs().max() <= limit, name
    run.train(x, y, steps=2)
    run.save(folder / "checkpoint.pt")
    run.train(x, y, steps=2)
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(99)
    run.load(folder / "checkpoint.pt")  # into the same graph: another one takes as long to compile as all of this
    run.train(x, y, steps=2)
    # At the next forward, DDP gives rank 0's running statistics to all: those of the others are in no checkpoint.
    names = model.state_dict() if dist.get_rank() == 0 else dict(model.named_parameters())
    assert_equal({name: model.state_dict()[name] for name in names}, {name: whole[name] for name in names})


def small(num_classes: int = 10) -> nn.Module:
    """One packed layer, with BatchNorm."""
    body = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes))
    nn.init.normal_(model[3].bias, 0, 0.3)
    return model


class Training:
    """A loop as a user writes it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.step = DistributedDataParallel(torch.compile(model, backend="fqt1bit"))
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def train(self, x: Tensor, y: Tensor, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.step(x), y).backward()
            self.optimizer.step()

    def save(self, path: Path) -> None:
        random = [torch.empty_like(torch.get_rng_state()) for _ in range(dist.get_world_size())]
        dist.all_gather(random, torch.get_rng_state())
        if dist.get_rank() == 0:
            torch.save((self.model.state_dict(), self.optimizer.state_dict(), random), path)
        dist.barrier()

    def load(self, path: Path) -> None:
        model, optimizer, random = torch.load(path, weights_only=True)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        torch.set_rng_state(random[dist.get_rank()])


class Blocks(nn.Module):
    """A stem, two blocks that a sharded model is made of, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)) for _ in range(2))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Unrolled(Blocks):
    """Dynamo gives up a frame that calls what it does not trace in a loop, and the backend hears nothing of it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[1](self.blocks[0](self.stem(x))).mean((2, 3)))


def fsdp(folder: Path) -> None:
    """FSDP2: the whole model in one group as usual; its blocks each compiled; blocks left out are announced."""
    torch.manual_seed(0)
    model = Blocks()
    x, y = share(*small_batch(16))
    wanted = mean(gradients(fqt_compile.eager(model, EAGER), x, y))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with packed_layers() as found:
        step = torch.compile(fully_shard(model), backend="fqt1bit", options=EAGER)
        torch.testing.assert_close(gradients(step, x, y), wanted, rtol=1e-5, atol=1e-7)  # sums of bias gradients
    assert found == [["blocks.0.1", "blocks.1.1"]]

    alone = {**EAGER, "skip": ["downsample"]}  # neither block has the model's first or last layer
    reference, model = Blocks(), Blocks()
    for copy in (reference, model):
        copy.load_state_dict(state)
    for number, block in enumerate(reference.blocks):
        reference.blocks[number] = fqt_compile.eager(block, alone)
    wanted = mean(gradients(reference, x, y))
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend="fqt1bit", options=EAGER)
        fully_shard(block)
    with packed_layers() as found, warnings.catch_warnings():
        warnings.simplefilter("error", FQTWarning)
        torch.testing.assert_close(gradients(fully_shard(model), x, y), wanted, rtol=1e-5, atol=1e-7)
    assert found == [["blocks.0.1"], ["blocks.1.1"]]
    left_out(x)


def left_out(x: Tensor) -> None:
    """Dynamo never enters a sharded nn.Sequential from outside."""
    torch._dynamo.reset()
    model = Unrolled()
    for block in model.blocks:
        fully_shard(block)
    step = torch.compile(fully_shard(model), backend="fqt1bit", options=EAGER)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(x)
    text = " ".join(str(warning.message) for warning in caught)
    assert "blocks.0, blocks.1" in text, text
    assert "block.forward = torch.compile(block.forward" in text, text


def tiny(num_classes: int) -> nn.Module:
    """Dropout needs torch's generator for an exact continuation; BatchNorm has buffers."""
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, num_classes))


def settings_of(folder: Path) -> FinetuneSettings:
    """Of a short run, here and in the test that runs it in one process."""
    common = {"size": 8, "limit": 400, "batch": 16, "lr": 1e-2, "qat_lr": 1e-2, "head_lr": 1e-2, "methods": ("fqt",)}
    return FinetuneSettings(arch=f"{__file__}:tiny", epochs=2, qat_epochs=2, out=folder, **common)


def uncompiled() -> None:
    job.compile_step = lambda model, config: model


def finetuned(folder: Path) -> None:
    """A whole run, and one that is interrupted in every process and continued."""
    uncompiled()
    settings = settings_of(folder / "whole")
    report = finetune(settings)
    other = dataclasses.replace(settings, out=folder / "resumed")
    train_epoch, epochs = job.Running.train_epoch, []

    def interrupted(self, where, advance):
        if len(epochs) == 3:
            torch.rand(7)
            raise KeyboardInterrupt
        epochs.append(where)
        return train_epoch(self, where, advance)

    job.Running.train_epoch = interrupted
    with contextlib.suppress(KeyboardInterrupt):
        finetune(other, Console(quiet=True))
    assert len(epochs) == 3
    dist.barrier()  # as a new start does: rank 0 has given back the folder
    job.Running.train_epoch = train_epoch
    torch.manual_seed(99)
    resumed = finetune(dataclasses.replace(other, resume=True), Console(quiet=True))
    for method, figures in report["methods"].items():
        for key in ("loss_history", "accuracy_history"):
            assert resumed["methods"][method][key] == figures[key]
        whole, again = (torch.load(folder / run / f"{method}.pt") for run in ("whole", "resumed"))
        assert again["fqt1bit"] == whole["fqt1bit"]
        assert_equal(again["model"], whole["model"])


def main() -> None:
    folder, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    warnings.simplefilter("error", FQTWarning)
    dist.init_process_group("gloo")
    for case in cases:
        print(case, flush=True)  # the last one is that which failed
        start = time.perf_counter()
        globals()[case](Path(folder))
        print(f"{time.perf_counter() - start:.1f} s")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
