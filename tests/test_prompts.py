"""How prompts are written and read: weights of words, texts of more than 77 tokens."""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from diffedit import Pass, Row, Workflow
from diffedit.cli.checks import check_model
from diffedit.errors import CapabilityError, ParameterError
from diffedit.models.clip import Clip
from diffedit.models.protocol import Conditioning
from diffedit.prompts import Prompt, parse
from diffedit_invert import Invert
from diffedit_region import Region
from diffedit_style import Style
from tests.families import FAMILIES, FLUX, PIXART, SD, SD3, SDXL, Tiny, xl_pipeline
from tests.laws.photographs import photograph
from tests.laws.tools import Custom

SIZE = (64, 64)
READING = [SD, SDXL]
by_name = pytest.mark.parametrize("family", READING, ids=lambda family: family.name)
#: 5 letters and so 5 tokens each: 15 words fill a chunk of 75. Of 7 letters: 10 words, and 70.
FIVE, SEVEN = "horse", "giraffe"

# --- how they are written -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "runs"),
    [
        ("a cat", [("a cat", 1)]),
        ("a (red:1.3) cat", [("a ", 1), ("red", 1.3), (" cat", 1)]),
        ("(a cat:0)", [("a cat", 0)]),
        ("(a: .5 )", [("a", 0.5)]),
        ("(a:2.)(b:2)", [("ab", 2)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1), (" c", 0.5)]),
        ("((a:2):1.5)", [("a", 3)]),
        ("(portrait) (studio", [("(portrait) (studio", 1)]),
        ("(a (plain) one:2) )", [("a (plain) one", 2), (" )", 1)]),
        ("(a:b) 10:30 (:3) (: 1.2)", [("(a:b) 10:30 (:3) (: 1.2)", 1)]),
        ("(a:1.2 b:2)", [("a:1.2 b", 2)]),
        ("(a:1.2", [("(a:1.2", 1)]),
        (r"\(a:1.3\) \b", [(r"(a:1.3) \b", 1)]),
        (r"(\(a\):2)", [("(a)", 2)]),
        ("(a:1)", [("a", 1)]),
        ("", []),
    ],
)
def test_how_weights_are_written(written: str, runs: list[tuple[str, float]]) -> None:
    assert parse(written).runs == runs
    assert parse(written).weighted == any(weight != 1 for _, weight in runs)


@given(st.text(st.characters(exclude_characters="\\:")))
@example("(a) [b] {c} ((d)) 1.2) (")
def test_everything_else_is_text(written: str) -> None:
    assert parse(written) == Prompt(written, (1.0,) * len(written))


@given(st.text("ab:(). 12\\", max_size=12))
def test_anything_can_be_written_as_text(text: str) -> None:
    """What backslashes make of parentheses keeps all letters; a backslash before one is gone."""
    plain = text.replace("\\", "/")
    written = plain.replace("(", r"\(").replace(")", r"\)")
    assert parse(written) == Prompt(plain, (1.0,) * len(plain))


@pytest.mark.parametrize("written", ["(at 10:30)", "(a:-1)", "(a:5.01)", "((a:6):0.5)"])
def test_weights_have_a_range(written: str) -> None:
    with pytest.raises(ParameterError, match=r"should be from 0 to 5; as plain text .*\\\("):
        parse(written)


# --- how they are read ----------------------------------------------------------------------------


@functools.cache
def editor(family: Tiny) -> Any:
    """One for all tests that change nothing in its model."""
    return family.editor()


def embedded(family: Tiny, prompt: str, **more: Any) -> Conditioning:
    conditioning: Conditioning = editor(family).model.embed([prompt], SIZE, **more)
    return conditioning


def plain(pipe: Any, text: str) -> list[Tensor]:
    """What diffusers makes of a text: the tokens', and if there is one the whole's."""
    made = pipe.encode_prompt(
        text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return [one for one in (made[0], *made[2:3]) if one is not None]


@by_name
@pytest.mark.parametrize(
    "prompt", ["", "a red circle", "portrait (studio), [x]", "(a cat:1.0) and", FIVE * 15]
)
def test_plain_prompts_keep_their_bits(family: Tiny, prompt: str) -> None:
    said = embedded(family, prompt).tensors
    expected = plain(editor(family).model.pipe, prompt.replace("(a cat:1.0)", "a cat"))
    assert torch.equal(said["text"], expected[0])
    if len(expected) > 1:
        assert torch.equal(said["pooled"], expected[1])


@by_name
def test_own_reading_is_that_of_diffusers(family: Tiny) -> None:
    """What reads weights and chunks gives a plain prompt the same bits."""
    model = editor(family).model
    prompt = parse("a red circle, (x)")
    made = [clip.read(clip.chunks(prompt)) for clip in model._clips()]
    expected = plain(model.pipe, prompt.text)
    assert torch.equal(torch.cat([states for states, _ in made], -1), expected[0])
    if len(expected) > 1:
        assert torch.equal(made[-1][1], expected[1])


@by_name
def test_weights_lead_from_the_empty_text_through_the_word(family: Tiny) -> None:
    """e + w (z - e) token by token, by hand; nothing else changes, nor what is said as a whole."""
    pipe = editor(family).model.pipe
    said = embedded(family, "a (red:1.4) (cat:0.5) on (mats:0)").tensors
    z, e = plain(pipe, "a red cat on mats"), plain(pipe, "")
    weights = [1.0, 1.0, *[1.4] * 3, *[0.5] * 3, 1.0, 1.0, *[0.0] * 4]
    weights += [1.0] * (77 - len(weights))
    for place, weight in enumerate(weights):
        expected = z[0][0, place] if weight == 1 else torch.lerp(e[0], z[0], weight)[0, place]
        tolerance = 0 if weight in (0, 1) else 1e-6
        assert (said["text"][0, place] - expected).abs().max() <= tolerance, place
    assert not torch.equal(said["text"], z[0])
    if len(z) > 1:
        assert torch.equal(said["pooled"], z[1])


def test_all_encoders_of_stable_diffusion_3_read_weights() -> None:
    """By hand: 77 tokens of CLIP, and then T5's, which has one for the space before a word."""
    model = editor(SD3).model
    said = embedded(SD3, "a (red:1.4) (cat:0.5)").tensors
    (z, pooled), (e, _) = model._plain("a red cat"), model._plain("")
    clip = [1.0, 1.0, *[1.4] * 3, *[0.5] * 3]
    t5 = [1.0, 1.0, *[1.4] * 4, *[0.5] * 4]
    weights = clip + [1.0] * (77 - len(clip)) + t5
    weights += [1.0] * (z.shape[1] - len(weights))
    expected = torch.lerp(e, z, torch.tensor(weights)[None, :, None])
    assert (said["text"] - expected).abs().max() < 1e-6
    assert (z - expected)[:, 2:8].abs().min(dim=1).values.max() > 0
    assert (z - expected)[:, 79:87].abs().min(dim=1).values.max() > 0
    assert torch.equal(said["text"][:, 8:77], z[:, 8:77])
    assert torch.equal(said["pooled"], pooled)
    for text in ("", "a (red) cat", "(a:1) red cat"):
        plain_text = text.replace("(a:1)", "a")
        assert torch.equal(embedded(SD3, text).tensors["text"], model._plain(plain_text)[0])


def test_a_word_in_part_has_the_mean_of_its_letters() -> None:
    from diffedit import Editor

    model: Any = Editor.load().model
    clip = Clip(model.pipe, "tokenizer", "text_encoder")
    assert clip.chunks(parse("a red circle"))[0].said == 5  # words are tokens here
    (chunk,) = clip.chunks(parse("a (re:1.6)d circle"))
    assert chunk.tokens == clip.chunks(parse("a red circle"))[0].tokens
    assert chunk.weights[:5] == pytest.approx([1, 1, 1.4, 1, 1])


def by_compel(pipe: Any, words: list[str], weights: list[float]) -> Tensor:
    from compel.embeddings_provider import EmbeddingsProvider, SplitLongTextMode

    provider = EmbeddingsProvider(
        pipe.tokenizer,
        pipe.text_encoder,
        truncate=False,
        split_long_text_mode=SplitLongTextMode.BRUTAL,
    )
    made: Any = provider.get_embeddings_for_weighted_prompt_fragments([words], [weights])
    assert isinstance(made, Tensor)
    return made


@pytest.mark.parametrize(
    ("words", "weights"),
    [
        (["a", "red", "cat"], [1.0, 1.3, 1.75]),
        ([FIVE] * 35, [1.0, 1.5, 1.1, 1.0, 2.0] * 7),
    ],
    ids=["short", "long"],
)
@torch.no_grad()
def test_from_1_on_weights_are_those_of_compel(words: list[str], weights: list[float]) -> None:
    written = " ".join(f"({word}:{weight})" for word, weight in zip(words, weights, strict=True))
    ours = embedded(SD, written).tensors["text"]
    theirs = by_compel(editor(SD).model.pipe, words, weights)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() == 0.0


@by_name
@pytest.mark.parametrize(("word", "each"), [(FIVE, 15), (SEVEN, 10)])
def test_long_prompts_are_read_in_chunks_cut_between_words(
    family: Tiny, word: str, each: int
) -> None:
    words = [word] * (2 * each + 3)
    parts = [" ".join(words[k : k + each]) for k in range(0, len(words), each)]
    said = embedded(family, " ".join(words)).tensors
    expected = [plain(editor(family).model.pipe, part) for part in parts]
    assert torch.equal(said["text"], torch.cat([states for states, *_ in expected], dim=1))
    if "pooled" in said:
        assert torch.equal(said["pooled"], expected[0][1])  # of the first chunk


def test_a_word_longer_than_a_chunk_is_cut_where_the_chunk_ends() -> None:
    clip = Clip(editor(SD).model.pipe, "tokenizer", "text_encoder")
    assert [chunk.said for chunk in clip.chunks(parse("ab " + "x" * 80 + " cd"))] == [4, 77, 9]


@by_name
def test_words_that_are_several_tokens_are_read_as_such(family: Tiny) -> None:
    """Textual inversion: a word of two vectors stands for two tokens, with its weight."""
    model: Any = family.editor().model
    for clip in model._clips():
        tokenizer = getattr(model.pipe, clip.tokenizer)
        tokenizer.add_tokens(["<cat>", "<cat>_1"])
        getattr(model.pipe, clip.encoder).resize_token_embeddings(len(tokenizer))
        first, second = tokenizer.convert_tokens_to_ids(["<cat>", "<cat>_1"])
        (chunk,) = clip.chunks(parse("a (<cat>:1.5) b"))
        assert chunk.tokens[2:4] == [first, second]
        assert chunk.weights[:5] == [1.0, 1.0, 1.5, 1.5, 1.0]
    assert torch.equal(
        model.embed(["a (<cat>:1) b"], SIZE).tensors["text"],
        plain(model.pipe, "a <cat> b")[0],
    )


def test_encoders_that_want_a_mask_are_shown_what_is_said() -> None:
    pipe: Any = SD.pipeline()
    pipe.text_encoder.config.use_attention_mask = True
    clip = Clip(pipe, "tokenizer", "text_encoder")
    states, _ = clip.read(clip.chunks(parse("a red circle")))
    assert torch.equal(states, plain(pipe, "a red circle")[0])


# --- what is not read -----------------------------------------------------------------------------

CUTTING = [family for family in FAMILIES if family not in READING]
#: Each another, so that a quotation says its place; 2 letters and more.
MANY = [f"w{number}" for number in range(600)]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """diffedit's own; diffusers has others, of each encoder, which the command line hides."""
    return [one.getMessage() for one in caplog.records if one.name.startswith("diffedit")]


def unread(caplog: pytest.LogCaptureFixture, model: Any, prompt: str) -> tuple[str, dict[str, Any]]:
    """What a warning says it begins with, that a prompt has more of ("" if none); what is read."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "diffedit"):
        said = model.embed([prompt], SIZE).tensors
    told = warnings(caplog)
    assert len(told) <= 1
    rest = told[0].rpartition("not read from '")[2].removesuffix("' on") if told else ""
    return rest, said


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", CUTTING, ids=lambda family: family.name)
def test_a_warning_says_from_where_on_a_prompt_is_not_read(
    family: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    model = editor(family).model
    rest, said = unread(caplog, model, " ".join(MANY))
    first = MANY.index(rest.split()[0])
    assert first > 10
    later = [*MANY[: first + 1], "a", "red", "hat", *MANY]
    assert same(unread(caplog, model, " ".join(later))[1], said)
    earlier = [*MANY[: first - 1], "zz", *MANY[first:]]
    assert not same(unread(caplog, model, " ".join(earlier))[1], said)
    assert unread(caplog, model, " ".join(MANY[:first]))[0] == ""
    assert unread(caplog, model, " ".join(MANY[: first + 1]))[0].startswith(MANY[first])
    assert unread(caplog, model, "  a red circle ")[0] == ""
    assert unread(caplog, model, "")[0] == ""


def test_what_one_of_several_encoders_reads_is_read(caplog: pytest.LogCaptureFixture) -> None:
    """Stable Diffusion 3's T5 takes 256 tokens, CLIP 77; without T5 it has CLIP alone."""
    whole: Any = SD3.editor().model
    text = "x " * 100
    assert unread(caplog, whole, text)[0] == ""
    whole.pipe.text_encoder_3 = None
    assert unread(caplog, whole, text)[0] == " ".join("x" * 25)
    assert "has 100 tokens, of which the text encoder takes 75" in caplog.text
    caplog.clear()
    FLUX.editor().run(None, Pass(prompt="x " * 300, steps=3), size=SIZE)
    assert len(warnings(caplog)) == 1  # of Flux's two encoders, once in all steps


@by_name
def test_nothing_is_said_of_what_is_read_in_chunks(
    family: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    assert unread(caplog, editor(family).model, " ".join(MANY))[0] == ""


# --- in a pass ------------------------------------------------------------------------------------

LONG = f"a (red:1.4) circle, {FIVE} (" + f"{SEVEN} " * 15 + ":0.7) (end)"
SCENES = [(LONG, "blurry"), ("a circle", LONG), (LONG, ""), ("a (red:1.3) circle", "(ugly:0.5)")]


def latents(family: Tiny, prompt: str, negative: str, *edits: Any, **more: Any) -> Tensor:
    what = Pass(prompt=prompt, negative=negative, steps=3, edits=edits)
    made: Tensor = editor(family).run(None, what, seed=7, size=SIZE, **more).latents
    return made


@by_name
@pytest.mark.parametrize(("prompt", "negative"), SCENES)
def test_diffusers_makes_the_same_of_the_same_embeddings(
    family: Tiny, prompt: str, negative: str
) -> None:
    """Handed over by `prompt_embeds`; the shorter one is followed by an empty text."""
    pipe = editor(family).model.pipe
    both = [embedded(family, prompt), embedded(family, negative, negative=True)]
    texts = [one.tensors["text"] for one in both]
    longest = max(text.shape[1] for text in texts)
    unsaid = family is SDXL and not negative  # read as zeros
    fill = [plain(pipe, "")[0], 0 * plain(pipe, "")[0] if unsaid else plain(pipe, "")[0]]
    for number, text in enumerate(texts):
        while texts[number].shape[1] < longest:
            texts[number] = torch.cat([texts[number], fill[number]], dim=1)
        assert texts[number].shape[1] == longest, text.shape
    given = {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]}
    if family is SDXL:
        pooled = [one.tensors["pooled"] for one in both]
        given |= {"pooled_prompt_embeds": pooled[0], "negative_pooled_prompt_embeds": pooled[1]}
        parts = {k: v for k, v in pipe.components.items() if not k.startswith(("image", "feat"))}
        pipe = StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=True)
        pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        **given,
        num_inference_steps=3,
        guidance_scale=5.0,
        width=SIZE[0],
        height=SIZE[1],
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images
    assert (latents(family, prompt, negative, compat=True) - theirs).abs().max() == 0.0
    assert (latents(family, "a circle", "blurry", compat=True) - theirs).abs().max() > 0.01


@by_name
def test_weights_act_in_every_prompt_of_a_pass(family: Tiny) -> None:
    picture = photograph("rgb8", SIZE)

    def made(where: str, weight: str) -> Tensor:
        texts = dict.fromkeys(("prompt", "negative", "style", "region"), "a red cat")
        texts[where] = f"a (red{weight}) cat" if weight else "a red cat"
        edits = (
            Style(image=picture, prompt=texts["style"]),
            Region(prompt=texts["region"], mask=photograph("rgb8", SIZE)[..., 0]),
        )
        return latents(family, texts["prompt"], texts["negative"], *edits)

    for where in ("prompt", "negative", "style", "region"):
        usual = made(where, "")
        assert torch.equal(made(where, ":1.0"), usual)
        assert not torch.equal(made(where, ":1.5"), usual)


def test_a_refiner_reads_with_one_encoder() -> None:
    from diffedit.models.stable_diffusion_xl import StableDiffusionXL

    pipe: Any = xl_pipeline(refiner=True)
    said = StableDiffusionXL(pipe).embed([f"{FIVE} " * 16], SIZE).tensors
    parts = [plain(pipe, f"{FIVE} " * 15), plain(pipe, FIVE)]
    assert torch.equal(said["text"], torch.cat([text for text, _ in parts], dim=1))
    assert torch.equal(said["pooled"], parts[0][1])


# --- on models that take no weights ---------------------------------------------------------------

OTHERS = [family for family in FAMILIES if "prompt_weights" not in family.model.carries]


def test_some_families_take_none() -> None:
    assert SD not in OTHERS
    assert PIXART in OTHERS


@pytest.mark.parametrize("family", OTHERS, ids=lambda family: family.name)
def test_others_refuse_weights_in_one_line(family: Tiny) -> None:
    one = family.editor()
    owners = {
        "prompt": Pass(prompt="a (red:1.3) cat"),
        "negative": Pass(prompt="a", negative="(red:1.3)"),
        "region": Pass(prompt="a", edits=[Region(prompt="(b:2)", mask=photograph("rgb8", SIZE))]),
    }
    if family.styled:
        owners["style"] = Pass(edits=[Style(image=photograph("rgb8", SIZE), prompt="(b:2)")])
    for owner, what in owners.items():
        with pytest.raises(CapabilityError, match=rf"^{owner}: .* takes no weights") as caught:
            one.run(None, what, size=SIZE)
        assert "\n" not in str(caught.value)
    photo = photograph("rgb8", SIZE)
    backwards = Pass(prompt="a", steps=2, edits=[Invert(prompt="(b:2)", refinements=0)])
    with pytest.raises(CapabilityError, match=r"^invert: .* takes no weights"):
        one.run(photo, backwards)


def test_others_get_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    one = PIXART.editor()
    given: list[str] = []
    model: Any = one.model
    embed = model.embed

    def noted(texts: Any, *args: Any, **more: Any) -> Any:
        given.extend(texts)
        return embed(texts, *args, **more)

    monkeypatch.setattr(model, "embed", noted)
    row = Row("r", lambda call: torch.zeros(1, 4, 8, 8), prompt=r"\(c\)")
    what = Pass(
        prompt=r"(a) \(b:1.3\)", negative="(d:1)", steps=1, edits=[Custom(parts={"rows": (row,)})]
    )
    one.run(None, what, size=SIZE)
    assert set(given) == {"(a) (b:1.3)", "(c)", "d"}


def test_a_weight_out_of_range_names_its_place() -> None:
    with pytest.raises(
        ParameterError, match=r"^negative: '\(at 10:30\)' gives words a weight of 30"
    ):
        latents(SD, "a", "(at 10:30)")


def test_it_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    for name, weighted in (("PixArtSigmaPipeline", False), ("StableDiffusionPipeline", True)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(
            json.dumps({"_class_name": name}), "utf-8"
        )
        what = Workflow(model=str(tmp_path / name), passes=(Pass(prompt="a (b:1.3)"),))
        if weighted:
            check_model(what)
            continue
        with pytest.raises(CapabilityError, match=r"^prompt: the family pixart takes no weights"):
            check_model(what)
