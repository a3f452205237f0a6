"""The command line: ``fqt1bit finetune | explain | compare | bench``.

Every command imports what it needs by itself: none fails for a package that only another one uses.
"""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import Bits, Grad, Keep, Option, Preset, Scope, parse_options
from .errors import ConfigError, FQTError

if TYPE_CHECKING:
    import torch

USER_ERROR = 2  # exit code
INTERRUPTED = 130
DEMO_ARCH = "fqt_compile.models:small_vgg"

app = typer.Typer(
    help="Train and inspect models whose convolution and linear layers run on packed bits.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Arch = Annotated[str, typer.Option(help="A torchvision classifier, module:factory, or path/to/file.py:factory.")]
Size = Annotated[int, typer.Option(help="Images of SIZE x SIZE pixels.", min=1)]
Batch = Annotated[int, typer.Option(help="Images per training step.", min=1)]
Classes = Annotated[int, typer.Option(help="Number of classes.", min=1)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def clear_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Print our errors as one line ``error: ...`` on stderr, exit code 2; ``--debug`` lets them through."""

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        try:
            command(**arguments)
        except Exception as error:
            message = _in_our_words(error)
            if message is None or arguments["debug"]:
                raise
            print(f"error: {' '.join(message.split())}", file=sys.stderr)
            raise typer.Exit(USER_ERROR) from error
        except KeyboardInterrupt as interrupt:
            print("interrupted; a fine-tuning run continues with --resume", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from interrupt

    return run


@app.command()
@clear_errors
def finetune(
    arch: Arch = DEMO_ARCH,
    data: Annotated[str, typer.Option(help="digits, fashion-mnist, cifar10, or a folder of images.")] = "digits",
    data_root: Annotated[Path | None, typer.Option(help="The root of torchvision's data sets.")] = None,
    weights: Annotated[str, typer.Option(help="none, DEFAULT (torchvision's) or a file with a state dict.")] = "none",
    size: Size = 32,
    limit: Annotated[int | None, typer.Option(help="Use only so many training and test images.")] = None,
    qat_epochs: Annotated[int, typer.Option(help="Stage 1: pre-training, exact gradients.", min=0)] = 3,
    epochs: Annotated[int, typer.Option(help="Stage 2: fine-tuning, quantized gradients.", min=1)] = 3,
    batch: Batch = 64,
    qat_lr: Annotated[float, typer.Option(help="Learning rate of the body in stage 1.")] = 3e-3,
    lr: Annotated[float, typer.Option(help="The same in stage 2 (the paper fine-tunes with 1e-5).")] = 1e-3,
    head_lr: Annotated[float, typer.Option(help="Learning rate of the last linear layer.")] = 3e-3,
    weight_decay: Annotated[float, typer.Option(help="Adam's weight decay.")] = 1e-5,
    recalibrate: Annotated[
        int, typer.Option(help="Batches that BatchNorm's statistics are measured on before an evaluation.", min=0)
    ] = 8,
    seed: Annotated[int, typer.Option(help="Of everything random.", min=0)] = 0,
    threads: Annotated[int | None, typer.Option(help="Threads of torch.", min=1)] = None,
    methods: Annotated[str, typer.Option(help="What to compare, separated by commas.")] = "float32,qat,fqt",
    out: Annotated[Path, typer.Option(help="Folder of checkpoints and results.")] = Path("runs/finetune"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    bits: Bits = None,
    keep: Keep = None,
    scope: Scope = None,
    grad: Grad = None,
    preset: Preset = None,
    option: Option = None,
    debug: Debug = False,
) -> None:
    """Train with float32, QAT and FQT under one schedule and compare accuracy, speed and memory."""
    from rich.console import Console

    from .finetune import PLOT, RESULTS, FinetuneSettings, started_by_torchrun, table
    from .finetune import finetune as run

    flags = {"bits": bits, "keep": keep, "scope": scope, "grad": grad, "preset": preset}
    settings = FinetuneSettings(
        arch=arch,
        data=data,
        data_root=data_root,
        weights=weights,
        size=size,
        limit=limit,
        qat_epochs=qat_epochs,
        epochs=epochs,
        batch=batch,
        qat_lr=qat_lr,
        lr=lr,
        head_lr=head_lr,
        weight_decay=weight_decay,
        recalibrate=recalibrate,
        seed=seed,
        threads=threads,
        methods=tuple(methods.split(",")),
        config=parse_options(option or [], flags),
        out=out,
        resume=resume,
        overwrite=overwrite,
    )
    console = Console(quiet=not started_by_torchrun().leads)
    console.print(table(run(settings, console)))
    console.print(f"written: {out / RESULTS}, {out / PLOT}", markup=False, soft_wrap=True)


@app.command()
@clear_errors
def explain(
    arch: Arch = DEMO_ARCH,
    size: Size = 32,
    batch: Batch = 8,
    classes: Classes = 10,
    save: Annotated[Path | None, typer.Option(help="Write the report to this file (HTML).")] = None,
    stage: Annotated[str | None, typer.Option(help="Print the graph after this pass.")] = None,
    kernels: Annotated[bool, typer.Option("--kernels", help="Print the kernel sources.")] = False,
    bits: Bits = None,
    keep: Keep = None,
    scope: Scope = None,
    grad: Grad = None,
    preset: Preset = None,
    option: Option = None,
    debug: Debug = False,
) -> None:
    """Show which layers are packed and why, the graph after each pass, and the generated kernels."""
    flags = {"bits": bits, "keep": keep, "scope": scope, "grad": grad, "preset": preset}
    config = parse_options(option or [], flags)
    model, images = _model_and_images(arch, size, batch, classes)
    from .inspect.explain import explain as make_report

    report = make_report(model, images, config=config)
    if stage is not None and stage not in report.stages:
        raise ConfigError(f"--stage: got {stage!r}; accepted: {', '.join(report.stages)}")
    if stage is not None:
        print(report.stages[stage])
    if kernels:
        for name, source in report.kernels.items():
            print(f"// ---- {name}\n{source}")
    if stage is None and not kernels:
        print(report)
    if save is not None:
        report.save(save)
        print(f"written: {save}")


@app.command()
@clear_errors
def compare(
    arch: Arch = DEMO_ARCH,
    size: Size = 32,
    batch: Batch = 8,
    classes: Classes = 10,
    seeds: Annotated[int, typer.Option(help="For bias and variance of the gradients; 0 leaves them out.", min=0)] = 8,
    bits: Bits = None,
    keep: Keep = None,
    scope: Scope = None,
    grad: Grad = None,
    preset: Preset = None,
    option: Option = None,
    debug: Debug = False,
) -> None:
    """Compare the compiled model with eager FQT and with float, layer by layer."""
    flags = {"bits": bits, "keep": keep, "scope": scope, "grad": grad, "preset": preset}
    config = parse_options(option or [], flags)
    model, images = _model_and_images(arch, size, batch, classes)
    from .inspect.compare import compare as make_comparison

    if seeds == 1:
        raise ConfigError("--seeds: got 1; accepted: 0, or at least 2 for a variance")
    print(make_comparison(model, images, config=config, seeds=seeds))


@app.command()
@clear_errors
def bench(
    model: Annotated[str, typer.Option(help="vgg16-cifar, resnet18, module:factory or file.py:factory.")],
    batch: Annotated[int, typer.Option(help="Images per training step.")] = 128,
    size: Annotated[int, typer.Option(help="Images of SIZE x SIZE pixels.")] = 32,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    rounds: Annotated[int, typer.Option(help="Timed steps of every variant, in turn.")] = 7,
    warm: Annotated[int, typer.Option(help="Steps before those that are not timed.")] = 3,
    allocator: Annotated[str, typer.Option(help="'default', 'tuned' or 'both'.")] = "default",
    no_baselines: Annotated[bool, typer.Option("--no-baselines", help="Measure fqt1bit only.")] = False,
    only: Annotated[str | None, typer.Option(help="Variants, separated by commas; fqt1bit among them.")] = None,
    no_memory: Annotated[bool, typer.Option("--no-memory", help="Leave out peak memory.")] = False,
    phases: Annotated[bool, typer.Option("--phases", help="Also break down our steps.")] = False,
    cold: Annotated[bool, typer.Option("--cold", help="Compile with empty Inductor caches.")] = False,
    out: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    bits: Bits = None,
    keep: Keep = None,
    scope: Scope = None,
    grad: Grad = None,
    preset: Preset = None,
    option: Option = None,
    debug: Debug = False,
) -> None:
    """Time whole training steps of eager, Inductor and fqt1bit, interleaved, and measure their memory."""
    from rich.console import Console

    from .bench import BenchSettings
    from .bench import bench as run
    from .bench.tables import WIDTH, tables
    from .results import write_json

    flags = {"bits": bits, "keep": keep, "scope": scope, "grad": grad, "preset": preset}
    settings = BenchSettings(
        model=model,
        batch=batch,
        size=size,
        threads=threads,
        rounds=rounds,
        warm=warm,
        config=parse_options(option or [], flags),
        baselines=not no_baselines,
        only=tuple(only.split(",")) if only else (),
        allocator=allocator,
        memory=not no_memory,
        phases=phases,
        cold=cold,
    )
    if out is not None:
        _make_folder(out)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    report = run(settings, lambda text: console.print(text, markup=False, highlight=False))
    for table in tables(report):
        console.print(table)
    if out is not None:
        write_json({"command": shlex.join(["fqt1bit", *sys.argv[1:]]), **report}, out)
        console.print(f"written: {out}", markup=False, soft_wrap=True)


def _in_our_words(error: Exception) -> str | None:
    """The sentence of an error that is ours or the system's, also inside of what torch.compile makes of it; else None.

    Of another failure of torch.compile its first line, since its traceback is torch's and not the user's.
    """
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, FQTError | OSError):
            return str(inner)
        last, inner = inner, getattr(inner, "inner_exception", None) or inner.__cause__
    if any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__):
        return f"torch cannot compile the model: {type(last).__name__}: {last}; --debug shows the traceback"
    return None


def main() -> None:
    """Entry point of the console script ``fqt1bit``."""
    app()


def _model_and_images(arch: str, size: int, batch: int, classes: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """A freshly initialized model in training mode and standard normal images [batch, 3, size, size]."""
    import torch

    from .models import make_model

    torch.manual_seed(0)
    model = make_model(arch, classes=classes, size=size)
    images = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    return model.train(), images


def _make_folder(file: Path) -> None:
    """The folder of a result, before the work that it is the result of."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--json: got {str(file)!r}; accepted: a file in a folder that can be written ({error})"
        ) from error


if __name__ == "__main__":
    main()
