"""ControlNets start as nothing, come to need their hints, and go where edits find them."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from diffedit import Editor, Pass
from diffedit.errors import InputError
from diffedit.models.control import own_control
from diffedit.models.stable_diffusion import Family
from diffedit.testing import tiny_pipeline
from diffedit.training.config import ControlNetTraining, Data, Objective, Optimiser
from diffedit.training.control import (
    ControlNetTask,
    blank,
    controlled,
    export_controlnet,
    new_controlnet,
    overfit,
    sampled,
    shown,
)
from diffedit.training.data import Captioned, Folder, Pixels, Source, check, split
from diffedit.training.export import fold_statistics
from diffedit.training.hints import Hinted, canny, colour_of
from diffedit.training.parts import load, new_unet
from diffedit.training.stages import build
from diffedit.training.world.source import Drawn
from diffedit.training.world.things import NOUNS
from diffedit_controlnet import ControlNet
from diffedit_controlnet import preprocessors as plugin

SIDE = 64
CPU = torch.device("cpu")
WORLD = Drawn({"rich": 1.0}, 60, SIDE)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion folder of random weights whose latents are of size one."""
    pipe = tiny_pipeline(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    images = np.stack([WORLD[index].image for index in range(8)])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        fold_statistics(pipe.vae, pipe.vae.encode(pixels).latent_dist.parameters)
    pipe.vae.register_to_config(scaling_factor=1.0)
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return folder


def training(model: Path, out: Path, **changes: object) -> ControlNetTraining:
    settings: dict[str, object] = {
        "train": "controlnet",
        "model": str(model),
        "data": Data(world="plain", count=8, side=SIDE, held_out=2),
        "out": out / "out",
        "batch": 4,
        "small": True,
        "optimiser": Optimiser(rate=3e-3),
        # Where there is more noise than picture, the picture is to be had from the hint alone.
        "objective": Objective(focus=(0.6, 1.0, 1.0), dropout=1.0),
    }
    return ControlNetTraining.model_validate(settings | changes)


def hinted(source: Source, kind: str, index: int) -> Pixels:
    hint = Hinted(source, kind)[index].hint
    assert hint is not None
    return hint


def unet() -> UNet2DConditionModel:
    return tiny_pipeline().unet


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "x_t": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([10, 900]),
        "words": torch.randn(2, 77, 32, generator=generator),
        "hints": torch.rand(2, 3, SIDE, SIDE, generator=generator),
    }


# -- the net -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("small", [False, True])
def test_a_fresh_net_changes_no_bit(small: bool) -> None:
    base, given = unet(), inputs()
    bare = base(
        given["x_t"], given["timestep"], encoder_hidden_states=given["words"], return_dict=False
    )[0]
    net = new_controlnet(base, small=small)
    assert torch.equal(controlled(base, net, **given), bare)
    torch.nn.init.normal_(net.controlnet_mid_block.weight)
    assert not torch.equal(controlled(base, net, **given), bare)


@pytest.mark.parametrize("small", [False, True])
def test_a_net_starts_with_the_unets_weights(small: bool) -> None:
    base = unet()
    theirs, mine = base.state_dict(), new_controlnet(base, small=small).state_dict()
    own = {key for key in mine if key.startswith("controlnet_")}
    assert {key for key in mine if key in theirs} == set(mine) - own
    assert all(torch.equal(mine[key], theirs[key]) for key in set(mine) - own)
    assert any("attentions" in key for key in mine) != small


@pytest.mark.parametrize(
    ("widths", "small", "millions"),
    [((64, 128, 192), False, 5.34), ((64, 64, 128, 192), True, 2.44)],
)
def test_nets_have_the_sizes_that_are_stated(
    widths: tuple[int, ...], small: bool, millions: float
) -> None:
    with torch.device("meta"):
        net = new_controlnet(new_unet(widths, plain_levels=0, sample_size=32), small=small)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    assert f"{millions:.2f} M" in (new_controlnet.__doc__ or "")


@pytest.mark.parametrize("factor", [2, 8, 32])
def test_hints_come_to_the_size_of_the_latents(factor: int) -> None:
    reader = new_controlnet(unet(), factor=factor).controlnet_cond_embedding
    assert reader(torch.zeros(1, 3, SIDE, SIDE)).shape[-1] == SIDE // factor


@torch.no_grad()
def test_edge_maps_are_told_apart_from_the_first_step_on() -> None:
    """As diffusers starts these convolutions, nothing of a hint is left at their end."""
    hints = np.stack([canny(WORLD[index].image) for index in range(8)])
    shown = torch.from_numpy(hints).permute(0, 3, 1, 2) / 255

    def spread(net: ControlNetModel) -> float:
        reader = net.controlnet_cond_embedding
        found = torch.nn.functional.silu(reader.conv_in(shown))
        for block in reader.blocks:
            found = torch.nn.functional.silu(block(found))
        return float(found.std(dim=0).mean())

    torch.manual_seed(0)
    assert spread(new_controlnet(unet())) > 0.03
    assert spread(ControlNetModel.from_unet(unet())) < 3e-4


# -- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("small", [False, True])
def test_a_net_comes_to_need_its_hints(model: Path, tmp_path: Path, small: bool) -> None:
    task = ControlNetTask(training(model, tmp_path, small=small), CPU)
    figures = task.validate()
    assert figures["validation loss"] == figures["validation loss, blank hints"] > 0
    found = overfit(task, 60)
    assert found.hinted < 0.6 * found.before
    assert found.hinted < 0.7 * found.shuffled
    assert found.hinted < 0.7 * found.blank
    after = task.validate()
    assert after["validation loss"] != after["validation loss, blank hints"]


def test_a_net_for_inpainting_comes_to_need_its_holes(model: Path, tmp_path: Path) -> None:
    """What stands around a hole is known, and where it is; errors count in it."""
    asked = training(model, tmp_path, kind="inpaint", objective=Objective(backdrop=0.0))
    task = ControlNetTask(asked, CPU)
    rows = task.batch(0, torch.Generator().manual_seed(0))
    assert rows["hints"].shape == (4, 4, SIDE, SIDE)
    holes = rows["hints"][:, 3]
    assert set(holes.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(rows["where"], torch.nn.functional.max_pool2d(holes, 8))
    seen = shown(rows["hints"])
    assert seen.shape == (4, 3, SIDE, SIDE)
    assert (seen.permute(1, 0, 2, 3)[:, holes > 0] == -1).all()
    assert (seen.amin(dim=1)[holes == 0] >= 0).all()
    assert (shown(blank(rows["hints"])) == -1).all()
    found = overfit(task, 60)
    assert found.hinted < 0.9 * found.before
    assert found.hinted < 0.95 * found.shuffled
    picture = task.pictures()[0][1]
    assert picture.shape == (SIDE, 2 * SIDE, 3)


def test_holes_are_what_people_mask(photos: Path) -> None:
    """Outlines of things, what lies around them, any place; the same ones again."""
    world = Drawn({"views": 1.0}, 200, SIDE)
    covered, kinds = [], list[str]()
    for index in range(200):
        example = Hinted(world, "inpaint")[index]
        assert example.hint is not None
        hole = example.hint[..., 3] > 0
        assert (example.hint[..., :3] == example.image).all()
        assert hole.any()
        masks = [mask > 0.9 for mask in world.drawn(index)[1].masks if (mask > 0.9).any()]
        whole = any((hole >= mask).all() for mask in masks)
        free = not (hole & np.logical_or.reduce(masks)).any()
        kinds.append("all" if hole.all() else "a thing" if whole else "none" if free else "some")
        covered.append(hole.mean())
    assert set(kinds) == {"all", "a thing", "none", "some"}
    assert kinds.count("a thing") > 60
    assert kinds.count("none") > 20  # where something might have been that is to go
    assert 0.05 < np.mean([c == 1 for c in covered]) < 0.2
    assert np.median(covered) < 0.4
    again = Hinted(world, "inpaint")[7].hint
    assert again is not None
    assert (again == Hinted(Drawn({"views": 1.0}, 200, SIDE), "inpaint")[7].hint).all()
    own = Hinted(Captioned(photos / "rows.jsonl", SIDE), "inpaint")[1]
    assert own.hint is not None
    assert own.hint.shape == (SIDE, SIDE, 4)


def test_nothing_but_the_net_is_trained(model: Path, tmp_path: Path) -> None:
    task = build(training(model, tmp_path), CPU)
    assert isinstance(task, ControlNetTask)
    rows = task.batch(0, torch.Generator().manual_seed(0))
    assert "embeddings" in rows
    assert "tokens" not in rows
    assert rows["hints"].shape == (4, 3, SIDE, SIDE)
    assert set(rows["hints"].unique().tolist()) == {0.0, 1.0}
    task.loss(rows).backward()
    for frozen in (task.parts.unet, task.parts.text_encoder, task.parts.vae):
        assert all(p.grad is None for p in frozen.parameters())
    assert any(p.grad is not None and p.grad.any() for p in task.net.parameters())
    trained = {id(p) for opt in task.optimizers for g in opt.param_groups for p in g["params"]}
    assert trained == {id(p) for p in task.net.parameters()}


def test_batches_of_one_cannot_be_tested_on(model: Path, tmp_path: Path) -> None:
    task = ControlNetTask(training(model, tmp_path, batch=1), CPU)
    with pytest.raises(InputError, match="two examples"):
        overfit(task, 1)


def test_another_target_than_the_models_is_refused(model: Path, tmp_path: Path) -> None:
    asked = training(model, tmp_path, objective=Objective(target="epsilon"))
    with pytest.raises(InputError, match=r"predicts v_prediction, .*leave target out"):
        ControlNetTask(asked, CPU)


def test_a_grid_shows_hints_beside_samples(model: Path, tmp_path: Path) -> None:
    task = ControlNetTask(training(model, tmp_path, prompts=("a red circle",)), CPU)
    ((title, picture),) = task.pictures()
    assert title == "a red circle"
    assert picture.shape == (SIDE, 2 * SIDE, 3)
    assert task.latents.held is not None
    assert (picture[:, :SIDE] == task.latents.held.source[0].hint).all()


def test_a_net_may_be_gone_on_from(model: Path, tmp_path: Path) -> None:
    first = ControlNetTask(training(model, tmp_path), CPU)
    overfit(first, 20)
    first.export(tmp_path / "first")
    task = ControlNetTask(training(model, tmp_path, start=tmp_path / "first"), CPU)
    was, now = first.net.state_dict(), task.net.state_dict()
    assert all(torch.allclose(was[key], now[key], atol=1e-3) for key in now)
    assert {value.dtype for value in now.values()} == {torch.float32}
    rows = task.batch(0, torch.Generator().manual_seed(0))
    known, fresh = (
        float(one.loss(rows)) for one in (task, ControlNetTask(training(model, tmp_path), CPU))
    )
    assert known < fresh
    task.loss(rows).backward()
    assert all(p.grad is not None for p in task.net.parameters())
    task.export(tmp_path / "second")
    assert str(tmp_path) not in (tmp_path / "second" / "config.json").read_text("utf-8")
    with pytest.raises(InputError, match="there is no folder"):
        ControlNetTask(training(model, tmp_path, start=tmp_path / "none"), CPU)
    other = new_controlnet(new_unet((32, 32), plain_levels=0, sample_size=8, hidden=32))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="was made for another model"):
        ControlNetTask(training(model, tmp_path, start=tmp_path / "other"), CPU)


# -- what comes out ------------------------------------------------------------------------------


def test_the_result_is_found_by_diffusers_and_by_edits(model: Path, tmp_path: Path) -> None:
    task = ControlNetTask(training(model, tmp_path), CPU)
    for joint in (*task.net.controlnet_down_blocks, task.net.controlnet_mid_block):
        torch.nn.init.normal_(joint.weight, std=0.1)
    home = tmp_path / "copy"
    shutil.copytree(model, home)
    folder = home / "controlnet" / "canny"
    task.export(folder)
    task.export(folder)  # in place of the first
    assert [p.name for p in folder.parent.iterdir()] == ["canny"]
    assert json.loads((folder / "diffedit.json").read_text("utf-8")) == {"kind": "canny"}
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}

    plain = ControlNetModel.from_pretrained(folder)
    given = inputs()
    with torch.no_grad():
        mine = controlled(task.parts.unet, task.net, **given)
        theirs = controlled(task.parts.unet, plain, **given)
    assert torch.allclose(mine, theirs, atol=0.02 * float(mine.abs().max()))

    export_controlnet(tmp_path / "strong", task.net, "canny", strength=1.5)
    strong = ControlNetModel.from_pretrained(tmp_path / "strong")
    with torch.no_grad():
        assert torch.equal(controlled(task.parts.unet, task.net, **given), mine)  # as it was
        asked = [given[key] for key in ("x_t", "timestep", "words", "hints")]
        weak, more = (
            net(*asked, conditioning_scale=scale, return_dict=False)
            for net, scale in ((plain, 1.5), (strong, 1.0))
        )
    for one, other in zip((*weak[0], weak[1]), (*more[0], more[1]), strict=True):
        assert torch.allclose(one, other, rtol=0.01, atol=1e-3 * float(one.abs().max()))

    options = {"device": CPU, "dtype": torch.float32, "revision": None, "variant": None}
    editor = Editor(Family().load(str(home), **options))
    picture = WORLD[0].image

    def made(**edit: Any) -> Any:
        edits = [ControlNet(**edit)]
        return editor.run(picture, Pass(prompt="a", steps=2, edits=edits), seed=1).pixels

    own = made()
    assert (own == made(model=str(folder))).all()
    assert (own != made(weight=0)).any()


def test_a_models_own_net_is_the_one_for_the_kind(tmp_path: Path) -> None:
    def put(folder: Path, kind: str | list[str] | None) -> Path:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        if kind is not None:
            (folder / "diffedit.json").write_text(json.dumps({"kind": kind}))
        return folder

    def found(name: str, kind: str | None) -> Path | None:
        return own_control(str(tmp_path / name), kind)

    one = put(tmp_path / "one" / "controlnet", "depth")
    assert found("one", "depth") == found("one", "depth_midas") == one
    assert found("one", None) == found("one", "none") == one
    assert found("one", "canny") is None
    assert found("unsaid", "canny") is None
    unsaid = put(tmp_path / "unsaid" / "controlnet", None)
    assert found("unsaid", "canny") == unsaid
    two = put(tmp_path / "two" / "controlnet" / "canny", "canny")
    three = put(tmp_path / "two" / "controlnet" / "depth_zoe", "depth")
    assert found("two", "canny") == two
    assert found("two", "depth_zoe") == three
    assert found("two", "depth_midas") == three  # it says that it is for depth, however made
    assert found("two", "segments") is None
    assert found("two", "none") is None
    both = put(tmp_path / "both" / "controlnet", None)
    put(tmp_path / "both" / "controlnet" / "depth", "depth")
    assert found("both", "none") == both
    several = put(tmp_path / "several" / "controlnet" / "canny", ["canny", "depth", "segments"])
    put(tmp_path / "several" / "controlnet" / "inpaint", "inpaint")
    for kind in ("canny", "depth", "depth_midas", "segments", "none"):
        assert found("several", kind) == several
    assert found("several", "openpose") is None


# -- hints ---------------------------------------------------------------------------------------


def test_edges_are_those_of_the_edit() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    for image in (noise, cv2.blur(noise, (5, 5)), *(WORLD[index].image for index in range(12))):
        assert (canny(image) == plugin.canny(image)).all()
    assert {p.name: p for p in plugin.PREPROCESSORS}["canny"].load(None) is plugin.canny
    assert (hinted(WORLD, "canny", 3) == plugin.canny(WORLD[3].image)).all()


def test_nearer_is_brighter() -> None:
    seen = 0
    for index in range(len(WORLD)):
        drawing = WORLD.drawn(index)[1]
        hint = hinted(WORLD, "depth", index)
        assert (hint == hint[..., :1]).all()
        shown = [
            (t, hint[m > 0.9, 0]) for t, m in zip(drawing.scene.things, drawing.masks, strict=True)
        ]
        shown = [(thing, values) for thing, values in shown if len(values)]
        for near, far in itertools.permutations(shown, 2):
            if near[0].layer > far[0].layer:
                assert near[1].min() > far[1].max()
                seen += 1
        covered = np.maximum.reduce(drawing.masks) if drawing.masks else np.zeros((SIDE, SIDE))
        if not drawing.scene.stage:
            assert (hint[covered == 0] == 0).all()
            assert (hint[covered > 0.9] > 0).all()
    assert seen > 5


def test_regions_have_their_nouns_colours() -> None:
    for index in range(12):
        drawing = WORLD.drawn(index)[1]
        hint = hinted(WORLD, "segments", index)
        for y, x in np.random.default_rng(index).integers(0, SIDE, (40, 2)):
            shown = [
                (mask[y, x], thing.noun)
                for thing, mask in zip(drawing.scene.things, drawing.masks, strict=True)
                if mask[y, x] > 0.5
            ]
            expected = colour_of(max(shown)[1]) if shown else np.zeros(3)
            assert (hint[y, x] == expected).all()


def test_colours_are_those_of_voc() -> None:
    published = {1: (128, 0, 0), 2: (0, 128, 0), 4: (0, 0, 128), 11: (192, 128, 0)}
    published |= {15: (192, 128, 128), 20: (0, 64, 128)}
    for label, colour in published.items():
        assert tuple(colour_of(NOUNS[label - 1])) == colour
    made = {tuple(colour_of(noun)) for noun in NOUNS}
    assert len(made) == len(NOUNS)
    assert (0, 0, 0) not in made


def test_chosen_scenes_keep_their_own_hints() -> None:
    rest, held = split(WORLD, 8, seed=3)
    for part in (rest, held):
        for number, row in enumerate(part.rows[:8].tolist()):
            assert (hinted(part, "segments", number) == hinted(WORLD, "segments", row)).all()


def test_other_kinds_are_other_sources() -> None:
    sources = [Hinted(WORLD, kind) for kind in ("canny", "depth", "segments")]
    digests = {WORLD.digest, *(source.digest for source in sources)}
    assert len(digests) == 4
    assert Hinted(WORLD, "depth").digest == sources[1].digest


def test_one_network_for_several_kinds_sees_each_in_turn() -> None:
    kinds = ("canny", "depth", "segments")
    several = Hinted(WORLD, *kinds)
    for index in range(6):
        shown = several[index].hint
        assert shown is not None
        assert (shown == hinted(WORLD, kinds[index % 3], index)).all()
    rest, _ = split(WORLD, 8, seed=3)  # an example keeps its kind in every choice of examples
    for number, row in enumerate(rest.rows[:6].tolist()):
        assert np.array_equal(Hinted(rest, *kinds)[number].hint, several[row].hint)  # type: ignore[arg-type]
    assert several.digest not in {Hinted(WORLD, kind).digest for kind in kinds}
    with pytest.raises(InputError, match=r"holes \(kind inpaint\) .* go with no others"):
        Hinted(WORLD, "canny", "inpaint")
    with pytest.raises(InputError, match=r"no hints of kind 'cany' \(did you mean 'canny'"):
        Hinted(WORLD, "depth", "cany")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Pictures with hints that are their negatives."""
    for index in range(2):
        image = WORLD[index].image
        Image.fromarray(image).save(tmp_path / f"{index}.png")
        Image.fromarray(255 - image).save(tmp_path / f"hint{index}.png")
    lines = [{"image": f"{i}.png", "text": "a", "hint": f"hint{i}.png"} for i in range(2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


@pytest.mark.parametrize("kind", ["hint", "depth", "segments", "openpose"])
def test_the_datas_own_hints_are_taken(photos: Path, kind: str) -> None:
    source = check(Captioned(photos / "rows.jsonl", SIDE))
    assert (hinted(source, kind, 1) == 255 - WORLD[1].image).all()
    assert (hinted(source, "canny", 1) == canny(WORLD[1].image)).all()


def test_hints_that_cannot_be_had_are_refused(photos: Path) -> None:
    folder = check(Folder(photos, SIDE, "a"))
    for kind in ("depth", "segments"):
        with pytest.raises(InputError, match=f"{kind} hints need the drawn world .* or a 'hint'"):
            Hinted(folder, kind)
    with pytest.raises(InputError, match="has no 'hint' column, take"):
        Hinted(folder, "hint")
    for source in (folder, WORLD):
        with pytest.raises(InputError, match=r"no hints of kind 'cany' \(did you mean 'canny'"):
            Hinted(source, "cany")


# -- samples -------------------------------------------------------------------------------------


def test_samples_of_a_net_that_does_nothing_and_of_one_that_does(model: Path) -> None:
    parts = load(str(model), CPU)
    examples = [Hinted(WORLD, "canny")[index] for index in range(3)]
    captions, hints = [one.caption for one in examples], [one.hint for one in examples]
    net = new_controlnet(parts.unet, small=True)

    def made(net: ControlNetModel | None, weight: float = 1.0) -> list[bytes]:
        found = sampled(parts, net, captions, hints, steps=2, weight=weight)  # type: ignore[arg-type]
        return [image.tobytes() for image in found]

    free = made(None)
    assert made(net) == free  # the same noise with and without
    for joint in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.constant_(joint.weight, 0.05)
    assert all(a != b for a, b in zip(made(net), free, strict=True))
    assert made(net, weight=0.0) == free


def test_checkpointing_reaches_the_frozen_unet_too(model: Path, tmp_path: Path) -> None:
    kept = []
    for checkpointing in (False, True):
        task = ControlNetTask(training(model, tmp_path, checkpointing=checkpointing), CPU)
        saved = list[int]()

        def pack(x: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved.append(x.numel())
            return x

        rows = task.batch(0, torch.Generator().manual_seed(0))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            task.loss(rows)
        kept.append(sum(saved))
        assert all(
            block.gradient_checkpointing is checkpointing and block.training is checkpointing
            for block in task.parts.unet.up_blocks
        )
    assert kept[1] < 0.8 * kept[0]
