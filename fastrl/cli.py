"""The command line: fastrl train | score | report | doctor."""

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
    """Train a model as a recipe says, then write a report of the run."""
    console = Console()
    if (recipe is None) == (resume is None):
        _fail("give a RECIPE to start a run, or --resume RUN to continue one")
    if resume is not None and (override or out):
        _fail("--resume continues a run as it is; --set and --out go with a recipe")
    from transformers.utils import logging

    from fastrl import train as trainer
    from fastrl.train.report import write_report

    logging.disable_progress_bar()
    try:
        if resume is not None:
            folder = trainer.resume(resume, console)
        else:
            assert recipe is not None
            folder = trainer.run(trainer.load_recipe(recipe, override or []), out, console)
        page = write_report(folder)
    except (ValueError, trainer.CheckpointError, trainer.TrainingError, OSError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted; fastrl train --resume with the run folder continues it", code=130)
    console.print(f"model  {folder / 'final'}\nreport {page}", highlight=False)


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
    Console().print(f"report {page}", highlight=False)


@app.command()
def score(
    model: Annotated[str, typer.Argument(help="A reward model: a directory, or a hub id.")],
    pairs: Annotated[Path, typer.Argument(help="JSON lines with prompt and completion.")],
    out: Annotated[Path, typer.Option(help="Where the scores go; continued where it exists.")],
    scheme: Annotated[
        str,
        typer.Option(
            help="int8, nf4, int4, fp8, bf16 or float32; bitsandbytes: as the checkpoint is stored."
        ),
    ] = "int8",
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
) -> None:
    """Score pairs of prompt and completion with a quantized reward model."""
    console = Console(stderr=True)
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        from fastrl.reward.stream import load_scorer, score_file

        scorer = load_scorer(model, scheme, keep_bf16 or (), smooth, device, batch_tokens)
        made = score_file(scorer, pairs, out, ensemble=ensemble, console=console)
    except (ValueError, OSError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on where it stopped", code=130)
    console.print(f"{made} scores  {out}", highlight=False)


@app.command()
def doctor() -> None:
    """Say what this machine has, which implementation each op uses, and what is missing."""
    try:
        from fastrl.doctor import print_diagnosis

        code = print_diagnosis(Console())
    except (ImportError, ValueError) as error:  # FASTRL_ISA or FASTRL_NATIVE asks for what is not
        _fail(str(error))
    raise typer.Exit(code)


def _fail(message: str, code: int = 2) -> NoReturn:
    Console(stderr=True).print(f"[bold red]error[/bold red]: {escape(message)}", highlight=False)
    raise typer.Exit(code)
