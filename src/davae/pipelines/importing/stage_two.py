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
from davae.pipelines.importing.matching import Conversion, ImportReport, Options, Source, leave_rest, match, new_report
from davae.pipelines.importing.reading import Checkpoint, read_checkpoint
from davae.pipelines.loading import load_autoencoder, load_pipeline
from davae.pipelines.upgrade import upgrade

TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
"""Not needed here, and the greater part of the pipeline."""
PORTS = {
    "tokenizer_patch_embed.proj.base_conv.weight": "pos_embed.proj.weight, base channels",
    "tokenizer_patch_embed.proj.base_conv.bias": "pos_embed.proj.bias, a summand",
    "tokenizer_patch_embed.proj.extra_conv.weight": "pos_embed.proj.weight, detail channels",
    "tokenizer_patch_embed.proj.extra_conv.bias": "pos_embed.proj.bias, the other summand",
    "project_out.base_linear.weight": "proj_out.weight, base channels",
    "project_out.base_linear.bias": "proj_out.bias, base channels",
    "project_out.extra_linear.weight": "proj_out.weight, detail channels",
    "project_out.extra_linear.bias": "proj_out.bias, detail channels",
}
"""The reference's names -> where they go in Stable Diffusion 3's two ports."""
POSITIONS = "tokenizer_patch_embed.pos_embed"
LORA = re.compile(r"(?:.*?\.)?(transformer_blocks\.\d+\..+)\.(lora_[AB])(?:\.default)?\.weight")
LAYERS = re.compile(r"(?:.*?\.)?((?:transformer_blocks|context_embedder|time_text_embed|norm_out)\..+)")
COMPARED = "the base's; compared"


def sd35_stage_two(checkpoint: Checkpoint, options: Options) -> Conversion:
    """Ports and LoRA of a fine-tuned SD3.5 -> an adapter folder for the base pipeline that it was tuned from.

    Raises:
        SettingsError: the base pipeline or the autoencoder was not given, or they do not fit.
        CheckpointError: the first mismatch, or no LoRA.
    """
    if options.base is None or options.autoencoder is None:
        raise SettingsError(
            "this file holds ports and LoRA only: give --base, the pipeline that it was tuned from, and --autoencoder, "
            "the folder that the import of its DA-VAE wrote"
        )
    report = new_report("sd35-stage-two", checkpoint)
    base = load_pipeline(options.base, without=TEXT)
    digest = digest_base(base.transformer)
    pipeline = upgrade(base, load_autoencoder(options.autoencoder))
    _fill_ports(pipeline, base, checkpoint, report)
    source = checkpoint if options.lora is None else read_checkpoint(options.lora)
    _fill_lora(pipeline, source, report)
    same = [_full_name(checkpoint, POSITIONS), *_check_frozen(checkpoint, base.transformer.state_dict())]
    reasons = {f"{re.escape(key)}$": COMPARED for key in same}
    leave_rest(checkpoint, report, reasons, owned=("tokenizer_patch_embed.", "project_out."))
    report.notes.append("LoRA's alpha is not in the file: its rank, as the reference trains")

    def save(folder: Path) -> None:
        save_adapter(folder / "adapter", pipeline, base=str(options.base), base_sha256=digest)
        for path in (folder / "adapter").iterdir():  # the folder itself is written whole by the caller
            path.rename(folder / path.name)
        (folder / "adapter").rmdir()

    return Conversion(save, report)


def _fill_ports(
    pipeline: DiffusionPipeline, base: DiffusionPipeline, checkpoint: Checkpoint, report: ImportReport
) -> None:
    """Convolutions side by side, their biases summed; rows of the linear layers interleaved in each patch position."""
    config = pipeline.vae.config
    state = base.transformer.state_dict()
    ends = {"base": config.base_channels, "extra": config.detail_channels}
    keys = {name: _full_name(checkpoint, name) for name in (*PORTS, POSITIONS)}
    like: dict[str, Tensor] = {}
    for name, target in PORTS.items():
        channels = ends["base" if "base_" in name else "extra"]
        ours = state[target.split(",")[0]]
        shape = list(ours.shape)
        if name.endswith("conv.weight"):
            shape[1] = channels
        elif name.startswith("project_out"):
            shape[0] = shape[0] // config.base_channels * channels
        like[target] = torch.empty(shape, device="meta")
    found = match(checkpoint, like, {target: Source(keys[name]) for name, target in PORTS.items()}, report)
    parts = {name: found[target].to(pipeline.transformer.dtype) for name, target in PORTS.items()}
    positions = checkpoint.tensors.get(keys[POSITIONS])
    if positions is not None and not (
        positions.shape == state["pos_embed.pos_embed"].shape
        and torch.allclose(positions.float(), state["pos_embed.pos_embed"].float(), atol=1e-2)
    ):
        raise CheckpointError(
            f"{checkpoint.path}: the first mismatch is {keys[POSITIONS]}: found {list(positions.shape)}, wanted "
            f"{list(state['pos_embed.pos_embed'].shape)}, the base pipeline's positions: it was tuned from another base"
        )
    transformer, patch = pipeline.transformer, pipeline.transformer.config.patch_size
    convolutions = [parts[f"tokenizer_patch_embed.proj.{end}_conv.weight"] for end in ends]
    summands = [parts[f"tokenizer_patch_embed.proj.{end}_conv.bias"] for end in ends]
    with torch.no_grad():
        transformer.pos_embed.proj.weight.copy_(torch.cat(convolutions, dim=1))
        transformer.pos_embed.proj.bias.copy_(summands[0] + summands[1])
        for kind in ("weight", "bias"):
            rows = [
                rearrange(parts[f"project_out.{end}_linear.{kind}"], "(p q c) ... -> p q c ...", p=patch, q=patch)
                for end in ends
            ]
            getattr(transformer.proj_out, kind).copy_(rearrange(torch.cat(rows, dim=2), "p q c ... -> (p q c) ..."))


def _check_frozen(checkpoint: Checkpoint, base: dict[str, Tensor]) -> list[str]:
    """Keys of the layers that are the base's own, which full checkpoints hold; refuses any that was trained."""
    same = []
    for key, tensor in checkpoint.tensors.items():
        name = (found := LAYERS.fullmatch(key)) and found[1].replace(".base_layer.", ".")
        if not name or name not in base:
            continue
        # In bfloat16, in which the reference loads them.
        if tensor.shape != base[name].shape or not torch.equal(tensor.bfloat16(), base[name].bfloat16()):
            raise CheckpointError(
                f"{checkpoint.path}: the first mismatch is {key}: its {list(tensor.shape)} are not the base's. It was "
                "trained itself, or on another base: only ports and LoRA are imported"
            )
        same.append(key)
    return same


def _full_name(checkpoint: Checkpoint, name: str) -> str:
    """The key that ends in `name`: an average keeps Lightning's full names."""
    return next((key for key in checkpoint.tensors if key.endswith(f".{name}")), name)


def _fill_lora(pipeline: DiffusionPipeline, source: Checkpoint, report: ImportReport) -> None:
    """Put LoRA layers on the transformer, as many as the file has, and fill them."""
    named = {key: found for key in source.tensors if (found := LORA.fullmatch(key))}
    if not named:
        raise CheckpointError(
            f"{source.path} holds no LoRA (keys with lora_A and lora_B): give the file of the same step with --lora"
        )
    transformer = pipeline.transformer
    keys = {f"{found[1]}.{found[2]}.weight": key for key, found in named.items()}
    layers = sorted({found[1] for found in named.values()})
    default = backbone_of(transformer).lora_targets
    targets = default if layers == sorted(find_target_layers(transformer, default)) else tuple(layers)
    ranks = {source.shape(key)[0] for name, key in keys.items() if name.endswith("lora_A.weight")}
    if len(ranks) != 1:
        raise CheckpointError(f"{source.path}: LoRA of ranks {sorted(ranks)}: davae's adapters have one rank")
    rank = ranks.pop()
    add_lora(transformer, rank, float(rank), targets)
    like = get_peft_model_state_dict(transformer)
    tensors = match(source, like, {name: Source(keys.get(name, name)) for name in like}, report)
    set_peft_model_state_dict(transformer, {name: tensor.float() for name, tensor in tensors.items()})
