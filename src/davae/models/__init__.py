"""What ships beside weights: autoencoders, their decoders and LightningDiT, of torch and diffusers only."""
