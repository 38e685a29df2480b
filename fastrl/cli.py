"""The command line: fastrl train | score | report | bench | doctor."""

import warnings
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(
    help="Fast RL and inverse-RL post-training of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@app.command()
def train(
    recipe: Annotated[
        str | None,
        typer.Argument(help="A recipe file, or the name of a shipped recipe such as arithmetic."),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a setting: key.path=value. Repeatable."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The run folder to make; default runs/<name>-seed<seed>-<time>."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Continue the run in this folder, exactly where it stopped.")
    ] = None,
) -> None:
    """Train a model as a recipe says, then write a report of the run.

    On several processes: torchrun --nproc-per-node N -m fastrl train RECIPE.
    """
    console = Console()
    from fastrl import train as trainer

    if (recipe is None) == (resume is None):
        shipped = ", ".join(trainer.shipped_recipes())
        _fail(
            "give a RECIPE to start a run, or --resume RUN to continue one\n"
            f"a recipe is a YAML file, or one of {shipped}"
        )
    if resume is not None and (override or out):
        _fail("--resume continues a run as it is; --set and --out go with a recipe")
    try:
        config = None if recipe is None else trainer.load_recipe(recipe, override or [])
        if config is not None:  # what is missing is told before torch is imported
            from fastrl.train.named import check_named

            check_named(config)
    except ValueError as error:
        _fail(str(error))
    from transformers.utils import logging

    from fastrl.train import checkpoints, parallel
    from fastrl.train.report import write_report

    logging.disable_progress_bar()
    # What transformers tells its own callers and peft's; who trains cannot act on it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    try:
        with parallel.processes():
            console.quiet = parallel.rank() > 0
            if resume is not None:
                folder = trainer.resume(resume, console)
            else:
                assert config is not None
                folder = trainer.run(config, out, console)
            page = parallel.first(lambda: write_report(folder))
    except (
        ValueError,
        trainer.CheckpointError,
        trainer.TrainingError,
        parallel.LostProcess,
        OSError,
    ) as error:
        _fail(f"process {parallel.rank()}: {error}" if parallel.size() > 1 else str(error))
    except KeyboardInterrupt as stopped:
        if parallel.rank() > 0:
            raise typer.Exit(130) from None
        _stop(str(stopped) or "stopped before the run began")
    left = {
        "model" if name == "policy" else name: checkpoints.final(folder, name)
        for name in checkpoints.open_run(folder).trained
    } | {"report": page}
    width = max(map(len, left))
    for name, path in left.items():
        console.print(f"{name:{width}} {path}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write RUN/report.html: learning curves and sample completions."""
    from fastrl.train import CheckpointError
    from fastrl.train.report import print_summary, write_report

    try:
        page = write_report(run)
        print_summary(run, Console())
    except (CheckpointError, ValueError, OSError) as error:
        _fail(str(error))
    Console().print(f"report {page}", highlight=False, soft_wrap=True)


@app.command()
def score(
    model: Annotated[str, typer.Argument(help="A reward model: a directory, or a hub id.")],
    pairs: Annotated[Path, typer.Argument(help="JSON lines with prompt and completion.")],
    out: Annotated[Path, typer.Option(help="Where the scores go; continued where it exists.")],
    scheme: Annotated[
        str | None,
        typer.Option(
            help="int8 (the default), nf4, int4, fp8, bf16 or float32; bitsandbytes: as it stored "
            "the checkpoint. What save_pretrained wrote needs none."
        ),
    ] = None,
    keep_bf16: Annotated[
        list[str] | None,
        typer.Option(help="Linear layers to leave in bf16, such as down_proj. Repeatable."),
    ] = None,
    smooth: Annotated[
        Path | None,
        typer.Option(help="JSON lines like PAIRS by which outliers are smoothed (SmoothQuant)."),
    ] = None,
    ensemble: Annotated[
        str | None,
        typer.Option(help="One score of several heads: mean, worst_case or uncertainty."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    batch_tokens: Annotated[int, typer.Option(help="Tokens computed at a time.")] = 4096,
    activations: Annotated[
        str | None,
        typer.Option(help="Between layers: float32 or bf16; default: as the model is stored."),
    ] = None,
) -> None:
    """Score pairs of prompt and completion with a quantized reward model."""
    console = Console(stderr=True)
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        from fastrl.reward.stream import load_scorer, score_file

        scorer = load_scorer(
            model, scheme, keep_bf16 or (), smooth, device, batch_tokens, activations
        )
        made = score_file(scorer, pairs, out, ensemble=ensemble, console=console)
    except (ValueError, OSError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _stop("stopped; the same command goes on from there")
    with out.open("rb") as file:
        total = sum(1 for _ in file)
    scores = f"{made} scores" if made == total else f"{made} new scores, {total} in all"
    console.print(f"{scores}  {out}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def bench(
    ops: Annotated[
        list[str] | None, typer.Argument(metavar="[OP]...", help="Which ops; all without.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Peers, with commas: eager, torch, compile, trl, cce, liger, torchao, "
            "bitsandbytes, hf, openvino, llamacpp. Without: all, but those that compile first "
            "only on a GPU."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One small shape an op.")] = False,
    grid: Annotated[
        str | None, typer.Option(help="A list of shapes that the op has, such as full.")
    ] = None,
    shapes: Annotated[
        Path | None, typer.Option(help='JSON: {"logprob": [{"N": 64, "dtype": "float32"}]}.')
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="A shape of one op: N=64,dtype=float32. Repeatable.")
    ] = None,
    modes: Annotated[
        str | None, typer.Option(help="With commas: only these of forward, both, generate, ...")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures, after every shape.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of the times.")] = None,
    compare: Annotated[
        Path | None,
        typer.Option(help="An older --json: run its shapes; exit code 1 if ours became slower."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what the --json file has, run the rest.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Default: the cores of this process.")] = None,
    isa: Annotated[
        str | None, typer.Option(help="Hold ours and PyTorch to generic, avx2, avx512, ...")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="For a shape's rounds; default 4, with --quick 2.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Of each variant at most; default 30.")] = None,
    limit: Annotated[
        float | None,
        typer.Option(help="No shape starts after so many seconds; 480 where nothing is chosen."),
    ] = None,
    pause: Annotated[
        float | None,
        typer.Option(help="Seconds before each call, in which OpenMP's threads stop spinning."),
    ] = None,
    silence: Annotated[
        float | None, typer.Option(help="Seconds after which a call counts as hanging.")
    ] = None,
    cpu_time: Annotated[
        bool,
        typer.Option("--cpu-time", help="Count seconds on a core: where others use the machine."),
    ] = False,
    memory: Annotated[bool, typer.Option(help="Measure the memory of each variant.")] = True,
    peak: Annotated[bool, typer.Option(help="Measure what the machine can do, first.")] = True,
) -> None:
    """Race the ops against what else does them; what is wrong is not timed."""
    if resume and json is None:
        _fail("--resume goes with the --json file to go on from")
    if sum(x is not None for x in (shapes, grid)) + bool(shape) + quick > 1:
        _fail("--quick, --grid, --shapes and --shape exclude each other")
    import torch

    from fastrl.bench import command

    if limit is None and not (ops or quick or grid or shapes or shape or compare):
        limit = command.WHOLE
    try:
        chosen = command.options(
            device, threads, isa, quick, seconds=seconds, rounds=rounds, limit=limit, pause=pause,
            silence=silence, memory=memory, peak=peak, cpu_time=cpu_time, modes=modes,
        )  # fmt: skip
        old = None if compare is None else command.read(compare)
        where = torch.device(chosen.device)
        name = "quick" if quick else grid or "default"
        todo = command.shapes_of(ops or [], where, name, shapes, shape, old)
        code = command.run(todo, chosen, Console(), against, json, plot, old, resume)
    except (ValueError, OSError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        kept = "what was measured is above; --json FILE would keep it"
        if json is not None:
            kept = f"what was measured is in {json}; the same command with --resume goes on"
        _stop(f"stopped; {kept}")
    raise typer.Exit(code)


@app.command()
def doctor(
    selftest: Annotated[
        bool, typer.Option("--selftest", help="Run every op against its reference.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what this machine has, which implementation each op uses, and what is missing."""
    try:
        from fastrl.doctor import report

        code = report(Console(), selftest=selftest, as_json=as_json)
    except (ImportError, ValueError) as error:  # FASTRL_ISA or FASTRL_NATIVE asks for what is not
        _fail(str(error))
    raise typer.Exit(code)


def _fail(message: str) -> NoReturn:
    _say(f"[bold red]error[/bold red]: {escape(message)}")
    raise typer.Exit(2)


def _stop(message: str) -> NoReturn:
    """After Ctrl-C, which is no error."""
    _say(escape(message))
    raise typer.Exit(130)


def _say(text: str) -> None:
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)  # a command stays whole
