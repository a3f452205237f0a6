"""The main job: train with float32, QAT and FQT under the same schedule and compare them.

Two stages, as in the paper (arXiv 2408.14267, recipe of the released code): pre-training of the binary
model with exact gradients (QAT), then fine-tuning with quantized gradients (FQT). The second stages of QAT
and FQT start from the same pre-trained state; float32 runs the same two stages without any quantization.
Departure from the recipe: the defaults suit a small demo from scratch; the paper fine-tunes for 60 epochs
with ``batch=128, lr=1e-5, head_lr=1e-3, weight_decay=1e-5`` and a cosine schedule.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ..config import FQTConfig
from ..errors import ConfigError, FQTError, FQTWarning
from ..kernels import noise
from ..models import head_name, make_model
from ..results import Step, environment, write_json
from ..weights import HEADER, MODEL, check_finite, fit, header, read, unpack, write
from .checkpoint import (
    FORMAT,
    PLOT,
    RESULTS,
    CheckpointError,
    Workspace,
    load_weights,
    read_weights,
)
from .data import ImageData
from .data import load as load_data
from .evaluation import evaluate, recalibrated
from .ranks import Ranks, joined, workspace_of
from .report import probe, summarize, write_plot
from .settings import FinetuneSettings, Stage, plan

WARM_STEPS = 2  # not timed at the start of a stage: the optimizer's state and the caches are cold


class DivergedError(FQTError, FloatingPointError):
    """The training loss became NaN or infinite."""


def compile_step(model: nn.Module, config: FQTConfig | None) -> Step:
    """The compiled ``model``: by Inductor in float32 for ``config`` None, else by the fqt1bit backend."""
    torch.compiler.reset()  # graphs of the previous method would count against Dynamo's recompile limit
    if config is None:
        return torch.compile(model)
    from ..backend import fqt1bit

    return torch.compile(model, backend=fqt1bit, options=dataclasses.asdict(config))


def finetune(settings: FinetuneSettings, console: Console | None = None) -> dict[str, Any]:
    """Train every method of ``settings``, write checkpoints, results and plot into ``settings.out``.

    Files there: ``checkpoint.pt`` (after every epoch), ``STAGE.pt`` (the weights at the end of each stage with its
    options, for `fqt_compile.load`), ``results.json`` and ``results.png``. ``STAGE.pt`` has the recalibrated running
    statistics, so that it gives the accuracy reported, and the next stage begins with them; ``checkpoint.pt`` has those
    of the training, which is the same with and without recalibration: weights, losses and all that is random. A resumed
    run gives bit for bit what an uninterrupted one gives on the same machine with the same versions and threads.

    Under torchrun the processes share every batch, the images of the recalibration and the test set. They see one
    ``settings.out``, in which rank 0 alone writes; its timings are reported, and all processes return the results.

    Returns the contents of ``results.json``: ``settings``, ``data``, ``methods`` (see `report.summarize`)
    and `results.environment`.

    Raises
    ------
    FQTError: in one of its kinds, for bad settings, data, weights, checkpoints and diverging training.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with joined() as ranks:
        ranks.require_divisible(settings.batch)
        with workspace_of(ranks, settings.out, resume=settings.resume, overwrite=settings.overwrite) as workspace:
            data = _load(settings)
            trainer = Trainer(settings, data, workspace, console or Console(quiet=not ranks.leads), ranks)
            methods = trainer.run()
            report = {
                "settings": trainer.record,
                "data": {"name": data.name, "train": len(data.train_labels), "test": len(data.test_labels)},
                "methods": summarize(methods),
                **environment(),
            }
            if ranks.leads:
                write_json(report, settings.out / RESULTS)
                write_plot(report, settings.out / PLOT)
    return report


def _load(settings: FinetuneSettings) -> ImageData:
    names = ("size", "limit", "seed")
    data = load_data(settings.data, root=settings.data_root, **{name: getattr(settings, name) for name in names})
    if len(data.train_labels) < settings.batch:
        raise ConfigError(
            f"setting 'batch': got {settings.batch}; accepted: at most {len(data.train_labels)}, the "
            "number of training images; lower --batch or raise --limit"
        )
    return data


class Trainer:
    """Runs the stages of a plan one after another, with a checkpoint after every epoch."""

    def __init__(
        self, settings: FinetuneSettings, data: ImageData, workspace: Workspace, console: Console, ranks: Ranks
    ) -> None:
        self.settings, self.data, self.workspace, self.console = settings, data, workspace, console
        self.ranks, self.batch = ranks, ranks.require_divisible(settings.batch)
        self.record = {**settings.record(), "processes": ranks.world}
        self.fingerprint = data.fingerprint()
        self.resumed: dict[str, Any] | None = None
        if settings.resume:
            self.resumed = workspace.load_checkpoint(self.record, self.fingerprint)
        self.history: dict[str, dict[str, Any]] = self.resumed["history"] if self.resumed else {}
        self.initial = self._initial_model()
        self.head = head_name(self.initial)
        self.model = self.initial
        self.step: Step | None = None  # the compiled self.model
        self.trained: Step | None = None  # the same; of several processes, with the mean of their gradients
        self.compiled_config: FQTConfig | None = None

    def run(self) -> dict[str, list[dict[str, Any]]]:
        """Train what is not finished yet; the histories of each method's stages."""
        stages = plan(self.settings)
        for stage in {stage.name: stage for chain in stages.values() for stage in chain}.values():
            if len(self.history.get(stage.name, {"epochs": []})["epochs"]) < stage.epochs:
                self._train(stage)
        return {method: [self.history[stage.name] for stage in chain] for method, chain in stages.items()}

    def _initial_model(self) -> nn.Module:
        settings = self.settings
        torch.manual_seed(settings.seed)
        model = make_model(settings.arch, classes=len(self.data.classes), size=settings.size)
        if settings.weights != "none":
            state = read_weights(settings.arch, settings.weights)
            if unpack(state, settings.weights).config is not None and "float32" in settings.methods:
                warnings.warn(
                    f"weights {settings.weights} were trained with 1-bit layers and mean something else in float32, "
                    "one of the methods; remedy: --methods qat,fqt",
                    FQTWarning,
                    stacklevel=2,
                )
            for line in load_weights(model, state, head_name(model), settings.weights):
                self.console.print(line, markup=False)
        return model

    def _compile(self, stage: Stage, record: dict[str, Any]) -> tuple[Step, Step]:
        """The compiled step for the stage's arithmetic, alone and for training; new unless it is the last stage's."""
        if self.step is None or self.trained is None or self.compiled_config != stage.config:
            self.model = copy.deepcopy(self.initial)
            self.step, self.compiled_config = compile_step(self.model, stage.config), stage.config
            self.trained = self.step
            if self.ranks.world > 1:
                assert isinstance(self.step, nn.Module)  # as `torch.compile` makes of a module
                self.trained = DistributedDataParallel(self.step)
            self.console.print(f"{stage.name}: compiling")
            images = self.data.normalize(self.data.train_images[: self.batch])
            record.setdefault("probe", probe(self.trained, self.model, images))
        return self.step, self.trained

    def _train(self, stage: Stage) -> None:
        config = None if stage.config is None else stage.config.canonical()
        record = self.history.setdefault(stage.name, {"config": config, "epochs": []})
        step, trained = self._compile(stage, record)
        state = self.initial.state_dict()
        if stage.parent is not None:
            file = self.workspace.stage_file(stage.parent)
            saved = unpack(read(file, "state of the previous stage"), file).tensors
            state, _ = fit(self.model, saved, file)
        self.model.load_state_dict(state)
        torch.manual_seed(self.settings.seed ^ noise.rank_bits(self.ranks.rank))  # dropout of its own
        generator = torch.Generator().manual_seed(self.settings.seed)
        loader = self.data.train_loader(self.settings.batch, generator, self.ranks)
        optimizer = self._optimizer(stage)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, stage.epochs * len(loader))
        run = Running(trained, self.model, loader, generator, optimizer, scheduler, self.ranks)
        finished = len(record["epochs"])
        if finished:  # only of the stage that the checkpoint interrupted
            assert self.resumed is not None
            run.resume(self.resumed, self.workspace.checkpoint)
        with _progress(self.console) as progress:
            total = stage.epochs * len(loader)
            task = progress.add_task(stage.name, total=total, completed=finished * len(loader))
            for epoch in range(finished + 1, stage.epochs + 1):
                where = f"stage {stage.name}, epoch {epoch}"
                loss, seconds = run.train_epoch(where, lambda: progress.advance(task))
                self._check_weights(where)
                accuracy = self._evaluate(stage, step, last=epoch == stage.epochs)
                warm = seconds[WARM_STEPS:] if epoch == finished + 1 else seconds
                record["epochs"].append({"loss": loss, "accuracy": accuracy, "step_s": warm})
                self._save(stage, run)
                progress.console.print(f"{where}: loss {loss:.4f}, test accuracy {100 * accuracy:.1f} %")

    def _optimizer(self, stage: Stage) -> torch.optim.Optimizer:
        """Fused Adam with the stage's rate for the body and its own rate for the last linear layer."""
        head = list(self.model.get_submodule(self.head).parameters()) if self.head else []
        of_head = {id(parameter) for parameter in head}
        body = [parameter for parameter in self.model.parameters() if id(parameter) not in of_head]
        groups = [{"params": body, "lr": stage.lr}, {"params": head, "lr": self.settings.head_lr}]
        used = [group for group in groups if group["params"]]
        return torch.optim.Adam(used, weight_decay=self.settings.weight_decay, fused=True)

    def _evaluate(self, stage: Stage, step: Step, *, last: bool) -> float:
        """The test accuracy. Of the last epoch also the stage's state dict, with the statistics that gave it.

        That file comes before the checkpoint: one that calls a stage finished must find it.
        """
        settings, ranks = self.settings, self.ranks
        images = {"batches": settings.recalibrate, "batch": settings.batch, "seed": settings.seed}
        with recalibrated(step, self.model, self.data, **images, ranks=ranks):
            accuracy = evaluate(step, self.model, self.data, self.batch, ranks)
            if last and ranks.leads:
                content = {HEADER: header(stage.config), MODEL: self.model.state_dict()}
                write(content, self.workspace.stage_file(stage.name))
        return accuracy

    def _check_weights(self, where: str) -> None:
        """The last step may have made NaN of the weights after a loss that was finite."""
        try:
            check_finite(self.model.state_dict(), {name for name, _ in self.model.named_parameters()}, where)
        except CheckpointError as error:
            raise DivergedError(f"{error} (--lr, --qat-lr, --head-lr)") from error

    def _save(self, stage: Stage, run: Running) -> None:
        state = {
            "format": FORMAT,
            HEADER: header(stage.config),
            "settings": self.record,
            "data": self.fingerprint,
            "stage": stage.name,
            "history": self.history,
            **run.state_dict(),
        }
        if self.ranks.leads:
            write(state, self.workspace.checkpoint)
        self.ranks.wait()  # the next stage begins with what was saved


@dataclasses.dataclass(frozen=True)
class Running:
    """Everything that changes while a stage trains."""

    step: Step
    model: nn.Module
    loader: DataLoader[Any]
    generator: torch.Generator  # of the loader's order
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    ranks: Ranks

    def train_epoch(self, where: str, advance: Callable[[], object]) -> tuple[float, list[float]]:
        """One pass over the training set: mean cross-entropy (nats), and the seconds of each step.

        A step is zero_grad, forward, loss, backward and optimizer; loading the images is not in it. The loss is that of
        all processes' images. Raises `DivergedError`, in all of them, when it is NaN or infinite; ``where`` opens its
        message.
        """
        self.model.train()
        losses, seconds = [], []
        for number, (images, labels) in enumerate(self.loader, 1):
            start = time.perf_counter()
            self.optimizer.zero_grad(set_to_none=True)
            loss = nn.functional.cross_entropy(self.step(images), labels)
            loss.backward()
            self.optimizer.step()
            seconds.append(time.perf_counter() - start)
            self.scheduler.step()
            losses.append(self.ranks.mean(loss.item()))
            if not math.isfinite(losses[-1]):
                raise DivergedError(
                    f"{where}, step {number}: the training loss is {losses[-1]}; the checkpoint before this "
                    "epoch is kept; lower the learning rate (--lr, --qat-lr, --head-lr) or check the images"
                )
            advance()
        return math.fsum(losses) / len(losses), seconds

    def state_dict(self) -> dict[str, Any]:
        """For an exact continuation after `resume`; every process calls it. ``rng`` is of all of them."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": self._random_states(),
            "loader": self.generator.get_state(),
        }

    def resume(self, state: Mapping[str, Any], path: Path) -> None:
        """Go on from the checkpoint ``path``. Raises `CheckpointError` where it is another run's."""
        weights, _ = fit(self.model, state["model"], path)
        try:
            self.model.load_state_dict(weights)
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            rng = state["rng"]
            torch.set_rng_state(rng[self.ranks.rank] if isinstance(rng, list) else rng)
            self.generator.set_state(state["loader"])
        except Exception as error:  # torch raises anything for what it has not written
            raise CheckpointError(
                f"checkpoint {path}: does not belong to this run ({error}); accepted: one of this command and model; "
                "remedy: a good copy, or start again with --overwrite"
            ) from error

    def _random_states(self) -> Tensor | list[Tensor]:
        """Of torch's default generator: one, or one of each process."""
        states = self.ranks.gathered(torch.get_rng_state())
        return states if self.ranks.world > 1 else states[0]


def _progress(console: Console) -> Progress:
    """Bars on a terminal, nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal or console.quiet)
