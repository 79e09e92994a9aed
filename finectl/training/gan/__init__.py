"""Training of GANs on pairs of images: generator and discriminator in turns."""
