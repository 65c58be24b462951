"""The commands. A configuration is read and checked before torch is imported, so a wrong file ends at once."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sdxl_training import __version__
from sdxl_training.config import LoadedConfig, load_config, notes
from sdxl_training.config.schema import Grid, Sampler
from sdxl_training.records import UserError

app = typer.Typer(
    help="A trainer for Stable Diffusion XL. Without a command: train.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

INTERRUPTED = 130

ConfigFile = Annotated[Path, typer.Option("--config", help="Configuration file (YAML).")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Set one value over the file's; may be repeated."),
]
RunFolder = Annotated[Path, typer.Option("--run", help="Folder of a run: <output_dir>/<run_name>.")]
CheckpointStep = Annotated[
    int | None, typer.Option("--checkpoint", metavar="STEP", min=0, help="Step of the checkpoint; default: the newest.")
]


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    check: Annotated[bool, typer.Option("--check", help="Check the configuration and stop.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="One step, one save, one preview, then stop.")] = False,
    resume: Annotated[
        str, typer.Option("--resume", metavar="auto|never|PATH", help="Checkpoint to go on from; auto: the newest.")
    ] = "auto",
) -> None:
    """Train, or go on training, as the configuration says."""
    loaded = load_config(config, overrides or ())
    _refuse_missing_checkpoint(resume)
    if check:
        typer.echo(check_report(loaded))
    else:
        _assemble().train(loaded, resume=resume, dry_run=dry_run)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    sheet: Annotated[
        Path | None, typer.Option("--sheet", metavar="FILE", help="Draw the 50 worst crops to a picture (PNG).")
    ] = None,
    crops: Annotated[
        Path | None,
        typer.Option("--crops", metavar="FILE", help="Write bucket, scale and cut of each picture (JSONL)."),
    ] = None,
    duplicates: Annotated[
        Path | None,
        typer.Option("--duplicates", metavar="FILE", help="Write which pictures are there several times (JSONL)."),
    ] = None,
) -> None:
    """State pictures, buckets, crops, captions, steps and cache without training."""
    loaded = load_config(config, overrides or ())
    assemble = _assemble()
    assemble.plan(loaded, as_json=as_json, files=assemble.PlanFiles(sheet, crops, duplicates))


@app.command()
def tags(
    config: ConfigFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    sheet: Annotated[
        Path | None,
        typer.Option("--sheet", metavar="FILE", help="Draw the pictures that count least and most (PNG)."),
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--page", metavar="FILE", help="Write tables, plots and pictures to a page (HTML).")
    ] = None,
) -> None:
    """State tags, their categories, counts and weights without training."""
    loaded = load_config(config, overrides or ())
    _assemble().tags(loaded, as_json=as_json, sheet_file=sheet, page_file=page)


@app.command()
def cache(
    config: ConfigFile,
    overrides: Overrides = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every entry first and name those damaged.")] = False,
) -> None:
    """Fill the cache without training: pictures, and captions where they are kept; several processes share the work."""
    loaded = load_config(config, overrides or ())
    _assemble().cache(loaded, verify=verify)


@app.command()
def sample(
    run: RunFolder,
    out: Annotated[Path, typer.Option("--out", help="Picture file to write (PNG).")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="What to draw; may be repeated.")] = None,
    prompts_file: Annotated[Path | None, typer.Option("--prompts-file", help="Text file, one prompt a line.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Sampler steps; default: as previews.")] = None,
    guidance: Annotated[float | None, typer.Option(min=1.0, max=1000.0, help="Guidance; default: as previews.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the noise; default: the run's previews.")] = None,
    sampler: Annotated[Sampler | None, typer.Option(help="How a step is made; default: the run's previews.")] = None,
    grid: Annotated[Grid | None, typer.Option(help="Noise levels visited; default: the run's previews.")] = None,
    shift: Annotated[float | None, typer.Option(min=0.01, max=100.0, help="Factor on sigma, grid linear.")] = None,
    guidance_rescale: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Contrast taken back.")] = None,
    checkpoint: CheckpointStep = None,
    raw_weights: Annotated[bool, typer.Option("--raw-weights", help="Draw without the averaged weights.")] = False,
) -> None:
    """Draw pictures with a trained run."""
    loaded = config_of_run(run)
    prompts = [*(prompt or ()), *(read_prompts(prompts_file) if prompts_file else ())]
    if not prompts:
        raise UserError("sample: nothing to draw; give --prompt TEXT or --prompts-file FILE with one prompt a line")
    use_ema = choose_ema(loaded, False if raw_weights else None)
    asked = {"steps": steps, "guidance": guidance, "seed": seed, "sampler": sampler, "grid": grid, "shift": shift}
    asked["guidance_rescale"] = guidance_rescale
    chosen = {name: value for name, value in asked.items() if value is not None}
    if grid is not None and shift is None:
        chosen["shift"] = 1.0  # the run's shift was meant for the run's grid
    previews = loaded.config.global_config.previews.model_copy(update=chosen)
    _assemble().sample(
        run_dir=run,
        prompts=prompts,
        previews=previews,
        out=out,
        checkpoint=checkpoint,
        use_ema=use_ema,
    )


@app.command()
def export(
    run: RunFolder,
    to: Annotated[Path, typer.Option("--to", help="Folder (diffusers) or .safetensors file (single_file) to write.")],
    file_format: Annotated[
        Literal["diffusers", "single_file"], typer.Option("--format", help="Layout of what is written.")
    ] = "diffusers",
    checkpoint: CheckpointStep = None,
    ema: Annotated[
        bool | None,
        typer.Option("--ema/--raw", help="Averaged or raw weights; default: averaged where the run has them."),
    ] = None,
) -> None:
    """Write a trained model for other programs."""
    use_ema = choose_ema(config_of_run(run), ema)
    _assemble().export(run_dir=run, checkpoint=checkpoint, use_ema=use_ema, format=file_format, to=to)


@app.command("demo-data")
def demo_data(
    to: Annotated[Path, typer.Option("--to", help="Folder to write to.")] = Path("demo/pictures"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the pictures.")] = 0,
    pictures: Annotated[int, typer.Option(min=1, help="Number of pictures.")] = 720,
) -> None:
    """Draw the demo's pictures of coloured shapes, with captions."""
    _assemble().write_demo_data(to=to, seed=seed, pictures=pictures)


@app.command()
def doctor() -> None:
    """Say what this machine can do, and what is missing."""
    raise typer.Exit(importlib.import_module("sdxl_training.doctor").main())


def check_report(loaded: LoadedConfig) -> str:
    """Return what --check prints: the verdict, what is worth knowing, and the sum behind a step."""
    training = loaded.config.training
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    parts = f"x accumulation {training.accumulation} x processes {processes}"
    if training.pixels_per_batch is None:
        pictures = training.batch_size * training.accumulation * processes
        sums = [
            f"  pictures per step = batch_size {training.batch_size} {parts} = {pictures}",
            f"  {training.max_steps} steps x {pictures} = {training.max_steps * pictures} pictures in all",
        ]
    else:
        pixels = training.pixels_per_batch * training.accumulation * processes
        sums = [f"  pixels per step = pixels_per_batch {training.pixels_per_batch} {parts} = {pixels} at most"]
    return "\n".join([f"{loaded.path}: no problems", *(f"  note: {note}" for note in notes(loaded.config)), *sums])


def config_of_run(run: Path) -> LoadedConfig:
    """Return the configuration that a run was trained with. Raises UserError where there is no such run."""
    resolved = run / "config.resolved.yaml"
    if not resolved.is_file():
        raise UserError(
            f"--run = {run}: holds no config.resolved.yaml; give the folder <output_dir>/<run_name> of a run"
        )
    return load_config(resolved)


def read_prompts(file: Path) -> list[str]:
    """Return the lines of a text file that are not blank. Raises UserError where it cannot be read."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--prompts-file = {file}: cannot be read: {error.strerror}; give a text file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts-file = {file}: is not UTF-8 text; save it as UTF-8") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def choose_ema(loaded: LoadedConfig, asked: bool | None) -> bool:
    """Return whether to use averaged weights; None means where the run has them. Raises UserError where it has none."""
    has_ema = loaded.config.training.ema.type != "none"
    if asked and not has_ema:
        raise UserError("--ema: this run keeps no averaged weights (training.ema.type = none); use --raw")
    return has_ema if asked is None else asked


def _refuse_missing_checkpoint(resume: str) -> None:
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        raise UserError(f"--resume = {resume}: no such folder; use auto, never, or the folder of a checkpoint")


def _assemble() -> Any:
    """Import torch and everything on it: only now, when nothing can be wrong with the configuration any more."""
    # torch's threads wait for each other by spinning. Where other processes need the cores, spinning long can make a
    # step dozens of times slower; a short spin costs a tenth on an idle machine: benchmarks/results/cpu_threads.md.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    return importlib.import_module("sdxl_training.assemble")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; `train` where none is named. A user's mistake is a sentence and status 2, Ctrl-C is 130."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--version"]:
        print(f"sdxl-training {__version__}")
        return
    if words and words[0].startswith("-") and words[0] != "--help":
        words.insert(0, "train")
    try:
        app(words, prog_name="sdxl-training")
    except UserError as mistake:
        print(mistake, file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer turns a KeyboardInterrupt into this exit, without a word
            print("interrupted; what was saved or cached before is kept", file=sys.stderr)
        raise
