"""Transformers of other layouts: LightningDiT by name, and SD3.5's stage 2 as an adapter that computes the same."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

import tiny
from davae import AutoencoderDA, LightningDiT2DModel, load_pipeline
from davae.errors import CheckpointError, SettingsError
from davae.pipelines.adapter_index import AdapterIndex
from davae.pipelines.importing.account import Import
from davae.pipelines.importing.kinds import import_checkpoint
from davae.pipelines.importing.reading import ForeignCheckpoint
from davae.pipelines.importing.transformers import convert_lightningdit

# ------------------------------------------------------------------------------------------------------- SD3.5, stage 2

C, D, P, WIDTH, RANK = 4, 4, 2, 16, 3


class PatchEmbed(nn.Module):
    """The reference's input port: two convolutions, the detail latents first in what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.base_conv, self.extra_conv = (nn.Conv2d(channels, WIDTH, P, stride=P) for channels in (C, D))

    def forward(self, latents: Tensor) -> Tensor:
        detail, base = latents.split([D, C], dim=1)
        return self.base_conv(base) + self.extra_conv(detail)


class ProjectOut(nn.Module):
    """The reference's output port: at each patch position the detail channels, then the base's."""

    def __init__(self) -> None:
        super().__init__()
        self.base_linear, self.extra_linear = (nn.Linear(WIDTH, P * P * channels) for channels in (C, D))

    def forward(self, hidden: Tensor) -> Tensor:
        base, detail = (
            layer(hidden).view(*hidden.shape[:-1], P * P, -1) for layer in (self.base_linear, self.extra_linear)
        )
        return torch.cat([detail, base], dim=-1).flatten(-2)


class Tuned:
    """A base pipeline on disk, and the reference's fine-tuning of it: its file's tensors, and its transformer."""

    def __init__(self, folder: Path) -> None:
        base = tiny.tiny_sd3_pipeline()
        base.save_pretrained(folder / "base")
        AutoencoderDA.from_base(base.vae, detail_channels=D).save_pretrained(folder / "autoencoder")
        torch.manual_seed(7)
        embed, project = PatchEmbed(), ProjectOut()
        names = [name for name, _ in base.transformer.named_modules()]
        targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "norm1.linear")  # the reference's
        layers = [name for name in names if name.endswith(tuple(f".{target}" for target in targets))]
        weights = {name: base.transformer.get_submodule(name).weight for name in layers}
        self.lora = {
            f"{name}.lora_{letter}.default.weight": torch.randn(shape) / 4
            for name, weight in weights.items()
            for letter, shape in (("A", (RANK, weight.shape[1])), ("B", (weight.shape[0], RANK)))
        }
        self.ports = {
            **{f"tokenizer_patch_embed.proj.{name}": tensor for name, tensor in embed.state_dict().items()},
            **{f"project_out.{name}": tensor for name, tensor in project.state_dict().items()},
            "tokenizer_patch_embed.pos_embed": base.transformer.pos_embed.pos_embed,
        }
        wide = {"in_channels": C + D, "out_channels": C + D}
        self.transformer = SD3Transformer2DModel.from_config({**base.transformer.config, **wide}).eval()
        theirs = {
            n: t for n, t in base.transformer.state_dict().items() if not n.startswith(("pos_embed.proj", "proj_o"))
        }
        for name in layers:
            a, b = (self.lora[f"{name}.lora_{letter}.default.weight"].double().numpy() for letter in "AB")
            theirs[f"{name}.weight"] = theirs[f"{name}.weight"].double() + torch.from_numpy(np.matmul(b, a))
        self.transformer.double().load_state_dict(theirs, strict=False)
        self.transformer.pos_embed.proj, self.transformer.proj_out = embed.double(), project.double()
        self.folder = folder
        self.options = {"base": str(folder / "base"), "autoencoder": folder / "autoencoder"}

    def write(self, tensors: dict[str, Tensor], name: str = "step_9.safetensors") -> Path:
        save_file({key: tensor.detach().float().contiguous() for key, tensor in tensors.items()}, self.folder / name)
        return self.folder / name


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return Tuned(tmp_path_factory.mktemp("tuned"))


def swapped(latents: Tensor, first: int) -> Tensor:
    return torch.cat([latents[:, first:], latents[:, :first]], dim=1)


@torch.no_grad()
def test_stage_two_is_an_adapter_that_computes_the_same(tuned: Tuned, tmp_path: Path) -> None:
    file = tuned.write({f"transformer.{name}": tensor for name, tensor in (tuned.ports | tuned.lora).items()})
    report = import_checkpoint(file, tmp_path / "out", **tuned.options)
    pipeline = load_pipeline(tuned.folder / "base", adapter=tmp_path / "out", dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, C + D, 8, 8, generator=generator).double()  # base first
    condition = {
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=generator).double(),
        "pooled_projections": torch.randn(2, 32, generator=generator).double(),
        "timestep": torch.tensor([300.0, 700.0]).double(),
        "return_dict": False,
    }
    ours = pipeline.transformer(hidden_states=latents, **condition)[0]
    theirs = tuned.transformer(hidden_states=swapped(latents, C), **condition)[0]

    assert torch.allclose(ours, swapped(theirs, D), rtol=1e-6, atol=1e-7)
    assert (ours - swapped(theirs, C + D)).abs().max() > 0.1

    index = AdapterIndex.model_validate_json((tmp_path / "out" / "adapter.json").read_text())
    assert (index.lora.rank, index.lora.alpha) == (RANK, RANK)
    assert set(index.lora.targets) == {"to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "norm1.linear"}
    assert len(report.used) == 8 + len(tuned.lora)
    assert [row["reason"] for row in report.left] == ["the base's; compared"]


def test_ports_and_lora_may_lie_in_two_files(tuned: Tuned, tmp_path: Path) -> None:
    one = import_checkpoint(tuned.write(tuned.ports | tuned.lora), tmp_path / "one", **tuned.options)
    lora = tuned.write(
        {name.replace(".default", ""): tensor for name, tensor in tuned.lora.items()}, "lora.safetensors"
    )
    file = tuned.write(tuned.ports)
    two = import_checkpoint(file, tmp_path / "two", lora=lora, **tuned.options)

    assert [row["target"] for row in one.used] == [row["target"] for row in two.used]
    for name in ("transformer_ports.safetensors", "transformer_lora.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with pytest.raises(CheckpointError, match=r"holds no LoRA.*--lora"):
        import_checkpoint(file, tmp_path / "three", **tuned.options)
    with pytest.raises(SettingsError, match=r"--base.*--autoencoder"):
        import_checkpoint(file, tmp_path / "three", base=tuned.options["base"])


def test_layers_of_the_base_are_compared(tuned: Tuned, tmp_path: Path) -> None:
    base = load_pipeline(tuned.options["base"]).transformer.state_dict()
    key, name = "transformer.transformer_blocks.0.attn.to_q.base_layer.weight", "transformer_blocks.0.attn.to_q.weight"
    frozen = {key: base[name], "transformer.norm_out.linear.bias": base["norm_out.linear.bias"]}
    file = tuned.write({**tuned.ports, **tuned.lora, **frozen})
    report = import_checkpoint(file, tmp_path / "out", dry_run=True, **tuned.options)
    assert {row["key"] for row in report.left if row["reason"] == "the base's; compared"} > frozen.keys()
    file = tuned.write({**tuned.ports, **tuned.lora, key: base[name] + 0.1})
    with pytest.raises(CheckpointError, match=f"first mismatch is {key}: .*It was trained itself"):
        import_checkpoint(file, tmp_path / "out", **tuned.options)


def test_ports_and_lora_that_do_not_fit_are_refused(tuned: Tuned, tmp_path: Path) -> None:
    key = "project_out.extra_linear.weight"
    lora = next(iter(tuned.lora))
    for wrong, message in (
        ({key: torch.zeros(2 * P * P * D, WIDTH)}, rf"{key}: found \[32, 16\] float32, wanted \[16, 16\]"),
        ({"tokenizer_patch_embed.pos_embed": torch.zeros(1, 144, WIDTH)}, "pos_embed: .*tuned from another base"),
        ({lora: torch.zeros(RANK, 2)}, r"lora_A.default.weight: found \[3, 2\]"),
        ({lora: torch.zeros(RANK + 1, 2)}, r"LoRA of ranks \[3, 4\]"),
    ):
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(tuned.write({**tuned.ports, **tuned.lora, **wrong}), tmp_path / "out", **tuned.options)

    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------- LightningDiT


def lightning(**settings):
    size = {"sample_size": 4, "in_channels": 6, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
    model = LightningDiT2DModel(**{**size, "num_classes": 5, **settings}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"qk_norm": False}, {"patch_size": 2, "sample_size": 8}], ids=str)
def test_lightningdit_is_the_same_model(settings: dict, tmp_path: Path) -> None:
    model = lightning(**settings)
    tables = {name: buffer for name, buffer in model.named_buffers() if name.startswith("feat_rope.")}
    assert tables  # the reference's files hold them

    save_file({**model.state_dict(), **tables}, tmp_path / "f.safetensors")
    report = import_checkpoint(tmp_path / "f.safetensors", tmp_path / "out")
    again, loading_info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)

    assert not any(loading_info.values())
    assert {name: again.config[name] for name in settings} == settings
    assert again.config.attention_head_dim == 8

    side = model.config.sample_size
    latents, time, labels = torch.randn(2, 6, side, side), torch.tensor([0.2, 0.9]), torch.tensor([0, 5])
    assert torch.equal(again(latents, time, labels).sample, model(latents, time, labels).sample)
    assert {row["key"]: row["reason"].split(";")[0] for row in report.left} == dict.fromkeys(tables, "computed")
    assert len(report.used) == len(model.state_dict())


def test_a_lightningdit_of_other_positions_or_layers_is_refused(tmp_path: Path) -> None:
    model = lightning()
    tensors = {**model.state_dict(), "feat_rope.freqs_cos": model.feat_rope.freqs_cos}

    for wrong, message in (
        ({"feat_rope.freqs_cos": 1 - model.feat_rope.freqs_cos}, "first mismatch is feat_rope.freqs_cos"),
        ({"blocks.1.attn.q_norm.weight": torch.ones(9)}, r"blocks\.1\.attn\.q_norm\.weight: found \[9\] float32"),
        ({"blocks.1.attn.q_norm.bias": torch.ones(8)}, r"blocks\.1\.attn\.q_norm\.bias: found \[8\], wanted none"),
        ({"blocks.0.adaLN_modulation.1.weight": torch.zeros(64, 16)}, "modulation of 64 rows"),
    ):
        save_file(tensors | wrong, tmp_path / "f.safetensors")
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(tmp_path / "f.safetensors", tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_lightningdit_xl_has_the_papers_size() -> None:
    size = {"sample_size": 16, "in_channels": 128, "num_layers": 28, "num_attention_heads": 16}
    with torch.device("meta"):
        model = lightning(**size, attention_head_dim=72, num_classes=1000)
    job = Import("lightningdit", ForeignCheckpoint(Path("true geometry"), "", dict(model.state_dict())))
    convert_lightningdit(job)
    assert sum(math.prod(row["shape"]) for row in job.used) == 675_482_048
