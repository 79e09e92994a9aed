"""Options that several stages have in common, as signatures: `stage_command` puts them after a stage's own."""

from __future__ import annotations

from finectl.cli import options as opt


def data(
    data: opt.Data = None,
    image_size: opt.ImageSize = None,
    resize_filter: opt.ResizeFilter = None,
    skip_bad: opt.SkipBad = None,
) -> None:
    """What is read, of every stage that reads images (`finectl.training.settings.DataFields`)."""


def text(text_encoder: opt.TextEncoder = None) -> None:
    """What a model of text reads (`finectl.training.text_settings.TextFields`)."""


def captions(text_encoder: opt.TextEncoder = None, caption_dropout: opt.CaptionDropout = None) -> None:
    """The same of a stage that trains one (`finectl.training.text_settings.CaptionFields`)."""


def training(
    flip: opt.Flip = False,
    steps: opt.Steps = None,
    batch_size: opt.BatchSize = None,
    lr: opt.Lr = None,
    lr_schedule: opt.LrSchedule = "constant",
    warmup_steps: opt.WarmupSteps = None,
    weight_decay: opt.WeightDecay = 0.0,
    clip_grad: opt.ClipGrad = None,
    ema: opt.Ema = None,
    eval_every: opt.EvalEvery = None,
    keep_every: opt.KeepEvery = 0,
    keep_at: opt.KeepAt = None,
    seed: opt.Seed = 0,
) -> None:
    """How a model is trained (`finectl.training.settings.TrainFields`)."""


def optimiser(betas: opt.Betas = None, ema_power: opt.EmaPower = 0.0) -> None:
    """Further options of training (`finectl.training.settings.OptimiserFields`)."""


def control(
    control: opt.ControlName = None,
    control_model: opt.ControlModel = None,
    control_set: opt.ControlSet = None,
    control_images: opt.ControlImages = None,
    bank_control: opt.BankControl = None,
    validate_every: opt.ValidateEvery = None,
    validation_images: opt.ValidationImages = 16,
    validation_steps: opt.ValidationSteps = 50,
    vae: opt.Vae = None,
) -> None:
    """How a ControlNet is trained (`finectl.stages.finetune_control`)."""


def continual(
    then: opt.Then = None,
    metrics: opt.ThenMetrics = None,
    samples: opt.ThenSamples = None,
    allow_few: opt.AllowFew = False,
) -> None:
    """What `finetune --then` measures (`finectl.cli.continual`)."""


def training_run(
    save_every: opt.SaveEvery = "1m",
    max_time: opt.MaxTime = None,
    workers: opt.Workers = 2,
    accumulate: opt.Accumulate = 1,
    compile: opt.Compile = False,
    grad_checkpointing: opt.GradCheckpointing = False,
    fsdp: opt.Fsdp = False,
    tensorboard: opt.Tensorboard = False,
    sample_every: opt.SampleEvery = 0,
) -> None:
    """How training runs, which changes rounding at most (`finectl.artifacts.job.Execution`)."""


def run(
    recipe: opt.Recipe = None,
    workspace: opt.Workspace = None,
    out: opt.Out = None,
    force: opt.Force = False,
    resume: opt.Resume = True,
    dry_run: opt.DryRun = False,
    json_output: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    download: opt.Download = False,
    offline: opt.Offline = False,
) -> None:
    """What every stage has."""
