"""What is timed and what is counted, on tiny pipelines and on the true size without weights."""

import inspect

import pytest
import torch
import transformers
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor

import tiny_pipelines
from davae import AutoencoderDA, assets, upgrade
from davae.cost.cases import (
    PARTS,
    Case,
    choose_parts,
    choose_sizes,
    count_flops,
    count_part_parameters,
    count_weight_bytes,
    make_runs,
)
from davae.cost.geometry import META, read_geometry
from davae.errors import SettingsError
from davae.pipelines.loading import load_pipeline
from tiny import tiny_class_pipeline, tiny_sd3_pipeline

pytestmark = [
    pytest.mark.filterwarnings("ignore:The following part of your input was truncated"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' DPM solver
]
PIPELINES = ["sd3", "flux", "sana", "pixart_sigma", "pixart_alpha", "dit", "lightningdit"]
"""Those whose conditions have shapes that are known without their text encoders."""


def upgraded(base: DiffusionPipeline, channels: int = 4) -> DiffusionPipeline:
    return upgrade(base, AutoencoderDA.from_base(base.vae, detail_channels=channels))


def case(pipeline: DiffusionPipeline, size: int, **settings: int) -> Case:
    return Case("tiny", pipeline, size, **{"steps": 2, "prompt_tokens": 8, **settings})


# -------------------------------------------------------------------------------------------------------------- sizes


def test_tokens_are_those_that_the_transformer_sees() -> None:
    base = tiny_sd3_pipeline()
    seen: list[int] = []
    base.transformer.pos_embed.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    for size in (16, 32):
        make_runs(case(base, size), ["step"])["step"]()
    assert seen == [case(base, 16).tokens, case(base, 32).tokens] == [4, 16]


def test_a_base_is_compared_at_equal_pixels_and_equal_tokens() -> None:
    base = tiny_sd3_pipeline()
    candidate = case(upgraded(base), 64)
    assert choose_sizes(candidate, base) == [64, 32]
    assert case(base, 32).tokens == candidate.tokens
    assert choose_sizes(case(base, 32), base) == [32]


def test_where_positions_fit_one_grid_only_equal_tokens_are_left() -> None:
    base = tiny_class_pipeline()
    assert choose_sizes(case(upgraded(base), 64), base) == [32]


# -------------------------------------------------------------------------------------------------------------- parts


def test_all_parts_that_a_pipeline_has_are_the_default() -> None:
    assert choose_parts(case(tiny_sd3_pipeline(), 32), []) == list(PARTS)
    assert choose_parts(case(tiny_sd3_pipeline(), 32), ["decode", "text"]) == ["text", "decode"]
    assert choose_parts(case(tiny_class_pipeline(), 32), []) == ["step", "decode", "to-cpu", "whole"]


def test_parts_and_sizes_that_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"part 'encode': allowed are text, step, decode, to-cpu, whole"):
        choose_parts(case(tiny_sd3_pipeline(), 32), ["encode"])
    with pytest.raises(SettingsError, match="tiny has no text encoders to time: leave out text"):
        choose_parts(case(tiny_class_pipeline(), 32), ["text"])
    with pytest.raises(SettingsError, match="size=36: allowed are multiples of 8"):
        choose_parts(case(tiny_sd3_pipeline(), 36), ["step"])


@torch.no_grad()
def test_each_part_does_its_work_on_a_whole_batch() -> None:
    found = {name: run() for name, run in make_runs(case(upgraded(tiny_sd3_pipeline()), 64, batch=3), PARTS).items()}
    assert list(found) == list(PARTS)
    assert found["text"]["encoder_hidden_states"].shape == (6, 77 + 8, 32)
    assert found["step"].shape == (6, 8, 8, 8)
    assert found["decode"].shape == (3, 3, 64, 64)
    for pictures in (found["to-cpu"], found["whole"].images):
        assert [picture.size for picture in pictures] == [(64, 64)] * 3
        assert all(isinstance(picture, Image.Image) for picture in pictures)


@torch.no_grad()
def test_inputs_are_random_and_never_zero() -> None:
    base, seen = tiny_sd3_pipeline(), []
    base.transformer.register_forward_hook(lambda module, args, kwargs, output: seen.append(kwargs), with_kwargs=True)
    base.vae.decoder.register_forward_hook(lambda module, args, output: seen.append({"codes": args[0]}))
    runs = make_runs(case(base, 32), ["step", "decode"])
    runs["step"](), runs["decode"]()
    inputs = {name: value for call in seen for name, value in call.items() if isinstance(value, Tensor)}
    assert {"hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "codes"} <= inputs.keys()
    assert all(value.abs().min() > 0 for value in inputs.values())


@torch.no_grad()
@pytest.mark.parametrize("name", PIPELINES)
def test_a_step_is_what_the_stock_pipeline_does_in_one(name: str) -> None:
    """As many rows and tokens of text for each picture as the whole has in each of its steps."""
    base = getattr(tiny_pipelines, name)()
    seen: list[dict[str, tuple[int, ...]]] = []

    def see(module, args, kwargs, output) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        names = ("hidden_states", "encoder_hidden_states", "class_labels")
        seen.append({name: tuple(given[name].shape) for name in names if given.get(name) is not None})

    base.transformer.register_forward_hook(see, with_kwargs=True)
    runs = make_runs(case(base, 32, steps=2, batch=3), ["step", "whole"])
    runs["step"](), runs["whole"]()
    step, *whole = seen
    assert whole == [step] * 2
    assert step["hidden_states"][0] == (3 if name == "flux" else 6)
    counted = count_flops(case(base, 32, steps=2, batch=3))
    assert counted["step"] > 0
    assert counted["whole"] == counted["text"] + 2 * counted["step"] + counted["decode"]


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # Krea 2's norms, counted in bfloat16
@pytest.mark.parametrize("name", ["ovis_image", "longcat_image", "krea2"])
def test_a_step_is_counted_where_the_text_encoders_are_not(name: str) -> None:
    """Krea 2 has an autoencoder for videos, as Qwen-Image."""
    base = getattr(tiny_pipelines, name)()
    parts = ["step", "decode"]
    for run in make_runs(case(base, 32), parts).values():
        run()
    flops = count_flops(case(base, 32))
    assert min(flops["step"], flops["decode"]) > 0
    assert flops["text"] == 0


def test_text_encoders_whose_tokens_are_not_known_are_left_out() -> None:
    base = tiny_pipelines.sana()
    assert choose_parts(case(base, 32), []) == ["step", "decode", "to-cpu"]
    with pytest.raises(SettingsError, match="tokens only its tokenizer knows, so none are counted: leave out text and"):
        choose_parts(case(base, 32), ["whole"])
    assert count_flops(case(base, 32))["text"] == 0


def test_clip_tokens_are_those_that_the_pipelines_tokenizers_pad_to() -> None:
    base = load_pipeline(assets.base_pipeline())
    seen: list[int] = []
    hook = lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"].shape[1])  # noqa: E731
    base.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        make_runs(case(base, 128, prompt_tokens=12), ["step"])["step"]()
    assert seen == [base.tokenizer.model_max_length + 12] == [32]


def test_every_step_of_the_whole_is_guided() -> None:
    for base in (tiny_sd3_pipeline(), tiny_class_pipeline()):
        batches: list[int] = []
        base.transformer.register_forward_hook(lambda module, args, output, b=batches: b.append(len(output[0])))
        make_runs(case(base, 32, steps=3, batch=2), ["whole"])["whole"]()
        assert batches == [4, 4, 4]


# ------------------------------------------------------------------------------------------------------------- counts


def test_the_whole_is_text_all_steps_and_decode_and_grows_with_the_batch() -> None:
    base = tiny_sd3_pipeline()
    found, larger = count_flops(case(base, 32, steps=5)), count_flops(case(base, 32, steps=5, batch=3))
    assert found["whole"] == found["text"] + 5 * found["step"] + found["decode"]
    assert larger == {part: 3 * flops for part, flops in found.items()}
    assert min(found.values()) > 0


def test_an_upgrade_costs_a_step_at_equal_tokens_its_wider_ports_only() -> None:
    base = tiny_sd3_pipeline()
    wide = upgraded(base)
    before, after = (case(pipeline, size) for pipeline, size in ((base, 32), (wide, 64)))
    assert before.tokens == after.tokens
    ports = [(p.transformer.pos_embed.proj.weight.numel(), p.transformer.proj_out.weight.numel()) for p in (wide, base)]
    added = sum(ports[0]) - sum(ports[1])
    assert count_flops(after)["step"] - count_flops(before)["step"] == 2 * 2 * before.tokens * added


def test_counting_leaves_the_pipeline_alone() -> None:
    base = tiny_sd3_pipeline()
    before = {name: tensor.clone() for name, tensor in base.transformer.state_dict().items()}
    count_flops(case(base, 32))
    assert base.transformer.dtype == torch.float32
    assert all(torch.equal(before[name], tensor) for name, tensor in base.transformer.state_dict().items())


def test_attention_is_counted() -> None:
    # Two blocks attend over picture and text, the first over the picture besides; width 16, a batch of 2. What is left
    # must grow evenly with the tokens.
    base, text = tiny_sd3_pipeline(), 77 + 8
    linear = []
    for size, tokens in ((16, 4), (24, 9), (32, 16)):
        attention = 2 * 2 * 2 * 16 * (2 * (tokens + text) ** 2 + tokens**2)
        linear.append(count_flops(case(base, size))["step"] - attention)
    assert (linear[1] - linear[0]) / 5 == (linear[2] - linear[1]) / 7 > 0


def test_weights_are_counted_by_the_part_that_reads_them() -> None:
    wide = case(upgraded(tiny_sd3_pipeline()), 64)
    parameters, read = count_part_parameters(wide), count_weight_bytes(wide)
    assert parameters["transformer"] == wide.pipeline.transformer.num_parameters()
    assert read["step"] == 4 * parameters["transformer"]
    assert read["text"] == 4 * parameters["text encoders"]
    decoding = sum(p.nbytes for p in wide.pipeline.vae.joint_decoder.parameters())
    decoding += sum(p.nbytes for p in wide.pipeline.vae.detail_upsample.parameters())
    assert read["decode"] == decoding


def test_the_true_size_has_the_published_counts() -> None:
    geometry = read_geometry("stabilityai/stable-diffusion-3.5-medium", assets.geometry())
    encoders = {}
    for name, kind in DiffusionPipeline.load_config(geometry.source).items():
        if name.startswith("text_encoder"):
            cls = getattr(transformers, kind[1])
            with META:
                encoders[name] = cls(cls.config_class.from_pretrained(f"{geometry.source}/{name}"))

    sizes = [sum(p.numel() for p in encoder.parameters()) for encoder in encoders.values()]
    assert sizes == [123_650_304, 694_659_840, 4_762_310_656]
    base = StableDiffusion3Pipeline(
        geometry.transformer, FlowMatchEulerDiscreteScheduler(), geometry.vae, tokenizer=None, tokenizer_2=None,
        tokenizer_3=None, **encoders,
    )  # fmt: skip

    found = {size: count_flops(Case("sd35m", base, size)) for size in (512, 1024)}
    assert found[512]["text"] / 2 == pytest.approx(2.51e12, rel=0.005)
    assert [found[size]["step"] / 2 for size in (512, 1024)] == pytest.approx([2.443e12, 11.25e12], rel=0.005)
    assert [found[size]["decode"] for size in (512, 1024)] == pytest.approx([2.51e12, 10.47e12], rel=0.005)


def test_a_clip_with_few_positions_is_counted_at_those() -> None:
    base = load_pipeline(assets.base_pipeline())
    assert base.text_encoder.config.max_position_embeddings < 77
    found = count_flops(case(base, 128))
    assert 0 < found["text"] < found["step"]
