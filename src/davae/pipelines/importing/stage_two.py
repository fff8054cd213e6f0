"""SD3.5 as the reference code fine-tunes it -> an adapter folder: both ports and the LoRA, on the base pipeline."""

import re
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from einops import rearrange
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from davae.backbones import backbone_of
from davae.errors import CheckpointError, SettingsError
from davae.pipelines.adapter import add_lora, digest_base, find_target_layers, save_adapter
from davae.pipelines.autoencoders import load_autoencoder
from davae.pipelines.importing.matching import ImportReport, Options, Save, TensorSource, leave_rest, match
from davae.pipelines.importing.reading import ForeignCheckpoint, mismatch, read_checkpoint
from davae.pipelines.loading import load_pipeline
from davae.pipelines.upgrade import upgrade

# Not needed here, and the greater part of the pipeline.
TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")

# The reference's names -> the parts of Stable Diffusion 3's two ports.
PORT_TARGETS = {
    "tokenizer_patch_embed.proj.base_conv.weight": "pos_embed.proj.weight, base channels",
    "tokenizer_patch_embed.proj.base_conv.bias": "pos_embed.proj.bias, a summand",
    "tokenizer_patch_embed.proj.extra_conv.weight": "pos_embed.proj.weight, detail channels",
    "tokenizer_patch_embed.proj.extra_conv.bias": "pos_embed.proj.bias, the other summand",
    "project_out.base_linear.weight": "proj_out.weight, base channels",
    "project_out.base_linear.bias": "proj_out.bias, base channels",
    "project_out.extra_linear.weight": "proj_out.weight, detail channels",
    "project_out.extra_linear.bias": "proj_out.bias, detail channels",
}
POSITIONS = "tokenizer_patch_embed.pos_embed"
LORA_KEY = re.compile(r"(?:.*?\.)?(transformer_blocks\.\d+\..+)\.(lora_[AB])(?:\.default)?\.weight")
LAYER_KEY = re.compile(r"(?:.*?\.)?((?:transformer_blocks|context_embedder|time_text_embed|norm_out)\..+)")


def convert_sd35_stage_two(checkpoint: ForeignCheckpoint, options: Options, report: ImportReport) -> Save:
    """Ports and LoRA of a fine-tuned SD3.5 -> an adapter folder for the base pipeline that it was tuned from."""
    if options.base is None or options.autoencoder is None:
        raise SettingsError(
            "this file holds ports and LoRA only: give --base, the pipeline that it was tuned from, and --autoencoder, "
            "the folder that the import of its DA-VAE wrote"
        )
    base = load_pipeline(options.base, without=TEXT_PARTS)
    base_sha256, base_tensors = digest_base(base.transformer), base.transformer.state_dict()
    pipeline = upgrade(base, load_autoencoder(options.autoencoder))

    # The parts that were trained.
    _check_positions(checkpoint, base_tensors["pos_embed.pos_embed"])
    _fill_ports(pipeline, base_tensors, checkpoint, report)
    _fill_lora(pipeline, checkpoint if options.lora is None else read_checkpoint(options.lora), report)
    report.notes.append("LoRA's alpha is not in the file: its rank, as the reference trains")

    # The others are the base's, or unknown.
    compared = [_find_key(checkpoint, POSITIONS), *_check_frozen(checkpoint, base_tensors)]
    reasons = {f"{re.escape(key)}$": "the base's; compared" for key in compared}
    leave_rest(checkpoint, report, reasons, owned=("tokenizer_patch_embed.", "project_out."))

    def save(folder: Path) -> None:
        save_adapter(folder / "adapter", pipeline, base=str(options.base), base_sha256=base_sha256)
        for path in (folder / "adapter").iterdir():  # the caller writes the folder itself, whole
            path.rename(folder / path.name)
        (folder / "adapter").rmdir()

    return save


def _find_key(checkpoint: ForeignCheckpoint, name: str) -> str:
    """The key that ends in `name`: an average keeps Lightning's full names."""
    return next((key for key in checkpoint.tensors if key.endswith(f".{name}")), name)


def _check_positions(checkpoint: ForeignCheckpoint, expected: Tensor) -> None:
    key = _find_key(checkpoint, POSITIONS)
    positions = checkpoint.tensors.get(key)
    if positions is None:
        return
    if positions.shape != expected.shape or not torch.allclose(positions.float(), expected.float(), atol=1e-2):
        wanted = f"wanted {list(expected.shape)}, the base pipeline's positions"
        raise mismatch(checkpoint.path, key, f"found {list(positions.shape)}, {wanted}: it was tuned from another base")


@torch.no_grad()
def _fill_ports(
    pipeline: DiffusionPipeline, base: dict[str, Tensor], checkpoint: ForeignCheckpoint, report: ImportReport
) -> None:
    """Convolutions side by side, their biases summed; rows of the linear layers interleaved in each patch position."""
    transformer, config = pipeline.transformer, pipeline.vae.config
    patch = transformer.config.patch_size

    # Each part has the shape of the base's port, with its own number of channels.
    targets, sources = {}, {}
    for name, target in PORT_TARGETS.items():
        channels = config.base_channels if "base_" in name else config.detail_channels
        shape = list(base[target.split(",")[0]].shape)
        if name.endswith("conv.weight"):
            shape[1] = channels
        elif name.startswith("project_out"):
            shape[0] = shape[0] // config.base_channels * channels
        targets[target] = torch.empty(shape, device="meta")
        sources[target] = TensorSource(_find_key(checkpoint, name))
    tensors = match(checkpoint, targets, sources, report)

    def find_parts(prefix: str, suffix: str) -> list[Tensor]:
        base_part, detail_part = PORT_TARGETS[f"{prefix}.base_{suffix}"], PORT_TARGETS[f"{prefix}.extra_{suffix}"]
        return [tensors[base_part].to(transformer.dtype), tensors[detail_part].to(transformer.dtype)]

    # Input port: the convolutions side by side.
    projection = transformer.pos_embed.proj
    projection.weight.copy_(torch.cat(find_parts("tokenizer_patch_embed.proj", "conv.weight"), dim=1))
    projection.bias.copy_(sum(find_parts("tokenizer_patch_embed.proj", "conv.bias")))

    # Output port: rows interleaved in each patch position.
    for parameter, suffix in ((transformer.proj_out.weight, "weight"), (transformer.proj_out.bias, "bias")):
        parts = find_parts("project_out", f"linear.{suffix}")
        rows = [rearrange(part, "(p q c) ... -> p q c ...", p=patch, q=patch) for part in parts]
        parameter.copy_(rearrange(torch.cat(rows, dim=2), "p q c ... -> (p q c) ..."))


def _fill_lora(pipeline: DiffusionPipeline, source: ForeignCheckpoint, report: ImportReport) -> None:
    """Put LoRA layers on the transformer, on the same layers as in the file, and fill them."""
    keys: dict[str, str] = {}
    layers: set[str] = set()
    ranks: set[int] = set()
    for key in source.tensors:
        parts = LORA_KEY.fullmatch(key)
        if parts:
            layer, matrix = parts.groups()
            keys[f"{layer}.{matrix}.weight"] = key
            layers.add(layer)
            if matrix == "lora_A":
                ranks.add(source.shape(key)[0])
    if not keys:
        raise CheckpointError(
            f"{source.path} holds no LoRA (keys with lora_A and lora_B): give the file of the same step with --lora"
        )
    if len(ranks) != 1:
        raise CheckpointError(f"{source.path}: LoRA of ranks {sorted(ranks)}: davae's adapters have one rank")

    # The default targets where they name the same layers.
    transformer = pipeline.transformer
    targets = backbone_of(transformer).lora_targets
    if find_target_layers(transformer, targets).keys() != layers:
        targets = tuple(sorted(layers))
    rank = ranks.pop()
    add_lora(transformer, rank, float(rank), targets)

    # Only now are the names and shapes of the LoRA tensors known.
    like = get_peft_model_state_dict(transformer)
    tensors = match(source, like, {name: TensorSource(keys.get(name, name)) for name in like}, report)
    set_peft_model_state_dict(transformer, {name: tensor.float() for name, tensor in tensors.items()})


def _check_frozen(checkpoint: ForeignCheckpoint, base: dict[str, Tensor]) -> list[str]:
    """The keys of layers that are the base's own, which full checkpoints hold; refuses one that was trained."""
    frozen = []
    for key, tensor in checkpoint.tensors.items():
        parts = LAYER_KEY.fullmatch(key)
        name = parts[1].replace(".base_layer.", ".") if parts else ""
        if name not in base:
            continue
        # In bfloat16, as the reference loads them.
        if tensor.shape != base[name].shape or not torch.equal(tensor.bfloat16(), base[name].bfloat16()):
            cause = "It was trained itself, or on another base: only ports and LoRA are imported"
            raise mismatch(checkpoint.path, key, f"its {list(tensor.shape)} are not the base's. {cause}")
        frozen.append(key)
    return frozen
