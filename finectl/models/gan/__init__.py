"""Conditional GANs from image to image: their configuration, the generator and the discriminator."""
