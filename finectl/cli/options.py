"""The option table: every option of every stage, once, with one name and one meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def _use_recipe(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make the recipe's values the defaults of the options that the command line leaves out."""
    if path is not None and not ctx.resilient_parsing:
        from finectl.cli.commands import section_of
        from finectl.cli.recipe import load_recipe

        parameters = {p.name: getattr(p, "multiple", False) or p.nargs == -1 for p in ctx.command.params if p.name}
        known, repeated = list(parameters), [name for name, many in parameters.items() if many]
        ctx.default_map = load_recipe(path, section_of(ctx.command_path), known, repeated)
    return path


# What is read
Input = Annotated[
    str | None,
    typer.Argument(metavar="[INPUT]", help="A path, kind/name, 'latest', or '-' for stdin. [default: the newest]"),
]
Inputs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[INPUT]...", help="Paths, kind/name, 'latest', or '-' for stdin. [default: the newest model]"
    ),
]
Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[INPUT]...",
        help="Paths, kind/name, 'latest', or '-' for stdin; a method takes the first it can start from. "
        "[default: the newest; for several models the newest that init did not make]",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="NAME",
        help="digits, photos, folder:PATH (or .zip), latents:PATH or hf:NAME; digits#3,7 for some classes. [default: "
        "INPUT's, else digits]",
    ),
]
ImageSize = Annotated[
    int | None, typer.Option("--image-size", min=1, help="Side of the images, pixels. [default: that of the data]")
]
ResizeFilter = Annotated[
    Literal["bicubic", "lanczos", "bilinear", "box", "nearest"] | None,
    typer.Option("--resize-filter", help="How images are brought to --image-size. [default: INPUT's, else bicubic]"),
]
SkipBad = Annotated[
    bool | None,
    typer.Option("--skip-bad/--no-skip-bad", help="Leave corrupt images out and count them. [default: INPUT's]"),
]
Flip = Annotated[
    bool, typer.Option("--flip/--no-flip", help="Mirror half of the training images, drawn anew each time.")
]
Weights = Annotated[
    Literal["ema", "raw"], typer.Option("--weights", help="Which of INPUT's weights; raw where there is no EMA.")
]

# What convert reads and writes
Source = Annotated[
    str | None,
    typer.Argument(
        metavar="[SOURCE]", help="A foreign file, folder or hub id; with --to a model. [default: the newest]"
    ),
]
To = Annotated[
    Literal["diffusers", "dit", "peft"] | None,
    typer.Option("--to", help="Export to diffusers, to facebookresearch/DiT's tensors, or what --peft trained alone."),
]
Format = Annotated[
    Literal["dit", "diffusers-dit", "diffusers-unet", "edm"] | None,
    typer.Option("--format", help="SOURCE's format. [default: what its content shows]"),
]
Components = Annotated[
    Literal["reference", "copy", "none"] | None,
    typer.Option("--components", help="VAE, text encoder, ... [default: reference; with --to copy]"),
]
ExportVae = Annotated[
    str | None, typer.Option("--vae", metavar="PATH", help="AutoencoderKL, path or hub id. [default: the model's own]")
]
Heads = Annotated[
    int | None, typer.Option("--heads", min=1, help="Attention heads, which weights do not tell. [default: by width]")
]
NumClasses = Annotated[
    int | None,
    typer.Option("--num-classes", min=0, help="Classes in SOURCE's label table. [default: all of its rows]"),
]
SourceDigest = Annotated[
    str | None, typer.Option("--source-digest", metavar="HEX", help="Refuse SOURCE if its content has another digest.")
]
Vae = Annotated[
    str | None,
    typer.Option("--vae", metavar="PATH|ID", help="Autoencoder, as diffusers stores it. [default: INPUT's, if any]"),
]

TextEncoder = Annotated[
    str | None,
    typer.Option("--text-encoder", metavar="PATH|ID", help="CLIP's for a model of text, or hash. [default: INPUT's]"),
]
CaptionDropout = Annotated[
    float | None,
    typer.Option(
        "--caption-dropout", min=0.0, max=1.0, help="How often a caption is left out in training. [default: 0.1]"
    ),
]
PromptsFile = Annotated[
    str | None,
    typer.Option("--prompts", metavar="FILE", help="Prompts, one a line; - reads them from stdin."),
]
Prompt = Annotated[
    list[str] | None,
    typer.Option("--prompt", metavar="TEXT", help="A prompt; may be repeated. [default: the held-out captions]"),
]

# What is built
Model = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="PRESET", help="dit-nano, dit-s, dit-b, dit-l, dit-xl [/2 /4 /8]. [default: dit-nano]"
    ),
]
FromModel = Annotated[
    str | None,
    typer.Option(
        "--from", metavar="MODEL", help="Fit the factors to this dense model: a path, kind/name, latest or -."
    ),
]
CpWeighting = Annotated[
    Literal["inputs", "none"],
    typer.Option(
        "--cp-weighting", help="What errors of --from's fit are weighed by: the layers' inputs on data, or nothing."
    ),
]
CpIterations = Annotated[
    int, typer.Option("--cp-iterations", min=0, help="Most sweeps of alternating least squares a type, with --from.")
]
DistillSteps = Annotated[
    int | None,
    typer.Option(
        "--distill-steps",
        min=0,
        help="Updates towards predictions: --from's, before --steps [default: 0]; --distill's, of --steps [all].",
    ),
]
Distill = Annotated[
    str | None,
    typer.Option("--distill", metavar="TEACHER", help="Train towards this model's predictions instead of the noise."),
]
CondenseMethod = Annotated[
    Literal["fine", "share", "tleg", "wave"],
    typer.Option("--method", help="How layers share: fine U and V, share all, tleg a line over depth, wave templates."),
]
TemplateSize = Annotated[
    int | None,
    typer.Option("--template-size", min=1, help="Side of wave's templates, a divisor of the width. [default: half]"),
]
CondenseSteps = Annotated[
    int | None,
    typer.Option(
        "--steps", min=0, help="Optimiser updates. [default: small on bundled data, else the paper's; 0 with --from]"
    ),
]
ModelOrNone = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PRESET",
        help="Build this preset instead of INPUT's shapes, where the method can; unet-nano, -cifar, -lsun, -text-nano, "
        "-sd14: he only.",
    ),
]
ImportProcess = Annotated[
    Literal["ddpm", "edm"] | None,
    typer.Option("--process", help="Of an imported EDM network: how images are made noisy. [default: ddpm]"),
]
Process = Annotated[
    Literal["ddpm", "edm"] | None,
    typer.Option(
        "--process", help="What makes images noisy: edm as EDM's preconditioning. [default: INPUT's, or ddpm]"
    ),
]
Depth = Annotated[int | None, typer.Option("--depth", min=1, help="Number of layers. [default: the preset's]")]
Factorize = Annotated[
    str | None,
    typer.Option("--factorize", metavar="TYPES", help="Types that share, of qkv,o,in,out,adaln. [default: all]"),
]
Rank = Annotated[
    int | None,
    typer.Option("--rank", min=1, help="Columns of U and V; of wave, a budget as large. [default: the width]"),
]
Overcomplete = Annotated[bool, typer.Option("--overcomplete", help="Allow a rank above what the width gives room for.")]
SigmaLr = Annotated[
    float | None,
    typer.Option("--sigma-lr", min=0.0, help="Learning rate of sigma. [default: 5 times --lr bundled data, else --lr]"),
]
SigmaSharing = Annotated[int, typer.Option("--sigma-sharing", min=1, help="Entries of sigma that share one value.")]
LearnSigma = Annotated[
    bool, typer.Option("--learn-sigma/--no-learn-sigma", help="Predict the variance too, with its bound in the loss.")
]
FrequencyDivisor = Annotated[
    int,
    typer.Option(
        "--frequency-divisor", min=1, help="Divisor of the time frequencies: 128 as DiT's authors, 127 as diffusers."
    ),
]
Method = Annotated[
    str,
    typer.Option(
        "--method", metavar="NAME", help="Initialisation method, several with commas, or all: see finectl ls methods."
    ),
]
Variant = Annotated[
    str | None,
    typer.Option("--variant", metavar="NAME", help="Variant of the method, or all. [default: its usual one]"),
]
FamilyDepths = Annotated[
    str | None, typer.Option("--depths", metavar="LIST", help="Make one model of each depth, such as 2,4,6,8.")
]
Only = Annotated[
    str | None,
    typer.Option(
        "--only", metavar="LIST", help="Of several models make these now: METHOD, lDEPTH or METHOD[-VARIANT]-lDEPTH."
    ),
]
Constants = Annotated[
    str | None,
    typer.Option("--set", metavar="NAME=VALUE,...", help="Other numbers in the method's definition: see ls methods."),
]
Sigma = Annotated[
    Literal["interpolated", "nearest", "identical", "random"] | None,
    typer.Option(
        "--sigma", help="Where sigma starts from. [default: interpolated; nearest for what condense --from made]"
    ),
]
SigmaFrom = Annotated[
    str | None,
    typer.Option("--sigma-from", metavar="GENERATOR", help="Generate sigma and biases from --prompt, in one step."),
]
TaskPrompt = Annotated[
    str | None,
    typer.Option("--prompt", metavar="TEXT", help="The task of --sigma-from in words: the digits 3 and 7."),
]
DepthScale = Annotated[
    float,
    typer.Option(
        "--depth-scale", help="Residual branches times (old depth / new depth) to this power; 0 leaves them as read."
    ),
]
TuneSteps = Annotated[
    int | None,
    typer.Option(
        "--tune-steps", min=0, help="Updates of sigma before W is written out. [default: 50 bundled data, else 300]"
    ),
]
TuneSamples = Annotated[
    int | None,
    typer.Option("--tune-samples", min=1, help="Images tuned on, a fixed part. [default: 5 %, at least 256]"),
]
TuneLr = Annotated[
    float, typer.Option("--tune-lr", min=0.0, help="Rate of what is tuned in place of weights (sigma), cosine to 0.")
]
WidthMap = Annotated[
    Literal["rows", "learned"],
    typer.Option(
        "--width-map", help="Rows of U and V in another width: chosen, or mixed by matrices tuned with sigma."
    ),
]
TuneBiases = Annotated[bool, typer.Option("--tune-biases/--no-tune-biases", help="Tune the biases with sigma.")]
Depths = Annotated[
    str, typer.Option("--depths", metavar="LIST", help="Depths of the family whose storage is compared.")
]

# How images are encoded
StoreFlips = Annotated[bool, typer.Option("--flip/--no-flip", help="Encode mirrored images too, for training --flip.")]
Storage = Annotated[Literal["float16", "float32"], typer.Option("--storage", help="Type of the stored latents.")]
ShardSize = Annotated[
    int, typer.Option("--shard-size", min=1, help="Images a file; what is lost at most when a run is killed.")
]

# How it is trained
Steps = Annotated[
    int | None,
    typer.Option("--steps", min=1, help="Optimiser updates. [default: small on bundled data, else the paper's]"),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size", min=1, help="Images a step, over all processes. [default: 128 bundled data, else 256]"
    ),
]
ComputeBatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images computed at a time.")]
Lr = Annotated[
    float | None, typer.Option("--lr", min=0.0, help="AdamW's rate. [default: 1e-3 (condense 4e-3); not bundled: 1e-4]")
]
LrSchedule = Annotated[
    Literal["constant", "cosine"], typer.Option("--lr-schedule", help="Course of the learning rate.")
]
WarmupSteps = Annotated[
    int | None,
    typer.Option(
        "--warmup-steps", min=0, help="Updates over which the rate rises to --lr. [default: 100 bundled data, else 0]"
    ),
]
Betas = Annotated[
    str | None,
    typer.Option("--betas", metavar="B1,B2", help="Decays of AdamW's two moments. [default: 0.9,0.999]"),
]
EmaPower = Annotated[
    float,
    typer.Option(
        "--ema-power", min=0.0, help="The EMA's decay rises as 1-(1+k)^-POWER up to --ema; 0: from the start."
    ),
]
Weighting = Annotated[
    Literal["uniform", "snr", "snr+1", "trunc-snr", "min-snr", "p2"],
    typer.Option(
        "--weighting", help="Weights of the loss over timesteps; uniform: of what is predicted, snr: of the noise."
    ),
]
NormaliseWeights = Annotated[
    bool, typer.Option("--normalise-weights/--no-normalise-weights", help="Divide those weights by their mean.")
]
Mtl = Annotated[
    Literal["none", "ant-uw", "ant-nash", "pcgrad"],
    typer.Option("--mtl", help="Weigh timestep clusters as tasks: by uncertainty, Nash bargaining, gradient surgery."),
]
Clusters = Annotated[
    int | None,
    typer.Option("--clusters", min=2, help="Equal timestep intervals that --mtl weighs. [default: 4]"),
]
WeightDecay = Annotated[float, typer.Option("--weight-decay", min=0.0, help="Decoupled weight decay.")]
ClipGrad = Annotated[
    float | None,
    typer.Option(
        "--clip-grad", min=0.0, help="Largest norm of all gradients together; 0 leaves them. [default: 0, ant-nash 1]"
    ),
]
Ema = Annotated[
    float | None,
    typer.Option("--ema", min=0.0, max=1.0, help="Decay of the EMA. [default: 0.99 bundled data, else 0.9999]"),
]
EvalEvery = Annotated[
    int | None,
    typer.Option(
        "--eval-every", min=0, help="Held-out loss every so many updates; 0 never. [default: a tenth of --steps]"
    ),
]
KeepEvery = Annotated[
    int,
    typer.Option(
        "--keep-every",
        min=0,
        help="Keep the EMA weights of every N-th update in checkpoints/; 0 keeps the last only.",
    ),
]
KeepAt = Annotated[
    str | None,
    typer.Option("--keep-at", metavar="LIST", help="Keep those of these updates too, such as 30,100,300."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of every random number.")]

EnsembleOf = Annotated[
    str | None,
    typer.Option(
        "--ensemble", metavar="EXPERTS", help="Experts as one model, a timestep its own: a path, 'latest' or '-'."
    ),
]

# How experts of timestep ranges are trained
RangeCount = Annotated[
    int | None, typer.Option("--ranges", min=1, help="Number of equal timestep ranges, an expert each. [default: 4]")
]
Borders = Annotated[
    str | None, typer.Option("--borders", metavar="LIST", help="Borders of unequal ranges, such as 0,250,500,1000.")
]
GlobalP = Annotated[
    float, typer.Option("--p", min=0.0, max=1.0, help="Probability that timesteps are drawn from all, not the range.")
]
Coin = Annotated[
    Literal["batch", "sample"],
    typer.Option("--coin", help="Decide that for a whole batch, or for each of its samples."),
]
Antithetic = Annotated[
    bool, typer.Option("--antithetic/--no-antithetic", help="Mirror half of a batch's timesteps within their range.")
]
RangeMethod = Annotated[
    Literal["deme", "diff-tuning"],
    typer.Option(
        "--method", help="Hold experts to INPUT's predictions (DeMe), or to images that it made (Diff-Tuning)."
    ),
]
ConsistencyWeight = Annotated[
    float | None,
    typer.Option(
        "--consistency",
        min=0.0,
        help="Weight of the distance from INPUT's predictions; 0: no teacher. [default: 1; diff-tuning: 0]",
    ),
]
RangeTeacher = Annotated[
    Literal["frozen", "refreshed"],
    typer.Option(
        "--teacher",
        help="INPUT throughout, as the paper has it; or refreshed from the expert's own EMA at each epoch, as the "
        "released code does by mistake: for replication.",
    ),
]
Projection = Annotated[
    Literal["none", "blocks", "foldable"],
    typer.Option("--projection", help="Channel projections after all blocks, after those that fold away, or none."),
]
OnlyRange = Annotated[
    int | None, typer.Option("--only", metavar="I", min=0, help="Train the expert of this range, counted from 0.")
]
Collect = Annotated[
    bool, typer.Option("--collect", help="Train nothing: put the experts together; an error where one is missing.")
]
RangeSteps = Annotated[
    int | None, typer.Option("--steps", min=1, help="Updates of each expert. [default: 300 bundled data, else 20,000]")
]
RangeBatchSize = Annotated[
    int | None, typer.Option("--batch-size", min=1, help="Images a step, over all processes. [default: 64]")
]
RangeLr = Annotated[
    float | None, typer.Option("--lr", min=0.0, help="AdamW's rate. [default: 5e-4 bundled data, else 5e-5]")
]
RangeWarmup = Annotated[
    int | None, typer.Option("--warmup-steps", min=0, help="Updates over which the rate rises to --lr. [default: 0]")
]
RangeEma = Annotated[
    float | None, typer.Option("--ema", min=0.0, max=1.0, help="Largest decay of the EMA. [default: 0.9999]")
]

# How a model is fine-tuned on other data
Shots = Annotated[
    int | None,
    typer.Option("--shots", min=1, help="Training images a class, chosen by --seed. [default: all]"),
]
FinetuneMethod = Annotated[
    Literal["diff-tuning", "full"],
    typer.Option("--method", help="Keep what the model knows at low noise while it learns (Diff-Tuning); or plainly."),
]
Coefficients = Annotated[
    Literal["sampling", "weights"] | None,
    typer.Option(
        "--coefficients",
        help="What psi and xi are: how timesteps are drawn, as released, or weights of losses, as written. [default: "
        "sampling]",
    ),
]
ChainPower = Annotated[
    float | None,
    typer.Option("--power", min=0.0, help="Exponent of psi(t), by which new images count; 0: all alike. [default: 1]"),
]
RetentionPower = Annotated[
    float | None,
    typer.Option(
        "--retention-power", min=0.0, help="Exponent of xi(t), by which retained ones do. [default: --power, else 1]"
    ),
]
Retention = Annotated[
    Literal["bank", "kd", "none"] | None,
    typer.Option(
        "--retention", help="What is kept: images of the model, its predictions on the data, nothing. [default: bank]"
    ),
]
RetentionWeight = Annotated[
    float | None,
    typer.Option(
        "--retention-weight", min=0.0, help="What retained images' mean loss counts. [default: 0.1; weights: 1]"
    ),
]
RetentionShare = Annotated[
    float | None,
    typer.Option("--retention-share", min=0.0, max=1.0, help="Share of a batch that is retained. [default: 0.2]"),
]
Bank = Annotated[
    str | None,
    typer.Option(
        "--bank", metavar="ARTIFACT", help="Images that INPUT made (finectl bank). [default: its newest, or a new one]"
    ),
]
BankSamples = Annotated[
    int | None,
    typer.Option(
        "--bank-samples", min=1, help="Images of the bank made without --bank. [default: 500 bundled data, else 2,000]"
    ),
]
LabelRows = Annotated[
    Literal["new", "reuse"] | None,
    typer.Option(
        "--label-rows", help="Rows of the classes: drawn anew, or the first ones. [default: reuse of the same labels]"
    ),
]
Peft = Annotated[
    Literal["none", "lora", "difffit", "bitfit", "adaptformer", "vpt"],
    typer.Option("--peft", help="Train few parameters instead of all (parameter-efficient tuning)."),
]
PeftSet = Annotated[
    list[str] | None,
    typer.Option(
        "--peft-set",
        metavar="NAME=VALUE",
        help="Of --peft: rank, alpha, layers, blocks, dim, scale, tokens or labels; may be repeated.",
    ),
]
FinetuneSteps = Annotated[
    int | None, typer.Option("--steps", min=1, help="Optimiser updates. [default: 600 bundled data, else 24,000]")
]
FinetuneBatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, help="Images a step, over all processes. [default: 64 bundled data, else 32]"),
]
FinetuneLr = Annotated[
    float | None,
    typer.Option(
        "--lr", min=0.0, help="AdamW's rate. [default: 5e-4 bundled data, else 1e-4; ten times that with --peft]"
    ),
]
FinetuneWarmup = Annotated[
    int | None, typer.Option("--warmup-steps", min=0, help="Updates over which the rate rises to --lr. [default: 0]")
]
Then = Annotated[
    list[str] | None,
    typer.Option(
        "--then",
        metavar="DATA",
        help="Go on with this data, from the model before, and measure all so far; repeatable.",
    ),
]
ThenMetrics = Annotated[
    str | None, typer.Option("--metrics", metavar="LIST", help="With --then: what is measured. [default: as evaluate]")
]
ThenSamples = Annotated[
    int | None, typer.Option("--samples", min=1, help="With --then: images of each measurement. [default: 1,000]")
]

# How it samples and measures
Samples = Annotated[int, typer.Option("--samples", min=1, help="Images to generate.")]
ControlName = Annotated[
    Literal["edge", "sketch", "depth", "normal", "segmentation", "folder"] | None,
    typer.Option(
        "--control", help="Train a ControlNet for this control on a UNet of text, which itself stays as it is."
    ),
]
ControlModel = Annotated[
    str | None,
    typer.Option("--control-model", metavar="PATH|ID", help="What measures depth, normal or segmentation."),
]
ControlSet = Annotated[
    str | None,
    typer.Option("--control-set", metavar="NAME=VALUE,...", help="Numbers of the control, such as sigma=1 of edge."),
]
ControlImages = Annotated[
    str | None,
    typer.Option(
        "--control-images", metavar="PATH", help="The images of --control folder, named like those of --data."
    ),
]
BankControl = Annotated[
    Literal["empty", "extracted"] | None,
    typer.Option("--bank-control", help="The control of retained images: none, or their own. [default: empty]"),
]
ValidateEvery = Annotated[
    int | None,
    typer.Option(
        "--validate-every",
        min=0,
        help="Make images of held-out controls every so many updates, and measure these again; 0 never. [default: a "
        "thirtieth of --steps bundled data, else 100]",
    ),
]
ValidationImages = Annotated[
    int, typer.Option("--validation-images", min=1, help="How many images that --validate-every makes.")
]
ValidationSteps = Annotated[
    int, typer.Option("--validation-steps", min=1, help="Steps of the reverse process in which it makes them.")
]
ControlImage = Annotated[
    list[str] | None,
    typer.Option(
        "--control-image",
        metavar="PATH",
        help="With a ControlNet: a control, or a folder of them; may be repeated. [default: those of held-out images]",
    ),
]
FromImage = Annotated[
    list[str] | None,
    typer.Option(
        "--from-image", metavar="PATH", help="The same of photographs, whose control is measured; may be repeated."
    ),
]
ControlScale = Annotated[
    float, typer.Option("--control-scale", min=0.0, help="What a ControlNet's branch counts; 0 is the model alone.")
]

BankSize = Annotated[
    int | None,
    typer.Option(
        "--samples", min=1, help="Images to generate. [default: 500 bundled data, else 50 a class, 5,000 to 50,000]"
    ),
]
BankPrompt = Annotated[
    list[str] | None,
    typer.Option("--prompt", metavar="TEXT", help="A prompt; may be repeated. [default: the training captions]"),
]
BankGuidance = Annotated[
    float | None,
    typer.Option(
        "--guidance", min=0.0, help="Classifier-free guidance scale; 1 is none. [default: 1.5, without null class 1]"
    ),
]
Scheduler = Annotated[str, typer.Option("--scheduler", metavar="NAME", help="ddpm, ddim, pndm or dpm-solver++.")]
SamplingSteps = Annotated[int, typer.Option("--sampling-steps", min=1, help="Steps of the reverse process.")]
Guidance = Annotated[float, typer.Option("--guidance", min=0.0, help="Classifier-free guidance scale; 1 is none.")]
Handover = Annotated[
    str | None,
    typer.Option("--handover", metavar="PRETRAINED", help="Let this model, without classes, make the last steps."),
]
Fraction = Annotated[
    float | None,
    typer.Option(
        "--fraction",
        min=0.0,
        max=1.0,
        help="Share of the steps, those of least noise, that --handover makes. [default: 0.1]",
    ),
]
DomainGuidance = Annotated[
    str | None,
    typer.Option(
        "--domain-guidance", metavar="PRETRAINED", help="Guide away from this model's unconditional prediction."
    ),
]
Labels = Annotated[
    str | None,
    typer.Option("--labels", metavar="LIST", help="Classes to generate, in turn. [default: those of the data]"),
]
Metrics = Annotated[
    str | None,
    typer.Option(
        "--metrics",
        metavar="LIST",
        help="Those above, separated by commas. [default: loss; on digits frechet, accuracy]",
    ),
]
Draws = Annotated[int, typer.Option("--draws", min=1, help="Noise draws an image in the held-out loss.")]
Ranges = Annotated[int, typer.Option("--ranges", min=1, help="Equal timestep ranges in which the loss is given, too.")]
Reference = Annotated[
    str | None,
    typer.Option(
        "--reference",
        metavar="WHAT",
        help="folder:, latents:, hf:, a statistics artifact, .safetensors or .npz. [default: INPUT's training images]",
    ),
]
Images = Annotated[
    str | None,
    typer.Option("--images", metavar="folder:PATH", help="Measure these images, as they are, instead of INPUT."),
]
Features = Annotated[
    str | None,
    typer.Option("--features", metavar="NAME", help="For frechet and accuracy: digits, or torchvision:NETWORK."),
]
FeaturesWeights = Annotated[
    str | None, typer.Option("--features-weights", metavar="FILE", help="Weights of --features torchvision:NETWORK.")
]
Inception = Annotated[
    str | None, typer.Option("--inception", metavar="FILE", help="inception-2015-12-05.pt. [default: in the cache]")
]
Clip = Annotated[
    str | None,
    typer.Option("--clip", metavar="WHAT", help="Folder, ARCHITECTURE:FILE or hub id. [default: ViT-g/14 of laion2b]"),
]
Dino = Annotated[
    str | None, typer.Option("--dino", metavar="FILE", help="dinov2_vitl14_pretrain.pth. [default: in the cache]")
]
LpipsWeights = Annotated[
    str | None, typer.Option("--lpips", metavar="FILE", help="alexnet-owt-7be5be79.pth. [default: in the cache]")
]
FidMode = Annotated[
    Literal["clean", "legacy_tensorflow"],
    typer.Option("--fid-mode", help="How images reach Inception: clean-fid's bicubic filter, or as in 2017."),
]
FeaturesDtype = Annotated[
    Literal["float32", "bfloat16"],
    typer.Option("--features-dtype", help="Arithmetic of the feature networks; values in bfloat16 are kept apart."),
]
AllowFew = Annotated[bool, typer.Option("--allow-few", help="Allow a Fréchet distance of fewer images than features.")]
StepsEvery = Annotated[
    int,
    typer.Option(
        "--steps-every", min=0, help="Measure the kept checkpoints of every N-th update too; 1 measures all of them."
    ),
]
Reach = Annotated[
    str | None,
    typer.Option(
        "--reach", metavar="TEST", help="With --steps-every: updates until 'loss<0.1' holds, or the scores of a model."
    ),
]
TableFormat = Annotated[
    Literal["md", "csv", "json"] | None,
    typer.Option("--format", help="Print the table in this form on stdout, instead of the artifact's path."),
]
FailIf = Annotated[
    str | None, typer.Option("--fail-if", metavar="TEST", help="Exit with 5 when it holds, such as 'loss>0.1'.")
]

# How models are merged
MergeInputs = Annotated[
    list[str] | None,
    typer.Argument(metavar="[INPUT]...", help="Experts, or models with --base. [default: the newest experts]"),
]
Base = Annotated[str | None, typer.Option("--base", metavar="MODEL", help="What the models were fine-tuned from.")]
MergeMethod = Annotated[
    Literal["task-arithmetic", "linear", "ties", "dare"],
    typer.Option("--method", help="How weights become one: theta_0 + sum w tau, its kin, or a mean (linear)."),
]
MergeWeights = Annotated[
    str | None, typer.Option("--weights", metavar="LIST", help="A weight for each model. [default: searched]")
]
BlockWeights = Annotated[
    str | None,
    typer.Option("--block-weights", metavar="BLOCK=LIST;...", help="Weights of single blocks, beside --weights."),
]
Density = Annotated[
    float, typer.Option("--density", min=0.0, max=1.0, help="Share of a task vector's entries that ties and dare keep.")
]
OutputDtype = Annotated[
    Literal["same", "float32", "bfloat16", "float16"],
    typer.Option("--output-dtype", help="Type of the merged weights in the file."),
]
Fold = Annotated[
    bool, typer.Option("--fold/--no-fold", help="Fold channel projections into convolutions, where that is exact.")
]
MergeRanges = Annotated[
    int | None, typer.Option("--ranges", min=1, help="How many ranges the experts must have. [default: as they have]")
]
GridStep = Annotated[float, typer.Option("--grid-step", min=0.0, help="Distance of the values that a weight takes.")]
GridMin = Annotated[float, typer.Option("--grid-min", help="Least value of a weight.")]
GridMax = Annotated[float, typer.Option("--grid-max", help="Largest value of a weight.")]
MaxCandidates = Annotated[
    int, typer.Option("--max-candidates", min=1, help="Largest grid that is measured whole without --search grid.")
]
SearchStrategy = Annotated[
    Literal["grid", "coarse-to-fine", "surrogate", "bayes", "cma-es"] | None,
    typer.Option("--search", help="How weights are searched. [default: grid, above --max-candidates coarse-to-fine]"),
]
ObjectiveName = Annotated[
    str | None,
    typer.Option("--objective", metavar="METRIC", help="What is searched for. [default: on digits frechet, else loss]"),
]
SearchSamples = Annotated[
    int, typer.Option("--search-samples", min=2, help="Images, or terms of the loss, a candidate.")
]
Rescored = Annotated[
    int, typer.Option("--rescored", min=1, help="The best candidates that are measured again, on fresh noise.")
]
JournalFile = Annotated[
    str | None,
    typer.Option("--journal", metavar="FILE", help="Keep candidates there, for machines that share one search."),
]

# What analyse looks at
OnlyAnalyses = Annotated[
    str | None,
    typer.Option(
        "--only",
        metavar="LIST",
        help="Some of norms, cosines, gradients, landscape, activations. [default: all that fit]",
    ),
]
GradientTimesteps = Annotated[
    int, typer.Option("--timesteps", min=2, help="Timesteps whose gradients are compared, spread evenly.")
]
AnalysedImages = Annotated[
    int, typer.Option("--images", min=1, help="Images for gradients, landscape and activations, at most.")
]
Plane = Annotated[
    str, typer.Option("--plane", metavar="I,J", help="The two task vectors of the landscape, counted from 0.")
]
LandscapeGrid = Annotated[int, typer.Option("--grid", min=3, help="Points along each side of the landscape.")]
MergedModel = Annotated[
    str | None, typer.Option("--merged", metavar="MODEL", help="A merged model to mark in the landscape.")
]
ForgettingPretrained = Annotated[
    str | None,
    typer.Option("--pretrained", metavar="MODEL", help="What INPUT was fine-tuned from. [default: what it records]"),
]
ForgettingBank = Annotated[
    str | None,
    typer.Option("--bank", metavar="BANK", help="Images of that model for ewc. [default: INPUT's, else its data]"),
]
SourceData = Annotated[
    str | None, typer.Option("--source-data", metavar="NAME", help="Its data, as --data. [default: what it records]")
]
OnlyForgetting = Annotated[
    str | None, typer.Option("--only", metavar="LIST", help="Some of chain, ewc, loss. [default: all that fit]")
]
Fractions = Annotated[
    str, typer.Option("--fractions", metavar="LIST", help="Shares x of the steps that are handed over, 0 to 1.")
]
ChainMetric = Annotated[
    str | None,
    typer.Option("--metric", metavar="NAME", help="A metric of evaluate, of images. [default: frechet where it fits]"),
]
ChainSamples = Annotated[int, typer.Option("--samples", min=2, help="Images to generate for each share.")]
ChainPictures = Annotated[int, typer.Option("--pictures", min=1, help="Images of each share that are shown.")]
FisherImages = Annotated[int, typer.Option("--fisher-images", min=1, help="Images whose gradients ewc takes.")]
FisherDraws = Annotated[int, typer.Option("--fisher-draws", min=1, help="Timesteps and noises of each of them.")]
LossImages = Annotated[int, typer.Option("--images", min=1, help="Held-out images of each domain, at most.")]
LossRanges = Annotated[int, typer.Option("--ranges", min=1, help="Equal timestep ranges in which the loss is given.")]

# How it runs
Recipe = Annotated[
    Path | None,
    typer.Option("--recipe", metavar="FILE", callback=_use_recipe, is_eager=True, help="YAML with other defaults."),
]
Workspace = Annotated[
    Path | None,
    typer.Option(
        "--workspace", metavar="DIR", help="Where artifacts lie. [default: $FINECTL_WORKSPACE, else ./artifacts]"
    ),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Make the artifact there; new or empty.")]
Force = Annotated[bool, typer.Option("--force", help="Make it anew even if it is there.")]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Go on with unfinished work, or drop it.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved plan and leave.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the path.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no notes, tables and progress.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print a traceback with an error.")]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    Literal["auto", "float32", "tf32", "bfloat16"],
    typer.Option("--dtype", help="Arithmetic of matrix products. auto: bfloat16 autocast on CUDA, else float32."),
]
Download = Annotated[bool, typer.Option("--download", help="Allow the network: fetch hub ids that are not here yet.")]
Offline = Annotated[bool, typer.Option("--offline", help="Refuse the network, whatever else is said.")]
SaveEvery = Annotated[
    str,
    typer.Option("--save-every", metavar="N|TIME", help="Save the resume state every N updates, or every 10m or 1h."),
]
MaxTime = Annotated[
    str | None,
    typer.Option("--max-time", metavar="TIME", help="Save and exit with 75 after so long, such as 90s, 55m or 3h30m."),
]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Threads that read batches ahead.")]
Accumulate = Annotated[
    int, typer.Option("--accumulate", min=1, help="Compute a process's share of a batch in so many parts.")
]
Compile = Annotated[bool, typer.Option("--compile", help="Let torch.compile make the model's code; slow to start.")]
GradCheckpointing = Annotated[
    bool, typer.Option("--grad-checkpointing", help="Compute activations again in the backward pass to save memory.")
]
Fsdp = Annotated[bool, typer.Option("--fsdp", help="Spread weights and optimiser over the processes of torchrun.")]
Tensorboard = Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard events beside the log.")]
SampleEvery = Annotated[
    int, typer.Option("--sample-every", min=0, help="Draw samples every so many updates into previews/; 0 never.")
]
