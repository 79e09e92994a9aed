"""`--control segmentation`: the class of every pixel by a network, each class a colour of its own.

The colours are those of the PASCAL VOC colour map: the bits of the class number, spread over red, green and blue. So
they are distinct for up to 2^24 classes and the same for every network.

Reference: Everingham et al., The PASCAL Visual Object Classes Challenge, IJCV 88 (2010), development kit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finectl.data.controls import CONTROLS, ControlInfo, Extractor, Setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHANNELS = 3
SETTINGS: dict[str, Setting] = {}
KINDS = ("AutoModelForSemanticSegmentation", "AutoModelForUniversalSegmentation")


def colours(classes: int) -> Tensor:
    """Return the colours of classes 0..classes-1, uint8 (classes, 3); the first one is black."""
    import torch

    number = torch.arange(classes, dtype=torch.int64)
    levels = torch.zeros(classes, 3, dtype=torch.int64)
    for place in range(8):  # three bits of the number a round, the lowest into the highest place
        for channel in range(3):
            levels[:, channel] |= ((number >> (3 * place + channel)) & 1) << (7 - place)
    return levels.to(torch.uint8)


def make(info: ControlInfo, device: str | torch.device) -> Extractor:
    """Return what tells the classes of pixels.

    Raises:
        InputError: the network, or what runs it, is not there.
    """
    from finectl.data.controls.network import load_network

    processor, network = load_network(info.model or {}, KINDS, CONTROLS[info.name].example, device)

    def classes(images: Tensor) -> Tensor:
        import torch

        colour = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        inputs = processor(images=list(colour), return_tensors="pt", input_data_format="channels_first").to(device)
        with torch.no_grad():
            outputs = network(**inputs)
        sizes = [tuple(images.shape[-2:])] * len(images)
        found = torch.stack(processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)).cpu().long()
        # One more than the class: black is the control of no image.
        return colours(int(found.max()) + 2)[found + 1].permute(0, 3, 1, 2).contiguous()

    return classes
