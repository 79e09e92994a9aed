"""The options that only steps of `finectl gen-weights` have, once, with one name and one meaning."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

# prompts
ConceptSet = Annotated[
    str,
    typer.Option(
        "--set", metavar="LIST", help="Concepts, several with commas: demo, art, character, facial, or a .jsonl file."
    ),
]
Combinations = Annotated[
    int,
    typer.Option("--combinations", min=0, help="Concepts to add that join two of different categories; none of demo."),
]
Paraphrases = Annotated[
    str | None,
    typer.Option("--paraphrases", metavar="FILE", help="Other words for the prompts, as lines of JSON."),
]
Paraphraser = Annotated[
    str | None,
    typer.Option("--paraphraser", metavar="PATH|ID", help="A causal language model that writes other words for them."),
]
ParaphraseCount = Annotated[
    int, typer.Option("--paraphrase-count", min=1, help="Paraphrases a concept that --paraphraser writes, at most.")
]

# pairs
Editor = Annotated[
    str,
    typer.Option(
        "--editor",
        metavar="NAME",
        help="builtin, folder:PATH (pairs made elsewhere), ip2p:PATH, sd-img2img:PATH or controlnet:PATH; of several "
        "with commas the best by CLIP score.",
    ),
]
PairsImages = Annotated[
    int | None,
    typer.Option("--images", min=3, help="Source images, at most. [default: 1,000 of the photographs; else all]"),
]
SourceData = Annotated[
    str,
    typer.Option(
        "--data", metavar="NAME", help="What is edited: photos (bundled photographs, cut into crops) or folder:PATH."
    ),
]
PairsSize = Annotated[
    int | None, typer.Option("--image-size", min=8, help="Side of the images. [default: 32; those of folder:PATH]")
]
PairLayout = Annotated[
    Literal["auto", "halves", "folders", "suffixes"],
    typer.Option(
        "--layout", help="Of folder:PATH. halves: one image, A left and B right; folders: A/ and B/; suffixes: _A, _B."
    ),
]
FolderPrompt = Annotated[
    str | None,
    typer.Option("--prompt", metavar="TEXT", help="The prompt of folder:PATH, if it holds one concept without INPUT."),
]
BestOf = Annotated[
    int,
    typer.Option("--best-of", min=1, help="Edits of an image by each editor, of which the best by CLIP score stays."),
]
PairsClip = Annotated[
    str | None, typer.Option("--clip", metavar="PATH|ID", help="CLIP model that chooses between several edits.")
]
EditSteps = Annotated[int, typer.Option("--sampling-steps", min=1, help="Steps of a diffusion editor.")]
EditGuidance = Annotated[float, typer.Option("--guidance", min=0.0, help="Guidance scale of a diffusion editor.")]
ImageGuidance = Annotated[
    float, typer.Option("--image-guidance", min=1.0, help="How closely ip2p keeps to the source image.")
]
EditStrength = Annotated[
    float,
    typer.Option("--strength", min=0.0, max=1.0, help="How far sd-img2img and controlnet leave the source image."),
]
EditedSize = Annotated[
    int | None,
    typer.Option("--edit-size", min=8, help="Side at which a diffusion editor works. [default: that of its network]"),
]
EditedAtOnce = Annotated[int, typer.Option("--batch-size", min=1, help="Images edited at a time.")]

# How a GAN is trained: base, collect and tune
GanSteps = Annotated[
    int | None, typer.Option("--steps", min=1, help="Updates of the generator. [default: depends on its size]")
]
GanEpochs = Annotated[
    int | None, typer.Option("--epochs", min=1, help="Passes over the training pairs, in place of --steps.")
]
GanBatch = Annotated[int | None, typer.Option("--batch-size", min=1, help="Pairs an update. [default: 16]")]
GanLr = Annotated[
    float | None, typer.Option("--lr", min=0.0, help="Learning rate of the generator. [default: depends on its size]")
]
GanLrDiscriminator = Annotated[
    float | None, typer.Option("--lr-discriminator", min=0.0, help="That of the discriminator. [default: 2e-4]")
]
GanL1 = Annotated[
    float,
    typer.Option("--l1", min=0.0, help="Weight of the mean absolute difference; the adversarial term has 1."),
]
GanFrom = Annotated[
    float | None,
    typer.Option(
        "--gan-from",
        min=0.0,
        max=1.0,
        help="Share of the updates after which the discriminator takes part; 1: never. [default: 0; nano 2/3]",
    ),
]
GanEvalEvery = Annotated[
    int | None,
    typer.Option("--eval-every", min=0, help="Measure held-out pairs every so many updates; 0 never. [default: 1/10]"),
]

# base
GanPreset = Annotated[
    Literal["e2gan", "nano", "pix2pix"],
    typer.Option("--preset", help="Size: e2gan 7.06M, nano 0.11M (for a CPU), pix2pix 11.38M without text."),
]
GanNorm = Annotated[
    Literal["instance", "batch"] | None,
    typer.Option("--norm", help="Normalisation of both networks. [default: the preset's]"),
]
GanConcept = Annotated[
    str | None, typer.Option("--concept", metavar="NAME", help="Train on this concept alone, as pix2pix needs it.")
]
GanText = Annotated[
    str | None, typer.Option("--text-encoder", metavar="PATH|ID", help="CLIP's text encoder, or hash. [default: hash]")
]
GanEma = Annotated[
    float, typer.Option("--ema", min=0.0, max=1.0, help="Decay of the generator's averaged weights; 0 for none.")
]

# collect and tune
PairsInput = Annotated[
    str | None, typer.Option("--pairs", metavar="PAIRS", help="The pairs to train on. [default: the newest]")
]
Ranks = Annotated[
    str | None,
    typer.Option("--ranks", metavar="LIST", help="Rank of all layers, and of single modules: 6,stem=4,head=4."),
]
LoraSeed = Annotated[int, typer.Option("--lora-seed", help="Seed of the start that all concepts share.")]
Checkpoints = Annotated[
    int, typer.Option("--checkpoints", min=1, help="Weights kept of each concept, evenly in the last fifth.")
]
Orders = Annotated[
    int,
    typer.Option(
        "--orders", min=1, help="Train each concept in so many orders of the data: what they share is the concept's."
    ),
]
Subset = Annotated[
    int, typer.Option("--subset", min=0, help="Train on so many pairs, one of each k-means cluster; 0: on all.")
]
SubsetClip = Annotated[
    str | None,
    typer.Option(
        "--subset-clip", metavar="PATH|ID", help="CLIP model by whose features --subset chooses. [default: pixels]"
    ),
]
Roles = Annotated[
    str, typer.Option("--roles", metavar="LIST", help="Roles of the concepts to train: base, train, val, test, unseen.")
]
OnlyConcept = Annotated[str | None, typer.Option("--only", metavar="CONCEPT", help="Train this concept alone.")]
Shard = Annotated[
    str | None,
    typer.Option("--shard", metavar="I/N", help="Train every N-th concept; without it, all parts are put together."),
]
CollectTarget = Annotated[
    Literal["lora", "sigma"],
    typer.Option("--target", help="lora: low-rank weights of a GAN, for concepts; sigma: of a LEARNGENE, for tasks."),
]
SigmaTasks = Annotated[
    int, typer.Option("--tasks", min=1, help="Of --target sigma: tasks, each of some classes of the data set.")
]
TaskClasses = Annotated[int, typer.Option("--task-classes", min=1, help="Of --target sigma: classes a task, at most.")]
SigmaDepths = Annotated[
    str, typer.Option("--depths", metavar="LIST", help="Of --target sigma: depths of the models of each task.")
]
SigmaData = Annotated[
    str | None,
    typer.Option("--data", metavar="NAME", help="Of --target sigma: a data set with classes. [default: INPUT's]"),
]
AdaptEvalEvery = Annotated[
    int | None,
    typer.Option("--eval-every", min=0, help="Measure held-out pairs every so many updates. [default: 1/10; 0 never]"),
]
ConceptWorkers = Annotated[
    int, typer.Option("--workers", min=0, help="Concepts at a time, a process and a thread each; 0: one for each core.")
]

# train
GeneratorSize = Annotated[
    Literal["tiny", "small", "base", "paper"],
    typer.Option("--size", help="Of the network: about 1, 5, 36 and 97 million parameters."),
]
PackingRule = Annotated[
    int,
    typer.Option("--rule", min=1, max=3, help="1: a layer's tensors in turn; 2: interleaved by rank; 3: each apart."),
]
BlockSize = Annotated[int, typer.Option("--block-size", min=4, help="Weights a block.")]
WeightBasis = Annotated[
    str, typer.Option("--basis", metavar="NAME", help="none, or pcaN: generate N principal coefficients of each block.")
]
WeightPrediction = Annotated[
    Literal["epsilon", "v", "x0"], typer.Option("--prediction", help="What the network predicts.")
]
BetaSchedule = Annotated[
    Literal["linear", "scaled_linear", "squaredcos_cap_v2"],
    typer.Option("--beta-schedule", help="The noise schedule of 1,000 timesteps."),
]
BlockLoss = Annotated[
    Literal["prediction", "decoded"],
    typer.Option("--loss", help="Squared error of the prediction, or of the weights that it stands for."),
]
ImageWeight = Annotated[
    float,
    typer.Option("--image-weight", min=0.0, help="What the images that generated weights make count in the loss."),
]
ImageConcepts = Annotated[
    int, typer.Option("--image-concepts", min=1, help="Concepts an update whose images are made, with 16 pairs each.")
]
IndexEmbed = Annotated[
    Literal["sin", "sin+table"], typer.Option("--index-embed", help="How the network is told which block it sees.")
]
PosEmbed = Annotated[
    Literal["none", "learned"], typer.Option("--pos-embed", help="learned: a table of each block's positions, too.")
]
TextInput = Annotated[
    Literal["tokens", "tokens+pooled"],
    typer.Option("--text-input", help="Cross-attention to the words; pooled: their mean joins the time, too."),
]
LinearRank = Annotated[
    int, typer.Option("--linear-rank", min=0, help="Rank of a linear path from the text to each block; 0: none.")
]
LinearStart = Annotated[
    Literal["zero", "ridge"] | None,
    typer.Option(
        "--linear-start",
        help="zero: that path is learned; ridge: it is a regression, the rest is learned. [default: ridge]",
    ),
]
FirstTimestep = Annotated[int, typer.Option("--t-min", min=0, max=999, help="First timestep of training.")]
EndTimestep = Annotated[int, typer.Option("--t-max", min=1, max=1000, help="One past the last timestep of training.")]
TStar = Annotated[
    int | None,
    typer.Option("--t-star", min=0, max=999, help="Timestep of the one step. [default: best on validation concepts]"),
]
SelectWeights = Annotated[
    Literal["best", "last"],
    typer.Option("--select", help="Averaged weights that are kept: best on validation concepts, or the last."),
]
GeneratorText = Annotated[
    str | None,
    typer.Option("--text-encoder", metavar="PATH|ID", help="CLIP's, or hash. [default: that of the weights' GAN]"),
]
GeneratorSteps = Annotated[int, typer.Option("--steps", min=1, help="Optimiser updates.")]
GeneratorBatch = Annotated[int, typer.Option("--batch-size", min=1, help="Blocks a step, over all processes.")]
GeneratorLr = Annotated[float, typer.Option("--lr", min=0.0, help="AdamW's rate; the paper's is 1e-5.")]
GeneratorWarmup = Annotated[int, typer.Option("--warmup-steps", min=0, help="Updates over which --lr is reached.")]
GeneratorClip = Annotated[float, typer.Option("--clip-grad", min=0.0, help="Largest norm of all gradients; 0: any.")]
GeneratorEma = Annotated[float, typer.Option("--ema", min=0.0, max=1.0, help="Largest decay of the EMA.")]
GeneratorEval = Annotated[
    int | None,
    typer.Option(
        "--eval-every", min=1, help="1 - R^2 on validation concepts every so many updates. [default: 1/10 of --steps]"
    ),
]

# predict
WantedPrompt = Annotated[str, typer.Argument(metavar="PROMPT", help="What the weights are for, in words.")]
PredictionStep = Annotated[
    int | None, typer.Option("--t-star", min=0, max=999, help="Timestep to denoise from. [default: the generator's]")
]
PredictionSteps = Annotated[int, typer.Option("--steps", min=1, help="Denoising steps; several are those of DDIM.")]
PredictionDraws = Annotated[int, typer.Option("--draws", min=1, help="Noises over which the weights are averaged.")]
PredictionBatch = Annotated[int, typer.Option("--batch-size", min=0, help="Blocks at a time; 0: all at once.")]
PredictionText = Annotated[
    str | None, typer.Option("--text-encoder", metavar="PATH|ID", help="Where it is now. [default: the generator's]")
]
ExportLayout = Annotated[
    Literal["peft", "diffusers", "kohya"] | None,
    typer.Option("--export", help="Write the adapters in another tool's layout, too."),
]
BaseInput = Annotated[
    str | None, typer.Option("--base", metavar="GAN", help="The base that the weights belong to. [default: the newest]")
]
# tune
TunedConcept = Annotated[
    str | None,
    typer.Option("--concept", metavar="NAME", help="What to tune to. [default: the concept of INPUT's prompt]"),
]
TuneStart = Annotated[
    Literal["prediction", "lora", "e2gan", "mean", "nearest", "ridge", "noised", "oracle"],
    typer.Option("--start", help="prediction: INPUT is what predict made; the others come from a collection."),
]

# report
Collection = Annotated[
    str | None,
    typer.Option("--collection", metavar="INPUT", help="The low-rank weights. [default: those of INPUT]"),
]
ReportBase = Annotated[
    str | None, typer.Option("--base", metavar="GAN", help="The base GAN. [default: that of the weights]")
]
ReportPairs = Annotated[
    str | None,
    typer.Option("--pairs", metavar="PAIRS", help="The pairs to train on. [default: those of the weights]"),
]
ReportBatch = Annotated[int, typer.Option("--batch-size", min=1, help="Pairs an update.")]
ReportLr = Annotated[float, typer.Option("--lr", min=0.0, help="Rate of the adapters; it falls to 0 from halfway on.")]
ReportLrDiscriminator = Annotated[
    float, typer.Option("--lr-discriminator", min=0.0, help="Learning rate of the discriminator.")
]
ReportGanFrom = Annotated[
    float,
    typer.Option(
        "--gan-from", min=0.0, max=1.0, help="Share of the updates after which the discriminator takes part; 1: never."
    ),
]
ReportConcepts = Annotated[
    str, typer.Option("--concepts", metavar="LIST", help="Held-out concepts: roles (val, test, unseen) and names.")
]
ReportStarts = Annotated[
    str,
    typer.Option(
        "--starts",
        metavar="LIST",
        help="all, or some of lora, e2gan, mean, nearest, noised, ridge, prediction, shuffled, oracle.",
    ),
]
ReportAt = Annotated[
    str, typer.Option("--at", metavar="LIST", help="Updates after which every run is measured; the last one ends it.")
]
ReportSeeds = Annotated[int, typer.Option("--seeds", min=1, help="Runs of each concept and start, from --seed on.")]
ReportPix2pix = Annotated[
    int,
    typer.Option("--pix2pix", min=0, help="Train pix2pix of 9 residual blocks from scratch, too: so many updates."),
]
OracleSteps = Annotated[
    int | None,
    typer.Option("--oracle-steps", min=5, help="Updates of the concepts' own weights. [default: the collection's]"),
]
ReportPictures = Annotated[int, typer.Option("--pictures", min=0, help="Test images of each concept that are drawn.")]
ReportInception = Annotated[
    str | None,
    typer.Option("--inception", metavar="FILE", help="Inception's weights, for FID. [default: the cache's, if any]"),
]
RunWorkers = Annotated[
    int, typer.Option("--workers", min=0, help="Runs at a time, a process and a thread each; 0: one for each core.")
]
