"""finectl: initialise, adapt and merge diffusion models of any size from the command line."""

from finectl import compat

__version__ = "0.1.0"

compat.install_torchvision_finder()
