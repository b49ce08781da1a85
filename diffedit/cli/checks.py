"""What can be said about a job before its model is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffedit.errors import ImageError, InputError, OutputError, SchedulerError, lacking

if TYPE_CHECKING:
    from diffedit.images import Picture
    from diffedit.workflow import Workflow

_SUFFIXES = (".png", ".tif", ".tiff", ".webp", ".bmp", ".jpg", ".jpeg")


def targets(output: Path, seeds: Sequence[int]) -> list[Path]:
    """The files that will be written: one per seed, numbered where there are several."""
    if len(seeds) == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{seed}") for seed in seeds]


def check_output(
    output: Path, seeds: Sequence[int], inputs: Iterable[Path], overwrite: bool
) -> None:
    """Refuse a place that cannot or must not be written to.

    Raises:
        OutputError: one line that names another way.
    """
    if len(set(seeds)) != len(seeds):
        raise OutputError("a seed stands twice, and each makes a file of its own: give it once")
    known = list(inputs)
    for path in targets(output, seeds):
        if path.is_dir():
            raise OutputError(f"-o {path} is a folder, should be a file such as {path / 'out.png'}")
        if path.suffix.lower() not in _SUFFIXES:
            what = f"the suffix {path.suffix!r}" if path.suffix else "no suffix"
            raise OutputError(
                f"-o {path}: {what} names no format, should be .png, .tif, .webp, .bmp or .jpg"
            )
        if not path.parent.is_dir():
            raise OutputError(
                f"-o {path}: the folder {path.parent} does not exist, create it first"
            )
        for source in known:
            if path.exists() and source.exists() and path.samefile(source):
                raise OutputError(
                    f"-o {path} is the input {source}, which is never written to:"
                    " name another output"
                )
        if not overwrite and os.path.lexists(path):
            raise OutputError(f"-o {path} exists: name another output, or add --overwrite")
        if not os.access(path.parent, os.W_OK):
            raise OutputError(f"-o {path}: the folder {path.parent} cannot be written to")


def open_image(image: Path) -> Picture:
    """The decoded picture.

    Raises:
        ImageError: nothing there, not an image, or damaged.
    """
    from diffedit.images import open_picture

    if not image.exists():
        raise ImageError(f"{image} does not exist, should be the image to edit")
    return open_picture(image)


def check_format(output: Path, picture: Picture) -> None:
    """Refuse a format that cannot hold the picture's depth or alpha, which the result will have.

    Raises:
        OutputError: names formats that can.
    """
    suffix, deep = output.suffix.lower(), picture.max_value > 255
    shallow, opaque = suffix not in (".png", ".tif", ".tiff"), suffix in (".bmp", ".jpg", ".jpeg")
    lost = ["16-bit pixels"] * (deep and shallow) + ["alpha"] * (picture.has_alpha and opaque)
    if lost:
        better = ".png or .tif" if deep else ".png, .webp or .tif"
        raise OutputError(
            f"-o {output}: {suffix} cannot hold {' and '.join(lost)} of the image, use {better}"
        )


def check_workflow(workflow: Workflow, picture: Picture | None) -> None:
    """Ask everything that needs no model: images open, masks fit, schedulers are known.

    Raises:
        InputError: what does not fit.
    """
    for number, one in enumerate(workflow.passes):
        for edit in one.edits:
            for _, value in edit:
                if hasattr(value, "picture"):
                    _ = value.digest  # decodes; a damaged file is told here
            if picture is not None:
                _check_region(edit, picture)
        if one.scheduler is not None:
            from diffedit.schedulers import named

            try:
                named(one.scheduler)
            except SchedulerError as error:
                place = f"passes.{number}: " if len(workflow.passes) > 1 else ""
                raise SchedulerError(f"{place}{error}") from None


def check_model(workflow: Workflow) -> None:
    """Refuse edits and prompts that a model's family cannot carry, before its weights are read.

    Raises:
        ModelError: there is no such model, or it is of an unknown family.
        CapabilityError: names the edit, or the prompt.
    """
    from diffedit import plugins, prompts
    from diffedit.models.loading import recognised
    from diffedit.models.protocol import FAMILY_WIDE

    for one in workflow.passes:
        family = recognised(one.model or workflow.model, plugins.default().families)
        has = getattr(family, "carries", None)
        if has is None:
            continue
        sometimes = getattr(family, "sometimes", None)
        if sometimes is not None:
            for where, prompt in (("prompt", one.prompt or ""), ("negative", one.negative)):
                prompts.check(where, prompt, has | sometimes, f"the family {family.name}")
        for edit in one.edits:
            known = edit.needs & FAMILY_WIDE if sometimes is None else edit.needs - sometimes
            if missing := known - has:
                raise lacking(edit.id or edit.name, missing, has, f"the family {family.name}")


def _check_region(edit: object, picture: Picture) -> None:
    """An edit's region is pure geometry, so a mask of another size is told at once."""
    try:
        edit.region(picture)  # type: ignore[attr-defined]
    except InputError:
        raise
    except Exception:  # the core asks again, and names the plugin
        return
