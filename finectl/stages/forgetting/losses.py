"""Held-out loss of both models on both domains, by timestep, with the same noise for both."""

from __future__ import annotations

from typing import Any

import torch

from finectl.data.dataset import ImageSet
from finectl.data.sources import DataInfo
from finectl.metrics.heldout_loss import HeldoutLoss, heldout_loss
from finectl.stages.forgetting.setting import SOURCE, TARGET, Setting, unlabelled
from finectl.stages.forgetting.subjects import FINETUNED, PRETRAINED
from finectl.training.device import arithmetic

LABELS, CAPTIONS, NULL = "labels", "captions", "no class"


def losses_by_timestep(setting: Setting) -> dict[str, Any]:
    """Measure the loss of both models on held-out images of both domains.

    A comparison gives both models the labels where both were trained on those classes, and the null class to both
    where one was not: fine-tuning is to be told apart from what labels tell. A model that knows the labels of a domain
    which the other one does not is measured with them as well.

    Returns:
        By domain: `data`, `images`, `compared` (with labels, captions or neither), `models` (name to summary),
        `difference` (of the fine-tuned model to the pre-trained one, paired by image and noise), and `labelled` (name
        to summary).
    """
    subjects, config = setting.subjects, setting.job.config
    domains = [TARGET] if subjects.source is None and subjects.bank is None else [SOURCE, TARGET]
    found: dict[str, Any] = {}
    networks = {model: setting.network(model, domains[0]) for model in (PRETRAINED, FINETUNED)}
    with setting.job.console.progress("held-out loss", 2 * len(domains), unit="model") as progress:
        for domain in domains:
            for network in networks.values():
                setting.condition(network, domain)
            images = setting.images(domain, "heldout", config.images)
            info = subjects.target if domain == TARGET else subjects.source
            known = [model for model in networks if info is not None and subjects.knows(model, info)]
            shared = len(known) == len(networks)
            measured: dict[str, HeldoutLoss] = {}
            for model, network in networks.items():
                given = images if shared else unlabelled(images, network)
                measured[model] = _measure(setting, network, given)
                progress.advance()
            labelled = {} if shared else {model: _measure(setting, networks[model], images) for model in known}
            one, other = measured[FINETUNED], measured[PRETRAINED]
            difference = HeldoutLoss(one.losses.double() - other.losses.double(), one.timesteps, one.total_timesteps)
            found[domain] = {
                "data": subjects.target.name if domain == TARGET else subjects.source_name,
                "split": images.split,
                "images": len(images),
                "draws": config.draws,
                "compared": _compared(info) if shared else NULL,
                "models": {model: loss.summary(config.ranges) for model, loss in measured.items()},
                "difference": difference.summary(config.ranges),
                "labelled": {model: loss.summary(config.ranges) for model, loss in labelled.items()},
            }
    return found


def _compared(info: DataInfo | None) -> str:
    return CAPTIONS if info is not None and info.text is not None else LABELS


def _measure(setting: Setting, network: Any, images: ImageSet) -> HeldoutLoss:
    config = setting.job.config
    setting.check()
    with arithmetic(setting.device, "float32"), torch.no_grad():
        return heldout_loss(
            network,
            images,
            draws=config.draws,
            seed=config.seed,
            batch_size=config.batch_size,
            device=setting.device,
            diffusion=network.config.diffusion,
        )
