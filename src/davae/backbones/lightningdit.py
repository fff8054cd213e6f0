"""LightningDiT: conditions are class numbers. Its time and sign run the other way, and are turned here."""

from functools import partial

from davae.backbones.backbone import Backbone, Condition, LatentPorts, Latents, Model, Sigma, encode_classes


def velocity(transformer: Model, latents: Latents, sigma: Sigma, condition: Condition) -> Latents:
    return -transformer(hidden_states=latents, timestep=1 - sigma, **condition, return_dict=False)[0]


BACKBONE = Backbone(
    LatentPorts("x_embedder.proj", "d c p q", "final_layer.linear", "(p q c) d"),
    partial(encode_classes, class_setting="num_classes"),
    velocity,
    class_setting="num_classes",
    one_size=True,
    condition_shapes=lambda model, tokens: {"class_labels": ()},
)
