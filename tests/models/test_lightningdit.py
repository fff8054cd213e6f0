"""LightningDiT against numpy in float64, and the facts of the published geometry."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tiny
from davae import LightningDiT2DModel, widen_transformer
from davae.models.lightningdit import RMSNorm, RotaryEmbedding, SwiGLU, infer_config, position_table, swiglu_width

ONE_BLOCK = {
    "norm1.weight", "norm2.weight", "attn.qkv.weight", "attn.qkv.bias", "attn.q_norm.weight", "attn.k_norm.weight",
    "attn.proj.weight", "attn.proj.bias", "mlp.w12.weight", "mlp.w12.bias", "mlp.w3.weight", "mlp.w3.bias",
    "adaLN_modulation.1.weight", "adaLN_modulation.1.bias",
}  # fmt: skip
AROUND = {
    "x_embedder.proj.weight", "x_embedder.proj.bias", "pos_embed", "t_embedder.mlp.0.weight", "t_embedder.mlp.0.bias",
    "t_embedder.mlp.2.weight", "t_embedder.mlp.2.bias", "y_embedder.embedding_table.weight",
    "final_layer.norm_final.weight", "final_layer.linear.weight", "final_layer.linear.bias",
    "final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias",
}  # fmt: skip


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def double(module):
    """In float64 with random weights; tables that were rounded to float32 stay so."""
    with torch.no_grad():
        for index, parameter in enumerate(module.double().parameters()):
            parameter.copy_(0.3 * random(*parameter.shape, seed=index))
    return module


# --------------------------------------------------------------------------------------- the same, written in numpy


def silu(x):
    return x / (1 + np.exp(-x))


def rms_norm(x, weight):
    """Eq. 4 of arXiv 1910.07467, with an epsilon of 1e-6 under the root."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6) * weight


def swiglu(x, w):
    """Eq. 6 of arXiv 2002.05202, with biases; both matrices of the first layer in one."""
    hidden = x @ w["w12.weight"].T + w["w12.bias"]
    inner = hidden.shape[-1] // 2
    return (silu(hidden[..., :inner]) * hidden[..., inner:]) @ w["w3.weight"].T + w["w3.bias"]


def sincos(width, side):
    """DiT's positions: for each token, row by row, sin and cos of column / 10000^(4 i / width), then of the row."""
    table = np.zeros((side * side, width))
    quarter = width // 4
    for row in range(side):
        for column in range(side):
            for i in range(quarter):
                for half, place in enumerate((column, row)):
                    angle = place / 10000 ** (i / quarter)
                    table[row * side + column, half * 2 * quarter + i] = np.sin(angle)
                    table[row * side + column, half * 2 * quarter + quarter + i] = np.cos(angle)
    return table


def rotate(x, side):
    """Sec. 3.2.2 of arXiv 2104.09864 as complex numbers: pairs of channels turn by place x 10000^(-2 i / (dim / 2))."""
    dim = x.shape[-1]
    quarter = dim // 4
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
    angles = np.zeros((side * side, 2 * quarter))
    for token in range(side * side):
        for i in range(quarter):
            frequency = 10000 ** (-2 * i / (dim / 2))
            angles[token, i] = token // side * frequency  # rows first, unlike the fixed positions
            angles[token, quarter + i] = token % side * frequency
    turned = pairs * np.exp(1j * angles)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def part(weights, prefix):
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def attention(x, w, heads, side):
    batch, tokens, width = x.shape
    qkv = (x @ w["qkv.weight"].T + w["qkv.bias"]).reshape(batch, tokens, 3, heads, width // heads)
    query, key, value = (qkv[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
    if "q_norm.weight" in w:
        query, key = rms_norm(query, w["q_norm.weight"]), rms_norm(key, w["k_norm.weight"])
    query, key = rotate(query, side), rotate(key, side)
    scores = query @ key.transpose(0, 1, 3, 2) / np.sqrt(width // heads)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = scores / scores.sum(axis=-1, keepdims=True) @ value
    return mixed.transpose(0, 2, 1, 3).reshape(x.shape) @ w["proj.weight"].T + w["proj.bias"]


def modulation(condition, w, count):
    rows = silu(condition) @ w["adaLN_modulation.1.weight"].T + w["adaLN_modulation.1.bias"]
    return np.split(rows[:, None], count, axis=-1)


def lightningdit(weights, latents, times, labels, *, heads, patch):
    """The whole model: patches, positions, adaLN-Zero blocks (arXiv 2212.09748, Sec. 3.2), patches again."""
    batch, channels, height, _ = latents.shape
    side = height // patch
    patches = latents.reshape(batch, channels, side, patch, side, patch).transpose(0, 2, 4, 1, 3, 5)
    kernel = weights["x_embedder.proj.weight"].reshape(-1, channels * patch * patch)
    x = patches.reshape(batch, side * side, -1) @ kernel.T + weights["x_embedder.proj.bias"] + weights["pos_embed"]
    angles = times[:, None] * 10000.0 ** (-np.arange(128) / 128)  # t itself, not 1000 t
    waves = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    w = part(weights, "t_embedder.mlp.")
    condition = silu(waves @ w["0.weight"].T + w["0.bias"]) @ w["2.weight"].T + w["2.bias"]
    condition = condition + weights["y_embedder.embedding_table.weight"][labels]
    for index in range(len({name.split(".")[1] for name in weights if name.startswith("blocks.")})):
        w = part(weights, f"blocks.{index}.")
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation(condition, w, 6)
        normed = rms_norm(x, w["norm1.weight"]) * (1 + scale) + shift
        x = x + gate * attention(normed, part(w, "attn."), heads, side)
        x = x + gate_mlp * swiglu(rms_norm(x, w["norm2.weight"]) * (1 + scale_mlp) + shift_mlp, part(w, "mlp."))
    w = part(weights, "final_layer.")
    shift, scale = modulation(condition, w, 2)
    rows = (rms_norm(x, w["norm_final.weight"]) * (1 + scale) + shift) @ w["linear.weight"].T + w["linear.bias"]
    picture = rows.reshape(batch, side, side, patch, patch, channels).transpose(0, 5, 1, 3, 2, 4)
    return picture.reshape(latents.shape)


# ---------------------------------------------------------------------------------------------------------- formulas


@torch.no_grad()
def test_rms_norm():
    norm, x = double(RMSNorm(6)), random(2, 5, 6, seed=9)
    assert np.allclose(norm(x).numpy(), rms_norm(x.numpy(), norm.weight.numpy()), rtol=1e-12)
    small = 1e-4 * x  # where the epsilon matters
    assert np.allclose(norm(small).numpy(), rms_norm(small.numpy(), norm.weight.numpy()), rtol=1e-12)


@torch.no_grad()
def test_rms_norm_is_computed_in_float32_for_half_precision():
    norm = RMSNorm(4).to(torch.float16)
    x = torch.full((1, 4), 300.0, dtype=torch.float16)  # its square is no float16
    assert torch.equal(norm(x), torch.ones(1, 4, dtype=torch.float16))


@torch.no_grad()
def test_swiglu():
    mlp, x = double(SwiGLU(6, 8)), random(2, 5, 6, seed=9)
    weights = {name: tensor.numpy() for name, tensor in mlp.state_dict().items()}
    assert np.allclose(mlp(x).numpy(), swiglu(x.numpy(), weights), rtol=1e-12)


def test_fixed_positions():
    assert np.allclose(position_table(12, 3).numpy(), sincos(12, 3), atol=1e-7)


def test_rotary_positions():
    """The tables are kept in float32; positions up to 15, so angles are exact and the tables good to 6e-8."""
    heads = random(1, 2, 256, 16)
    turned = RotaryEmbedding(16, 16).double()(heads)
    assert np.allclose(turned.numpy(), rotate(heads.numpy(), 16), atol=1e-6)
    assert RotaryEmbedding(72, 16).freqs_cos.shape == (256, 72)


def test_rotated_products_depend_on_distances_only():
    """Sec. 3.2.1 of arXiv 2104.09864, in two dimensions."""
    query, key = random(2, 8)
    query, key = (RotaryEmbedding(8, 4).double()(vector.expand(1, 1, 16, 8))[0, 0] for vector in (query, key))
    products = (query @ key.T).reshape(4, 4, 4, 4)  # rows and columns of the query, then of the key
    assert torch.allclose(products[1, 2, 0, 0], products[3, 3, 2, 1], atol=1e-6)
    assert not torch.allclose(products[1, 2, 0, 0], products[2, 1, 0, 0], atol=1e-3)


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("qk_norm", [True, False])
@torch.no_grad()
def test_the_whole_model(patch, qk_norm):
    model = double(tiny.tiny_lightningdit(3, patch_size=patch, sample_size=4, qk_norm=qk_norm))
    latents, times, labels = random(2, 3, 4, 4, seed=9), torch.tensor([0.03, 0.8]).double(), torch.tensor([4, 10])
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    expected = lightningdit(weights, latents.numpy(), times.numpy(), labels.numpy(), heads=2, patch=patch)
    given = model(latents, times, labels).sample
    assert expected.std() > 0.1
    assert np.allclose(given.numpy(), expected, atol=1e-6 * np.abs(expected).max())  # rotary tables are float32


# ------------------------------------------------------------------------------------------------------ the geometry


@pytest.fixture(scope="module")
def published():
    """LightningDiT-XL/1 at 256 px, the defaults, without memory."""
    with torch.device("meta"):
        return LightningDiT2DModel()


def test_keys_and_shapes_are_the_references(published):
    shapes = {name: tuple(tensor.shape) for name, tensor in published.state_dict().items()}
    assert shapes.keys() == AROUND | {f"blocks.{index}.{name}" for index in range(28) for name in ONE_BLOCK}
    for name, shape in {
        "x_embedder.proj.weight": (1152, 32, 1, 1),
        "pos_embed": (1, 256, 1152),
        "t_embedder.mlp.0.weight": (1152, 256),
        "y_embedder.embedding_table.weight": (1001, 1152),
        "blocks.27.attn.qkv.weight": (3456, 1152),
        "blocks.27.attn.q_norm.weight": (72,),
        "blocks.27.mlp.w12.weight": (6144, 1152),
        "blocks.27.mlp.w3.weight": (1152, 3072),
        "blocks.27.adaLN_modulation.1.weight": (6912, 1152),
        "final_layer.linear.weight": (32, 1152),
        "final_layer.adaLN_modulation.1.bias": (2304,),
    }.items():
        assert shapes[name] == shape, name
    buffers = {name: tuple(tensor.shape) for name, tensor in published.named_buffers()}
    assert buffers == {"feat_rope.freqs_cos": (256, 72), "feat_rope.freqs_sin": (256, 72)}


def test_parameter_counts_are_the_published_ones(published):
    """675.2 M with 32 channels and 675.5 M with 128, the fixed positions included."""

    def count(model):
        return sum(parameter.numel() for parameter in model.parameters())

    with torch.device("meta"):
        wide = LightningDiT2DModel(in_channels=128)
    widened = widen_transformer(published, base_channels=32, detail_channels=96)
    assert count(published) == 675_260_768
    assert count(wide) == count(widened) == 675_482_048
    assert widened.config.in_channels == 128
    assert {name: tensor.shape for name, tensor in widened.state_dict().items()} == {
        name: tensor.shape for name, tensor in wide.state_dict().items()
    }


def test_a_forward_pass_mixes_no_devices(published):
    with torch.device("meta"):
        latents, times, labels = torch.empty(2, 32, 16, 16), torch.empty(2), torch.empty(2, dtype=torch.long)
    velocity = published(latents, times, labels).sample
    assert (velocity.device.type, velocity.shape) == ("meta", latents.shape)


def test_the_inner_width_is_rounded_down():
    assert [swiglu_width(width, 4.0) for width in (768, 1024, 1152)] == [2048, 2730, 3072]


def test_a_new_model_starts_as_dit_does():
    """adaLN-Zero, arXiv 2212.09748, Sec. 3.2: every block is the identity, and nothing is predicted."""
    torch.manual_seed(0)
    model = LightningDiT2DModel(
        sample_size=4, in_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=32, num_classes=50
    )
    weights = model.state_dict()
    zero = {name for name, tensor in weights.items() if not tensor.any()}
    modulations = {name for name in weights if "adaLN" in name}
    assert zero == modulations | {name for name in weights if name.endswith("bias")} | {"final_layer.linear.weight"}
    bound = np.sqrt(6 / (64 + 192))  # Xavier: uniform within sqrt(6 / (in + out))
    assert weights["blocks.0.attn.qkv.weight"].abs().max().item() == pytest.approx(bound, rel=0.01)
    assert weights["x_embedder.proj.weight"].abs().max().item() == pytest.approx(np.sqrt(6 / (4 + 64)), rel=0.05)
    assert torch.equal(weights["pos_embed"][0], position_table(64, 4))
    assert weights["y_embedder.embedding_table.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert weights["t_embedder.mlp.0.weight"].std().item() == pytest.approx(0.02, rel=0.1)


# ------------------------------------------------------------------------------------------- the diffusers contract


def velocity(model):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, 8, 8, generator=generator).to(model.dtype)
    return model(latents, torch.tensor([0.1, 0.9]), torch.tensor([1, 10])).sample


@pytest.mark.parametrize("qk_norm", [True, False])
@torch.no_grad()
def test_a_saved_model_loads_the_same(qk_norm, tmp_path):
    model = tiny.tiny_lightningdit(qk_norm=qk_norm)
    model.save_pretrained(tmp_path)
    loaded = LightningDiT2DModel.from_pretrained(tmp_path)
    assert torch.equal(velocity(loaded), velocity(model))
    assert loaded.config.qk_norm == qk_norm
    assert not loaded.pos_embed.requires_grad
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "LightningDiT2DModel"
    half = LightningDiT2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.feat_rope.freqs_cos.dtype == torch.float32
    assert torch.allclose(velocity(half).float(), velocity(model), atol=0.1 * velocity(model).std().item())


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_the_settings_are_read_off_a_state_dict(qk_norm, patch_size, tmp_path):
    model = tiny.tiny_lightningdit(patch_size=patch_size, qk_norm=qk_norm)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    found = infer_config({**tensors, **dict(model.named_buffers())})  # the reference's checkpoints hold the tables
    assert found["qk_norm"] is qk_norm
    LightningDiT2DModel(**found).load_state_dict(tensors, strict=True)
    assert {**model.config, **found, "mlp_ratio": 4.0} == dict(model.config)


def test_the_settings_of_the_published_geometry(published):
    assert {**published.config, **infer_config(published.state_dict())} == dict(published.config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.0.mlp.w3.weight"), "no state dict of a LightningDiT with RMSNorm and SwiGLU"),
        (lambda w: w.update({"blocks.0.adaLN_modulation.1.weight": torch.zeros(64, 16)}), "modulation of 64 rows"),
        (lambda w: w.update({"final_layer.linear.weight": torch.zeros(128, 16)}), "output of 128"),
        (lambda w: w.pop("blocks.0.attn.q_norm.weight"), "nothing tells the width of a head"),
    ],
)
def test_another_variants_state_dict_is_refused(change, message):
    tensors = tiny.tiny_lightningdit().state_dict()
    change(tensors)
    with pytest.raises(ValueError, match=message):
        infer_config(tensors)


def test_checkpointing_changes_no_gradient():
    model, gradients = tiny.tiny_lightningdit(), []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        calls = []
        hook = model.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model.zero_grad()
        velocity(model).square().mean().backward()
        hook.remove()
        assert len(calls) == 1 + checkpointed  # once more in the backward pass
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == dict(model.named_parameters()).keys() - {"pos_embed"}
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-7), name


def test_positions_are_never_trained():
    model = tiny.tiny_lightningdit().requires_grad_(False).requires_grad_(True)
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["pos_embed"]


def test_training_mode_drops_no_labels():
    model = tiny.tiny_lightningdit()
    assert torch.equal(velocity(model.train()), velocity(model.eval()))


def test_mixed_precision_computes():
    model = tiny.tiny_lightningdit()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        given = velocity(model)
    assert torch.allclose(given.float(), velocity(model), atol=0.1 * velocity(model).std().item())


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="sample_size=9 must be a multiple of patch_size=2"):
        LightningDiT2DModel(sample_size=9, patch_size=2)
    with pytest.raises(ValueError, match="attention_head_dim=6 must be a multiple of 4"):
        LightningDiT2DModel(attention_head_dim=6)
    with pytest.raises(ValueError, match=r"shape \(1, 16, 4, 4\); this model reads \[B, 16, 8, 8\]"):
        tiny.tiny_lightningdit()(torch.zeros(1, 16, 4, 4), torch.zeros(1), torch.zeros(1).long())


@pytest.mark.parametrize("width", [32, 64, 80, 112, 160, 384, 1152])
@pytest.mark.parametrize("ratio", [4.0, 2.667, 3.3333])
def test_every_width_of_a_swiglu_has_a_ratio(width: int, ratio: float) -> None:
    inner = swiglu_width(width, ratio)
    shapes = {
        "blocks.0.norm1.weight": (width,),
        "x_embedder.proj.weight": (width, 4, 1, 1),
        "pos_embed": (1, 16, width),
        "final_layer.linear.weight": (4, width),
        "y_embedder.embedding_table.weight": (11, width),
        "blocks.0.mlp.w3.weight": (width, inner),
        "blocks.0.adaLN_modulation.1.weight": (6 * width, width),
        "blocks.0.attn.q_norm.weight": (8,),
    }
    found = infer_config({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert swiglu_width(width, found["mlp_ratio"]) == inner
    assert ratio != 4.0 or found["mlp_ratio"] == 4.0
