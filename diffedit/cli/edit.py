"""``diffedit edit`` and ``diffedit run``."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diffedit.cli import quiet_libraries, verbose_option
from diffedit.errors import InputError, ParameterError

if TYPE_CHECKING:
    from diffedit.result import Result
    from diffedit.sampler import Step
    from diffedit.workflow import Workflow

Command = Callable[..., Any]


def shared_options(command: Command) -> Command:
    """Add the options that `edit` and `run` have in common."""
    for option in reversed(
        (
            click.option(
                "-o",
                "--output",
                required=True,
                type=click.Path(path_type=Path),
                metavar="OUT",
                help="File to write (.png, .tif, .webp, .bmp, .jpg). With several seeds there is"
                " one for each: OUT-SEED.png.",
            ),
            click.option("--overwrite", is_flag=True, help="Replace OUT if it exists."),
            click.option(
                "--device", help="cpu, cuda, mps. [default: the accelerator if there is one]"
            ),
            click.option(
                "--dtype",
                type=click.Choice(["float32", "bfloat16", "float16", "float8"]),
                help="Precision; the lower ones are faster where the device computes in them, and"
                " change the picture a little; float8 saves memory only. [default: float32 on the"
                " CPU, else the 16-bit type that the model's family was trained in]",
            ),
            click.option(
                "--variant",
                help="Which weights of a model that has several, such as fp16. [default: those"
                " without a name]",
            ),
            click.option(
                "--config",
                help="For a single file: the folder or hub id of a model that has what the file"
                " lacks.",
            ),
            click.option(
                "--vae",
                help="Another autoencoder than the model's own: a folder, a .safetensors file or a"
                " hub id.",
            ),
            click.option(
                "--max-memory",
                metavar="SIZE",
                help="What the model's weights may take on an accelerator, such as 6GB: what finds"
                " no room stays in main memory, which is slower. [default: all there is]",
            ),
            click.option(
                "--low-memory",
                is_flag=True,
                help="Take less memory from the start, more slowly: predictions one after the"
                " other, large pictures in tiles.",
            ),
            click.option("--json", "as_json", is_flag=True, help="Print a report as JSON."),
            verbose_option,
        )
    ):
        command = option(command)
    return command


@click.command(
    short_help="Edit an image with a prompt and any set of edits.",
    epilog="Edits and their parameters: 'diffedit plugins show'.",
)
@click.argument("image", required=False, type=click.Path(path_type=Path))
@click.option("-p", "--prompt", help="What the picture is to show.")
@click.option("-n", "--negative", help="What it is not to show.")
@click.option(
    "-e",
    "--edit",
    "edits",
    multiple=True,
    metavar="EDIT",
    help="An edit, with parameters or without: 'inpaint:mask=m.png,feather=8',"
    " 'inpaint:{\"mask\": \"m.png\"}' or 'vignette'. Values with commas need the JSON form. Paths"
    " count from the working directory. May be repeated: all edits act together, in any order.",
)
@click.option("--steps", help="Sampling steps. [default: 20]")
@click.option(
    "--guidance", help="Guidance scale; 1 or less leaves the negative prompt out. [default: 5]"
)
@click.option("--rescale", help="Guidance rescale, from 0 to 1. [default: 0]")
@click.option(
    "--true-guidance",
    help="Guidance away from --negative, for models such as Flux. [default: none]",
)
@click.option("--scheduler", help="Sampler, such as dpmpp_2m. [default: the model's own]")
@click.option("--eta", help="Share of noise that ddim or tcd draws at each step, from 0 to 1.")
@click.option(
    "--seed", multiple=True, help="Seed; repeat it for several pictures at once. [default: 0]"
)
@click.option("--model", help="'tiny', a folder, a .safetensors file or a hub id. [default: tiny]")
@click.option("--size", metavar="WxH", help="Size of a picture made from nothing (without IMAGE).")
@shared_options
def edit(
    image: Path | None,
    output: Path,
    edits: Sequence[str],
    overwrite: bool,
    device: str | None,
    dtype: str | None,
    as_json: bool,
    variant: str | None,
    vae: str | None,
    max_memory: str | None,
    low_memory: bool,
    config: str | None,
    **said: Any,
) -> None:
    """Edit IMAGE in one pass and write OUT. Without IMAGE, make a picture from nothing.

    Where an edit has a mask (white = change), nothing changes outside mask and feather. Without
    any edit the picture is drawn anew: --edit img2img starts from IMAGE.
    """
    if said["prompt"] is None and not edits:
        raise InputError("nothing to do: give --prompt, --edit or both")
    workflow = workflow_of(edits, **said)
    loading: dict[str, Any] = {"device": device, "dtype": dtype, "variant": variant, "vae": vae}
    loading |= {"max_memory": max_memory, "low_memory": low_memory}
    _do(workflow, image, output, overwrite, as_json, {**loading, "config": config})


@click.command(short_help="Run a workflow file on an image.")
@click.argument("workflow", type=click.Path(path_type=Path))
@click.argument("image", required=False, type=click.Path(path_type=Path))
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="PLACE=VALUE",
    help="Replace a value of the workflow: 'passes.0.prompt=a red circle', 'seed=7',"
    " 'passes.0.edits.1.inpaint.feather=4'. VALUE is a YAML scalar or JSON; paths count from"
    " the working directory. May be repeated.",
)
@shared_options
def run(
    workflow: Path,
    image: Path | None,
    overrides: Sequence[str],
    output: Path,
    overwrite: bool,
    device: str | None,
    dtype: str | None,
    as_json: bool,
    variant: str | None,
    vae: str | None,
    max_memory: str | None,
    low_memory: bool,
    config: str | None,
) -> None:
    """Run the passes of WORKFLOW (YAML) on IMAGE and write OUT.

    Paths in WORKFLOW count from its folder. Without IMAGE, a picture is made from nothing, of
    the workflow's size.
    """
    from diffedit.workflow import Workflow

    loaded = Workflow.load(workflow, overrides=overrides)
    loading: dict[str, Any] = {"device": device, "dtype": dtype, "variant": variant, "vae": vae}
    loading |= {"max_memory": max_memory, "low_memory": low_memory, "config": config}
    _do(loaded, image, output, overwrite, as_json, loading, inputs=[workflow])


def workflow_of(
    edits: Sequence[str],
    *,
    seed: Sequence[str] = (),
    model: str | None = None,
    size: str | None = None,
    **said: str | None,
) -> Workflow:
    """The workflow of one pass that the options of `diffedit edit` describe.

    Raises:
        InputError: names the option, the value and what would be right.
    """
    from diffedit.workflow import Workflow
    from diffedit.yaml import parse_scalar

    texts = ("prompt", "negative", "scheduler")
    one: dict[str, Any] = {
        key: value if key in texts else parse_scalar(value)
        for key, value in said.items()
        if value is not None
    }
    one["edits"] = [parse_edit(text) for text in edits]
    seeds = [parse_scalar(part) for text in seed for part in text.split(",")]
    data: dict[str, Any] = {"passes": [one]}
    if seeds:
        data["seed"] = seeds[0] if len(seeds) == 1 else seeds
    if model is not None:
        data["model"] = model
    if size is not None:
        data["size"] = size
    marks: dict[tuple[str | int, ...], str] = {(key,): f"--{key}" for key in data}
    marks |= {("passes", 0, key): f"--{key}" for key in one}
    marks |= {("passes", 0, "edits", at): "--edit" for at in range(len(edits))}
    return Workflow.from_data(data, where="command line", marks=marks)


def parse_edit(text: str) -> str | dict[str, Any]:
    """An edit as plain data, from ``name``, ``name:key=value,…`` or ``name:{JSON}``."""
    from diffedit.yaml import parse_scalar

    name, colon, rest = text.partition(":")
    name, rest = name.strip(), rest.strip()
    right = "should be 'name', 'name:key=value,key=value' or 'name:{\"key\": value}'"
    if not name:
        raise ParameterError(f"--edit {text!r} has no name, {right}")
    if not colon or not rest:
        return name
    if rest.startswith("{"):
        try:
            return {name: json.loads(rest, object_pairs_hook=lambda pairs: _once(name, pairs))}
        except json.JSONDecodeError as error:
            raise ParameterError(
                f"--edit {name}: not JSON: {error.msg} at character {error.pos + 1} of {rest!r}"
            ) from None
    pairs = []
    for part in rest.split(","):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise ParameterError(
                f"--edit {name}: {part.strip()!r} is no key=value (values with commas need the form"
                f' \'{name}:{{"key": "a, b"}}\')'
            )
        pairs.append((key.strip(), parse_scalar(value)))
    return {name: _once(name, pairs)}


def _once(name: str, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    said = dict(pairs)
    if len(said) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ParameterError(f"--edit {name}: {twice!r} stands twice")
    return said


def _do(
    workflow: Workflow,
    image: Path | None,
    output: Path,
    overwrite: bool,
    as_json: bool,
    loading: Mapping[str, Any],
    inputs: Sequence[Path] = (),
) -> None:
    """Check, load (as `Editor.load` takes it), run, save, report."""
    from diffedit.cli.checks import (
        check_format,
        check_model,
        check_output,
        check_workflow,
        open_image,
    )

    given = [*inputs, *workflow.files(), *([image] if image else [])]
    check_output(output, workflow.seeds, given, overwrite)
    picture = None if image is None else open_image(image)
    if picture is None and workflow.size is None:
        raise InputError(
            "no IMAGE: name one, or give a size to make one from nothing (--size 256x256; of a"
            " workflow --set size=256x256)"
        )
    if picture is not None and workflow.size is not None:
        width, height = picture.size
        raise InputError(
            f"a size is for pictures made from nothing; {image} is {width}x{height} and stays so:"
            " leave out the size or the image"
        )
    if picture is not None:
        check_format(output, picture)
    check_workflow(workflow, picture)
    # Libraries print to stdout as they please; it belongs to the report.
    with contextlib.redirect_stdout(sys.stderr):
        from diffedit.editor import Editor

        check_model(workflow)

        quiet_libraries()
        editor = Editor.load(workflow.model, **loading)
        with editor.stream(image, workflow) as events, Progress() as progress:
            for step in events:
                progress(step)
            result: Result = events.result
        written = result.save(output, overwrite=overwrite)
    if as_json:
        report = {"outputs": [str(path) for path in written], **result.provenance}
        click.echo(json.dumps(report, indent=2, ensure_ascii=False, default=str))
    elif sys.stdout.isatty():
        for path in written:
            click.echo(path)


class Progress:
    """A bar on stderr for each pass when that is a terminal, and nothing otherwise."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._shown = (-1, -1)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, step: Step) -> None:
        """Show that a step is done."""
        if not sys.stderr.isatty():
            return
        if self._shown != (step.pass_index, step.total):
            from tqdm import tqdm

            self.__exit__()
            self._shown = (step.pass_index, step.total)
            several = step.passes > 1
            name = f"pass {step.pass_index + 1} of {step.passes}" if several else "sampling"
            self._bar = tqdm(total=step.total, desc=name, unit="step", leave=False, file=sys.stderr)
        self._bar.update(step.index + 1 - self._bar.n)
