"""What ships beside weights: autoencoders, their decoders and LightningDiT.

These files import torch, diffusers and each other only, so that they can lie beside weights and load without davae.
"""
