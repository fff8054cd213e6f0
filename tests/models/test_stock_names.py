"""AutoencoderDA under the names of other autoencoders' parts: what it cannot do there it refuses by name."""

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderTiny
from torch import nn

import tiny_pipelines
from autoencoders import images, quantised_kl, trained

OTHERS = {
    AutoencoderKL: quantised_kl,
    AutoencoderDC: lambda: tiny_pipelines.sana().vae,
    AutoencoderKLQwenImage: tiny_pipelines.qwen_vae,
    AutoencoderKLFlux2: lambda: tiny_pipelines.flux2().vae,
    AutoencoderTiny: AutoencoderTiny,
}


@pytest.mark.parametrize("other", OTHERS, ids=lambda kind: kind.__name__)
def test_no_part_of_another_autoencoder_is_swallowed(other: type) -> None:
    """Each name of a submodule of a stock autoencoder is a part that runs, or is refused by its name."""
    autoencoder = trained("kl")
    names = [name for name, _ in OTHERS[other]().named_children()]
    assert {"encoder", "decoder"} <= set(names)
    for name in names:
        if name == "bn":  # AutoencoderDA has it, too
            continue
        with pytest.raises(ValueError, match=rf"^{name} = Identity: an AutoencoderDA does not run it.*joint_decoder"):
            setattr(autoencoder, name, nn.Identity())
        assert name not in autoencoder._modules


def test_a_compiled_decoder_is_refused_by_name_and_compiles_in_place() -> None:
    autoencoder, image, graphs = trained("tiny").requires_grad_(False), images(1), []

    def counting(graph: torch.fx.GraphModule, inputs: list) -> object:
        graphs.append(graph)
        return graph.forward

    latents, names = autoencoder.encode(image).latent_dist.mode(), list(autoencoder.state_dict())
    whole = autoencoder.decode(latents).sample
    with pytest.raises(ValueError, match=r"^decoder = OptimizedModule: "):
        autoencoder.decoder = torch.compile(autoencoder.decoder, backend=counting)
    with pytest.raises(ValueError, match=r"names that nothing loads.*vae.detail_upsample.compile\(\)"):
        autoencoder.detail_upsample = torch.compile(autoencoder.detail_upsample, backend=counting)

    autoencoder.decoder.compile(backend=counting)
    assert torch.equal(autoencoder.decode(latents).sample, whole)
    assert graphs
    assert list(autoencoder.state_dict()) == names
