"""Transformers: LightningDiT; and SD3.5 as the reference code fine-tunes it, whose ports and LoRA become an adapter."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from einops import rearrange
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from davae.backbones import backbone_of
from davae.errors import CheckpointError, SettingsError
from davae.models.lightningdit import LightningDiT2DModel, infer_config
from davae.pipelines.adapter import add_lora, digest_base, find_target_layers, save_adapter
from davae.pipelines.autoencoders import load_autoencoder
from davae.pipelines.importing.account import Import, Save
from davae.pipelines.importing.reading import ForeignCheckpoint, read_checkpoint
from davae.pipelines.loading import load_pipeline
from davae.pipelines.upgrade import upgrade

# Not needed here, and the greater part of the pipeline.
TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")

# The parts of Stable Diffusion 3's two ports -> the reference's names.
PORT_KEYS = {
    "pos_embed.proj.weight, base channels": "tokenizer_patch_embed.proj.base_conv.weight",
    "pos_embed.proj.bias, a summand": "tokenizer_patch_embed.proj.base_conv.bias",
    "pos_embed.proj.weight, detail channels": "tokenizer_patch_embed.proj.extra_conv.weight",
    "pos_embed.proj.bias, the other summand": "tokenizer_patch_embed.proj.extra_conv.bias",
    "proj_out.weight, base channels": "project_out.base_linear.weight",
    "proj_out.bias, base channels": "project_out.base_linear.bias",
    "proj_out.weight, detail channels": "project_out.extra_linear.weight",
    "proj_out.bias, detail channels": "project_out.extra_linear.bias",
}
POSITIONS = "tokenizer_patch_embed.pos_embed"
LORA_KEY = re.compile(r"(?:.*?\.)?(transformer_blocks\.\d+\..+)\.(lora_[AB])(?:\.default)?\.weight")
LAYER_KEY = re.compile(r"(?:.*?\.)?((?:transformer_blocks|context_embedder|time_text_embed|norm_out)\..+)")


def convert_lightningdit(job: Import) -> Save:
    """LightningDiT, base or DA-VAE's -> LightningDiT2DModel, whose parameters have the file's names."""
    file = job.checkpoint
    try:
        config = infer_config(file.tensors)
    except ValueError as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    model = job.build(LightningDiT2DModel, config)

    # The rotary tables are computed here, not stored; the file's must be the same.
    tables = [name for name, _ in model.named_buffers() if name in file.tensors]
    for name in tables:
        computed, stored = model.get_buffer(name).double(), file.tensors[name].double()
        if computed.shape != stored.shape or not torch.allclose(computed, stored, atol=1e-2):
            angles = "with the rotary embedding's angles at the base resolution"
            raise file.mismatch(name, f"found {list(stored.shape)}, wanted {list(computed.shape)} {angles}")

    job.leave_rest(dict.fromkeys(tables, "computed; compared, and the same"), owned=("",))
    return model.save_pretrained


def convert_sd35_stage_two(job: Import) -> Save:
    """Ports and LoRA of a fine-tuned SD3.5 -> an adapter folder for the base pipeline that it was tuned from."""
    if job.base is None or job.autoencoder is None:
        raise SettingsError(
            "this file holds ports and LoRA only: give --base, the pipeline that it was tuned from, and --autoencoder, "
            "the folder that the import of its DA-VAE wrote"
        )
    base = load_pipeline(job.base, without=TEXT_PARTS)
    base_sha256, base_tensors = digest_base(base.transformer), base.transformer.state_dict()
    pipeline = upgrade(base, load_autoencoder(job.autoencoder))

    # The parts that were trained.
    compared = _compare_with_base(job.checkpoint, base_tensors)
    _fill_ports(pipeline, base_tensors, job)
    _fill_lora(pipeline, job.checkpoint if job.lora is None else read_checkpoint(job.lora), job)
    job.notes.append("LoRA's alpha is not in the file: its rank, as the reference trains")

    # The others are the base's, or unknown.
    reasons = {f"{re.escape(key)}$": "the base's; compared" for key in compared}
    job.leave_rest(reasons, owned=("tokenizer_patch_embed.", "project_out."))

    def save(folder: Path) -> None:
        folder.rmdir()  # empty; the adapter takes its place, whole
        save_adapter(folder, pipeline, base=str(job.base), base_sha256=base_sha256)

    return save


def _compare_with_base(file: ForeignCheckpoint, base: Mapping[str, Tensor]) -> list[str]:
    """The keys of the base's own tensors, which full checkpoints hold; refuses one that was trained."""
    compared = []
    for key, tensor in file.tensors.items():
        layer = LAYER_KEY.fullmatch(key)
        name = layer[1].replace(".base_layer.", ".") if layer else ""
        is_positions = f".{key}".endswith(f".{POSITIONS}")
        if is_positions:
            name = "pos_embed.pos_embed"
        if name not in base:
            continue

        # Weights in bfloat16, as the reference loads them.
        is_same = tensor.shape == base[name].shape
        if is_same and is_positions:
            is_same = torch.allclose(tensor.float(), base[name].float(), atol=1e-2)
        elif is_same:
            is_same = torch.equal(tensor.bfloat16(), base[name].bfloat16())
        if not is_same:
            cause = "It was trained itself, or tuned from another base: only ports and LoRA are imported"
            raise file.mismatch(key, f"its {list(tensor.shape)} are not the base's. {cause}")
        compared.append(key)
    return compared


@torch.no_grad()
def _fill_ports(pipeline: DiffusionPipeline, base: Mapping[str, Tensor], job: Import) -> None:
    """Convolutions side by side, their biases summed; rows of the linear layers interleaved in each patch position."""
    transformer, config = pipeline.transformer, pipeline.vae.config
    patch = transformer.config.patch_size

    # Each part has the shape of the base's port, with its own number of channels.
    targets, keys = {}, {}
    for target, name in PORT_KEYS.items():
        channels = config.base_channels if "base_" in name else config.detail_channels
        shape = list(base[target.split(",")[0]].shape)
        if name.endswith("conv.weight"):
            shape[1] = channels
        elif name.startswith("project_out"):
            shape[0] = shape[0] // config.base_channels * channels
        targets[target] = torch.empty(shape, device="meta")
        # An average keeps Lightning's full names.
        keys[target] = next((key for key in job.checkpoint.tensors if key.endswith(f".{name}")), name)
    parts = [part.to(transformer.dtype) for part in job.match(targets, keys.__getitem__).values()]

    # Input port: the convolutions side by side.
    projection = transformer.pos_embed.proj
    base_weight, base_bias, detail_weight, detail_bias = parts[:4]
    projection.weight.copy_(torch.cat([base_weight, detail_weight], dim=1))
    projection.bias.copy_(base_bias + detail_bias)

    # Output port: rows interleaved in each patch position.
    output = transformer.proj_out
    base_weight, base_bias, detail_weight, detail_bias = parts[4:]
    for parameter, halves in ((output.weight, (base_weight, detail_weight)), (output.bias, (base_bias, detail_bias))):
        rows = [rearrange(half, "(p q c) ... -> p q c ...", p=patch, q=patch) for half in halves]
        parameter.copy_(rearrange(torch.cat(rows, dim=2), "p q c ... -> (p q c) ..."))


def _fill_lora(pipeline: DiffusionPipeline, source: ForeignCheckpoint, job: Import) -> None:
    """Put LoRA layers on the transformer, on the same layers as in the file, and fill them."""
    keys: dict[str, str] = {}
    layers, ranks = set(), set()
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
    transformer, rank = pipeline.transformer, ranks.pop()
    targets = backbone_of(transformer).lora_targets
    if find_target_layers(transformer, targets).keys() != layers:
        targets = tuple(sorted(layers))
    add_lora(transformer, rank, float(rank), targets)

    # Only now are the names and shapes of the LoRA tensors known.
    like = get_peft_model_state_dict(transformer)
    tensors = job.match(like, lambda name: keys.get(name, name), source)
    set_peft_model_state_dict(transformer, {name: tensor.float() for name, tensor in tensors.items()})
