"""Every row of the table: the widened model is the base on the base channels, and zero on the others."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
import tiny_backbones
from davae.backbones import BACKBONES, backbone_of, widen_transformer
from davae.errors import SettingsError
from davae.method.widen import start_ports, widen_ports

ROOT = Path(__file__).parents[2]
BASE_CHANNELS = 16  # with fewer, matrix kernels may sum the base and the widened model in different orders
CAPTION = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
WIDE_CAPTION = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
TIMESTEP = torch.tensor([250.0, 900.0])


def run_qwen(model, latents):
    return unpack(
        model(
            hidden_states=pack(latents),
            encoder_hidden_states=WIDE_CAPTION,
            encoder_hidden_states_mask=torch.ones(2, 5, dtype=torch.bool),
            timestep=TIMESTEP / 1000,
            img_shapes=[[(1, 4, 4)]] * 2,
            return_dict=False,
        )[0]
    )


def run_sana(model, latents):
    return model(latents, CAPTION, TIMESTEP, return_dict=False)[0]


def run_pixart(model, latents):
    return model(latents, CAPTION, TIMESTEP, return_dict=False)[0]


def run_dit(model, latents):
    return model(latents, TIMESTEP.long(), torch.tensor([1, 2]), return_dict=False)[0]


def run_lightningdit(model, latents):
    return model(latents, TIMESTEP / 1000, torch.tensor([1, 10]), return_dict=False)[0]


def run_sd3(model, latents):
    caption = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    return model(latents, caption, caption[:, 0], TIMESTEP, return_dict=False)[0]


def run_flux_like(model, latents, *, text_step, first=(0, 0, 0), **settings):
    """FLUX.1's layout: text token i is at (i, i) times `text_step`, the first image token at `first`."""
    rows, columns = torch.arange(16) // 4, torch.arange(16) % 4
    image_ids = torch.stack([torch.zeros(16), rows, columns], dim=1) + torch.tensor(first)
    text_ids = torch.arange(5.0)[:, None] * torch.tensor([0, text_step, text_step])
    settings |= {"timestep": TIMESTEP / 1000, "img_ids": image_ids, "txt_ids": text_ids, "return_dict": False}
    return unpack(model(hidden_states=pack(latents), encoder_hidden_states=WIDE_CAPTION, **settings)[0])


def run_flux(model, latents):
    return run_flux_like(model, latents, text_step=0, pooled_projections=WIDE_CAPTION[:, 0])


def run_chroma(model, latents):
    return run_flux_like(model, latents, text_step=0, attention_mask=torch.ones(2, 5 + 16))


def run_ovis(model, latents):
    return run_flux_like(model, latents, text_step=1)


def run_longcat(model, latents):
    return run_flux_like(model, latents, text_step=1, first=(1, 512, 512))


def run_krea2(model, latents):
    places = torch.zeros(5 + 16, 3)
    places[5:, 1], places[5:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return unpack(
        model(
            hidden_states=pack(latents),
            encoder_hidden_states=torch.stack([WIDE_CAPTION, -WIDE_CAPTION], dim=2),
            timestep=TIMESTEP / 1000,
            position_ids=places,
            encoder_attention_mask=torch.ones(2, 5, dtype=torch.bool),
            return_dict=False,
        )[0]
    )


def run_qwen21(model, latents):
    """Each 2x2 of latents has a slot behind the text."""
    slots = torch.cat([torch.zeros(2, 5, dtype=torch.bool), torch.ones(2, 16, dtype=torch.bool)], dim=1)
    output = model(
        hidden_states=latents.flatten(2).transpose(1, 2),
        encoder_hidden_states=WIDE_CAPTION,
        timestep=TIMESTEP / 1000,
        img_shapes=[[(1, 8, 8)]] * 2,
        img_mask=slots,
        return_dict=False,
    )[0]
    return output[:, -64:].transpose(1, 2).unflatten(2, (8, 8))


def run_flux2(model, latents):
    rows, columns = torch.arange(16) // 4, torch.arange(16) % 4
    ids = torch.stack([torch.zeros(16), rows, columns, torch.zeros(16)], dim=1)
    return unpack(
        model(
            hidden_states=pack(latents),
            encoder_hidden_states=WIDE_CAPTION,
            timestep=TIMESTEP / 1000,
            img_ids=ids,
            txt_ids=torch.zeros(5, 4),
            return_dict=False,
        )[0]
    )


def run_hunyuan(model, latents):
    mask = torch.ones(2, 5)
    return model(latents, TIMESTEP, WIDE_CAPTION, mask, CAPTION, mask, return_dict=False)[0]


def run_auraflow(model, latents):
    return model(latents, WIDE_CAPTION, TIMESTEP / 1000, return_dict=False)[0]


def run_cogview4(model, latents):
    size = torch.tensor([[32.0, 32.0]] * 2)
    return model(latents, WIDE_CAPTION, TIMESTEP, size, size, torch.zeros(2, 2), return_dict=False)[0]


def run_lumina2(model, latents):
    mask = torch.ones(2, 5, dtype=torch.int)
    return model(latents, 1 - TIMESTEP / 1000, WIDE_CAPTION, mask, return_dict=False)[0]


def run_zimage(model, latents):
    frames = list(latents.unsqueeze(2).unbind(dim=0))
    return torch.stack(model(frames, 1 - TIMESTEP / 1000, list(WIDE_CAPTION), return_dict=False)[0]).squeeze(2)


def pack(latents):
    """As `FluxPipeline._pack_latents` and Qwen's: [b, c, 2h, 2w] -> [b, h w, 4c], channels outermost."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens):
    b, _, width = tokens.shape
    return tokens.view(b, 4, 4, width // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, width // 4, 8, 8)


CASES = {
    "sd3-1": (lambda: tiny.tiny_sd3(patch_size=1), run_sd3),
    "sd3-2": (lambda: tiny.tiny_sd3(patch_size=2), run_sd3),
    "sd3-4": (lambda: tiny.tiny_sd3(patch_size=4), run_sd3),
    "flux": (tiny.tiny_flux, run_flux),
    "qwen": (tiny.tiny_qwen, run_qwen),
    "flux2": (tiny_backbones.tiny_flux2, run_flux2),
    "chroma": (tiny_backbones.tiny_chroma, run_chroma),
    "ovis": (tiny_backbones.tiny_ovis_image, run_ovis),
    "longcat": (tiny_backbones.tiny_longcat_image, run_longcat),
    "krea2": (tiny_backbones.tiny_krea2, run_krea2),
    "qwen21": (tiny_backbones.tiny_qwen_image21, run_qwen21),
    "hunyuan-2": (tiny_backbones.tiny_hunyuan, run_hunyuan),
    "hunyuan-without-variance": (lambda: tiny_backbones.tiny_hunyuan(learn_sigma=False), run_hunyuan),
    "auraflow-2": (tiny_backbones.tiny_auraflow, run_auraflow),
    "cogview4": (tiny_backbones.tiny_cogview4, run_cogview4),
    "lumina2": (tiny_backbones.tiny_lumina2, run_lumina2),
    "zimage": (tiny_backbones.tiny_zimage, run_zimage),
    "sana-1": (lambda: tiny.tiny_sana(patch_size=1), run_sana),
    "sana-2": (lambda: tiny.tiny_sana(patch_size=2), run_sana),
    "pixart-2": (lambda: tiny.tiny_pixart(patch_size=2), run_pixart),
    "pixart-4": (lambda: tiny.tiny_pixart(patch_size=4), run_pixart),
    "dit-1": (lambda: tiny.tiny_dit(patch_size=1), run_dit),
    "dit-2": (lambda: tiny.tiny_dit(patch_size=2), run_dit),
    "dit-4": (lambda: tiny.tiny_dit(patch_size=4), run_dit),
    "lightningdit-1": (lambda: tiny.tiny_lightningdit(patch_size=1), run_lightningdit),
    "lightningdit-2": (lambda: tiny.tiny_lightningdit(patch_size=2, qk_norm=False), run_lightningdit),
}


INTERLEAVED = ("lumina2", "zimage")
"""Linear input ports whose new columns lie between the old ones. Kernels split sums of more than 192 terms in two."""
PAIRS = [(case, 16) for case in CASES] + [(case, 32 if case in INTERLEAVED else 48) for case in CASES]


@pytest.fixture
def one_thread():
    """Several threads may split the sums of a 1x1 convolution in another order for 32 input channels than for 16."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("case", "detail_channels"), PAIRS)
@torch.no_grad()
def test_the_warm_start_is_exact(case, detail_channels):
    build, run = CASES[case]
    base = build()
    widened = widen_transformer(base, base_channels=BASE_CHANNELS, detail_channels=detail_channels)
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, BASE_CHANNELS, 8, 8, generator=generator)
    detail = 5 * torch.randn(2, detail_channels, 8, 8, generator=generator)

    expected = run(base, latents)
    # models that predict a variance beside the mean have two groups of channels, and each grows
    groups = expected.shape[1] // BASE_CHANNELS
    output = run(widened, torch.cat([latents, detail], dim=1)).unflatten(1, (groups, BASE_CHANNELS + detail_channels))

    assert type(widened) is type(base)
    assert expected.std() > 0.01
    assert torch.equal(output[:, :, :BASE_CHANNELS].flatten(1, 2), expected)
    assert torch.equal(output[:, :, BASE_CHANNELS:], torch.zeros_like(output[:, :, BASE_CHANNELS:]))


WRONG = {
    "(p q c) d": "(c p q) d",
    "(c p q) d": "(p q c) d",
    "(p q k c) d": "(c k p q) d",
    "d (c p q)": "d (p q c)",
    "d (p q c)": "d (c p q)",
}
"""Layouts of the same size, in which the channels lie elsewhere."""
TRIVIAL = ("sd3-1", "sana-1", "lightningdit-1", "qwen21")
"""Patches of 1 and one prediction: there is nothing beside the channels."""


@pytest.mark.parametrize("port", ["input_layout", "output_layout"])
@pytest.mark.parametrize("case", [case for case in CASES if case not in TRIVIAL])
@torch.no_grad()
def test_a_wrong_layout_of_the_right_size_is_no_warm_start(case, port):
    """If a string of a row is wrong, the test above fails for this row."""
    build, run = CASES[case]
    base = build()
    ports = backbone_of(base).ports
    if getattr(ports, port) not in WRONG:
        assert getattr(ports, port) == "d c p q"  # of a convolution, which has no flattened axis
        return
    broken = replace(ports, **{port: WRONG[getattr(ports, port)]})
    widened = widen_ports(base, broken, base_channels=BASE_CHANNELS, detail_channels=16)
    latents = torch.randn(2, BASE_CHANNELS, 8, 8, generator=torch.Generator().manual_seed(2))
    expected = run(base, latents)
    groups = expected.shape[1] // BASE_CHANNELS
    output = run(widened, torch.cat([latents, torch.ones_like(latents)], dim=1)).unflatten(1, (groups, -1))
    difference = output[:, :, :BASE_CHANNELS].flatten(1, 2) - expected
    assert difference.abs().max() > 0.1 * expected.std()


@pytest.mark.parametrize("case", CASES)
def test_the_widened_model_is_a_stock_one_that_saves_and_loads_strictly(case, tmp_path):
    build, _ = CASES[case]
    widened = widen_transformer(build(), base_channels=BASE_CHANNELS, detail_channels=16)
    widened.save_pretrained(tmp_path)
    kind = type(widened)
    kind.from_config(kind.load_config(tmp_path)).load_state_dict(widened.state_dict(), strict=True)
    loaded, problems = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(problems.values())
    tensors = widened.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize(("case", "detail_channels"), PAIRS)
@torch.no_grad()
def test_repeated_ports_are_the_base_where_the_group_mean_of_the_detail_is(case, detail_channels):
    build, run = CASES[case]
    base, ratio = build(), detail_channels // BASE_CHANNELS
    widened = widen_transformer(base, base_channels=BASE_CHANNELS, detail_channels=detail_channels)
    generator = torch.Generator().manual_seed(2)
    ports = backbone_of(widened).ports
    start_ports(widened, ports, base_channels=BASE_CHANNELS, start="repeat", generator=generator)
    latents = torch.randn(2, BASE_CHANNELS, 8, 8, generator=generator)
    own = torch.randn(2, BASE_CHANNELS, ratio, 8, 8, generator=generator)
    detail = (latents[:, :, None] + own - own.mean(dim=2, keepdim=True)).flatten(1, 2)

    expected = run(base, latents)
    expected = expected.unflatten(1, (expected.shape[1] // BASE_CHANNELS, BASE_CHANNELS))
    output = run(widened, torch.cat([latents, detail], dim=1)).unflatten(1, (expected.shape[1], -1))
    assert torch.allclose(output[:, :, :BASE_CHANNELS], expected, atol=1e-4)
    assert torch.allclose(output[:, :, BASE_CHANNELS:], expected.repeat_interleave(ratio, dim=2), atol=1e-4)


def test_every_row_has_a_case():
    assert {type(build()).__name__ for build, _ in CASES.values()} == set(BACKBONES)


def test_the_page_shows_the_ports_of_every_row():
    page = (ROOT / "docs" / "backbones.md").read_text()
    for name, backbone in BACKBONES.items():
        ports = backbone.ports
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
        for text in (ports.input, ports.input_layout, ports.output, ports.output_layout):
            assert f"`{text}`" in row, name
        assert ("packed by 2" in row) == (ports.packed == 2), name


def test_no_other_room_names_a_transformer():
    """Except LightningDiT, which is davae's own class."""
    for path in (ROOT / "src" / "davae").rglob("*.py"):
        if path.parent.name != "backbones":
            names = [name for name in BACKBONES if name != "LightningDiT2DModel" and name in path.read_text()]
            assert not names, f"{path}: {names}"


def test_an_unknown_backbone_is_refused():
    with pytest.raises(SettingsError, match=r"AutoencoderKL is no backbone that davae knows.*SD3Transformer2DModel"):
        backbone_of(tiny.tiny_vae())


def test_a_backbone_with_ports_only_says_that_it_cannot_be_trained():
    backbone = backbone_of(tiny_backbones.tiny_cogview4())
    with pytest.raises(SettingsError, match="has ports only"):
        backbone.condition(None, ["a"])
    with pytest.raises(SettingsError, match="has ports only"):
        backbone.velocity(None, torch.zeros(1, 4, 2, 2), torch.zeros(1), {})
