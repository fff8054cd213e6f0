"""What docs/speed.md recommends changes nothing but the time: compiled blocks, cached embeddings, channels last."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

import tiny
from davae import AutoencoderDA, upgrade


@pytest.fixture
def upgraded() -> StableDiffusion3Pipeline:
    base = tiny.tiny_sd3_pipeline()
    return upgrade(base, AutoencoderDA.from_base(base.vae, detail_channels=4))


def picture(pipeline: StableDiffusion3Pipeline, side: int = 64, **told: object) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(0)
    settings = {"height": side, "width": side, "num_inference_steps": 2, "output_type": "pt", "generator": random}
    return pipeline(**told, **settings).images


def test_compiled_blocks_are_not_compiled_again_for_another_size(upgraded: StableDiffusion3Pipeline) -> None:
    """One graph for each kind of block and all sizes: dynamic from the first call on.

    Of which the tokens are 9: with 16 they would be taken for the width, which is 16 here and the same for all sizes.
    """
    told = {"prompt": "red apple", "max_sequence_length": 8}
    expected = {side: picture(upgraded, side, **told) for side in (48, 32, 64)}
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph

    for block in upgraded.transformer.transformer_blocks:
        block.compile(fullgraph=True, dynamic=True, backend=counting)
    torch.testing.assert_close(picture(upgraded, 48, **told), expected[48], atol=1e-5, rtol=1e-5)
    first = len(graphs)
    for side in (32, 64, 48):
        torch.testing.assert_close(picture(upgraded, side, **told), expected[side], atol=1e-5, rtol=1e-5)
    assert len(graphs) == first == 2  # the first block has a second attention, the last gives no text
    torch._dynamo.reset()


def test_kept_embeddings_make_the_same_picture(upgraded: StableDiffusion3Pipeline) -> None:
    expected = picture(upgraded, prompt="red apple", negative_prompt="", max_sequence_length=8)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    with torch.no_grad():
        kept = upgraded.encode_prompt("red apple", None, None, negative_prompt="", max_sequence_length=8)
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        setattr(upgraded, name, None)  # they are not asked again, and need not be there
    assert torch.equal(picture(upgraded, **dict(zip(names, kept, strict=True))), expected)


def test_channels_last_decodes_to_the_same_picture(upgraded: StableDiffusion3Pipeline) -> None:
    latents = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = upgraded.vae.decode(latents).sample
        upgraded.vae.to(memory_format=torch.channels_last)
        made = upgraded.vae.decode(latents.to(memory_format=torch.channels_last)).sample
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)
