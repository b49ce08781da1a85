"""``diffedit schedulers``."""

from __future__ import annotations

import click

from diffedit.cli import verbose_option


@click.command(short_help="List the samplers, and what each can do.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@verbose_option
def schedulers(as_json: bool) -> None:
    """List what --scheduler takes, and what each can do.

    'calls' are evaluations of the model per step, and 'order' is that of the solver's accuracy. A
    stochastic sampler draws noise at each step. All that say 'yes' under 'starts inside' serve
    img2img and inpaint. 'flow' is for models trained as rectified flows, such as Stable Diffusion 3
    and Flux.
    """
    from diffedit.cli.tables import echo_json, echo_table
    from diffedit.schedulers import SCHEDULERS

    found = [
        {
            "name": one.name,
            "order": one.order,
            "calls": one.calls,
            "stochastic": one.stochastic,
            "starts_inside": one.add_noise,
            "flow": one.flow is not None,
            "class": one.cls,
        }
        for _, one in sorted(SCHEDULERS.items())
    ]
    if as_json:
        echo_json(found)
        return
    head = [name.replace("_", " ") for name in found[0]]
    words = {True: "yes", False: "no"}
    echo_table(
        head,
        [
            [words[value] if isinstance(value, bool) else str(value) for value in one.values()]
            for one in found
        ],
    )
    click.echo("\nWithout --scheduler a model's own is used.")
