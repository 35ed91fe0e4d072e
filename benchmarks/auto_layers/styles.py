"""Hand-written architectures, with an assessment of the layers selected on each."""

from __future__ import annotations

from torch import nn

from benchmarks.auto_layers import images, small, text
from benchmarks.auto_layers.parts import TOKENS, WIDTH, Block, ConvBlock, Entry, on, on_ids

_IDS = (2, TOKENS)
_STREAM = (2, TOKENS, WIDTH)
_PATCHES = (2, TOKENS, 12)
_IMAGES = (4, 3, 16, 16)


def style_entries() -> list[Entry]:
    shared = Block()
    return [
        Entry(
            "nanoGPT: blocks in a ModuleDict",
            lambda: (text.NanoGPT(), on_ids(_IDS)),
            3,
            "transformer.h.0",
            "transformer.h.2",
        ),
        Entry("nanoGPT of one block", lambda: (text.NanoGPT(1), on_ids(_IDS)), 1, "transformer.h.0", "transformer.h.0"),
        Entry(
            "minGPT: blocks and MLP in ModuleDicts",
            lambda: (text.MinGPT(), on_ids(_IDS)),
            3,
            "transformer.h.0",
            "transformer.h.2",
        ),
        Entry("lecture GPT: a list of heads", lambda: (text.LectureGPT(), on_ids(_IDS)), 3, "blocks.0", "blocks.2"),
        Entry("lecture GPT of one block", lambda: (text.LectureGPT(1), on_ids(_IDS)), 1, "blocks.0", "blocks.0"),
        Entry(
            "ViT of [attention, MLP] pairs",
            lambda: (text.PairViT(), on(_PATCHES)),
            6,
            "transformer.layers.0.0",
            "transformer.layers.2.1",
            "right: no module outputs the residual stream; these are its branches",
        ),
        Entry(
            "ViT of one [attention, MLP] pair",
            lambda: (text.PairViT(1), on(_PATCHES)),
            2,
            "transformer.layers.0.0",
            "transformer.layers.0.1",
            "right: no module outputs the residual stream; these are its branches",
        ),
        Entry("MLP-Mixer in sequences", lambda: (text.mixer(), on((2, TOKENS, 3, 4))), 6, "2.0", "4.1"),
        Entry(
            "annotated transformer: clones()",
            lambda: (text.Annotated(), on_ids(_IDS, _IDS)),
            4,
            "encoder.layers.0",
            "decoder.layers.1",
        ),
        Entry(
            "nn.Transformer",
            lambda: (nn.Transformer(WIDTH, 2, 2, 2, 32, batch_first=True), on(_STREAM, _STREAM)),
            4,
            "encoder.layers.0",
            "decoder.layers.1",
        ),
        Entry("DiT", lambda: (text.DiT(), on(_PATCHES, (2, 4))), 3, "blocks.0", "blocks.2"),
        Entry(
            "MoE transformer",
            lambda: (text.Stream([text.MoEBlock() for _ in range(3)]), on_ids(_IDS)),
            3,
            "blocks.0",
            "blocks.2",
        ),
        Entry(
            "MoE without attention",
            lambda: (text.MoEOnly(), on(_STREAM)),
            3,
            "layers.0",
            "layers.2",
            "right: the experts run in parallel",
        ),
        Entry(
            "weights shared by all blocks",
            lambda: (text.Stream([shared] * 3), on_ids(_IDS)),
            1,
            "blocks.0",
            "blocks.0",
            "right: one layer that runs several times",
        ),
        Entry(
            "two towers of one class",
            lambda: (text.Towers(), on(_PATCHES, _PATCHES)),
            5,
            "visual.resblocks.0",
            "text.resblocks.1",
        ),
        Entry("LSTM classifier", lambda: (small.Classifier(), on_ids(_IDS)), 3, "embedding", "fc"),
        Entry("list of LSTMs", lambda: (small.LSTMStack(), on(_STREAM)), 3, "layers.0", "layers.2"),
        Entry(
            "WaveNet: lists side by side",
            lambda: (small.WaveNet(), on((2, 4, 32))),
            12,
            "filter_convs.0",
            "skip_convs.2",
            "right: no module outputs the residual stream; the last residual convolution is not used",
        ),
        Entry(
            "self.model of a training framework",
            lambda: (small.Module(text.NanoGPT()), on_ids(_IDS)),
            3,
            "model.transformer.h.0",
            "model.transformer.h.2",
        ),
        Entry(
            "student and frozen teacher",
            lambda: (small.Module(text.Tower(3), ema=True), on(_PATCHES)),
            3,
            "model.resblocks.0",
            "model.resblocks.2",
            "right: only trained modules",
        ),
        Entry(
            "frozen backbone, trained head",
            lambda: (small.Probe(), on(_STREAM)),
            3,
            "head.0",
            "head.3",
            "right: only trained modules",
        ),
        Entry(
            "backbone with one trained block",
            lambda: (small.Probe(1), on(_STREAM)),
            1,
            "backbone.0",
            "backbone.0",
            "right: only trained modules",
        ),
        Entry("normalizing flow of coupling layers", lambda: (small.flow(), on((4, 8))), 3, "0", "2"),
        Entry(
            "trunk and a list of heads",
            lambda: (small.MultiTask(), on((4, 8))),
            8,
            "trunk.0",
            "heads.2.net.2",
            "right: only heads are repeated, so all modules with parameters",
        ),
        Entry("actor and critic", lambda: (small.ActorCritic(), on((4, 8))), 6, "actor.0", "critic.4"),
        Entry("NeRF", lambda: (small.NeRF(), on((4, 3), (4, 3))), 5, "pts_linears.0", "pts_linears.4"),
        Entry("SIREN", lambda: (small.siren(), on((4, 3))), 4, "0", "3"),
        Entry("graph convolutions in a list", lambda: (small.GNN(), on((6, 8))), 3, "convs.0", "convs.2"),
        Entry("one Linear", lambda: (nn.Linear(8, 3), on((4, 8))), 1, "Linear", "Linear", "right: the model itself"),
        Entry("ResNet: layer1 ... layer4", lambda: (images.ResNet(), on(_IMAGES)), 6, "layer1.0", "layer4.0"),
        Entry(
            "ResNet with a block a stage", lambda: (images.ResNet((1, 1, 1)), on(_IMAGES)), 3, "layer1.0", "layer3.0"
        ),
        Entry(
            "wide ResNet: stages of a class",
            lambda: (images.WideResNet(), on(_IMAGES)),
            6,
            "block1.layer.0",
            "block3.layer.1",
        ),
        Entry(
            "wide ResNet with a block a stage",
            lambda: (images.WideResNet(1), on(_IMAGES)),
            3,
            "block1.layer.0",
            "block3.layer.0",
        ),
        Entry(
            "stages.N.layers.M.layer.K",
            lambda: (images.StagedResNet(), on(_IMAGES)),
            4,
            "encoder.stages.0.layers.0",
            "encoder.stages.1.layers.1",
        ),
        Entry(
            "stages.N.layers.M.layer.K, one block a stage",
            lambda: (images.StagedResNet((1, 1)), on(_IMAGES)),
            2,
            "encoder.stages.0.layers.0",
            "encoder.stages.1.layers.0",
        ),
        Entry("VGG", lambda: (images.vgg(), on((4, 3, 8, 8))), 4, "0.0", "2.2"),
        Entry("VGG of staged sequences", lambda: (images.staged_vgg(), on((4, 3, 8, 8))), 2, "0.0", "1.0"),
        Entry("MobileNet of sequences", lambda: (images.mobilenet(), on((4, 3, 8, 8))), 4, "0.0", "0.3"),
        Entry(
            "U-Net: down1, up1, ...",
            lambda: (images.UNet(), on(_IMAGES)),
            4,
            "down1",
            "up2",
            "right, without the first block, the only one of its class",
        ),
        Entry(
            "diffusion U-Net of nested lists",
            lambda: (images.DiffusionUNet(), on(_IMAGES)),
            18,
            "downs.0.0",
            "ups.1.3",
            "right, without the attention in the middle",
        ),
        Entry(
            "diffusion U-Net of one level",
            lambda: (images.DiffusionUNet(1), on(_IMAGES)),
            10,
            "downs.0.0",
            "ups.0.3",
            "right, without the attention in the middle",
        ),
        Entry(
            "U-Net of modules in modules",
            lambda: (images.SkipBlock(images.SkipBlock(images.SkipBlock(None))), on((2, 16, 16, 16))),
            6,
            "model.0",
            "model.3",
            "right: all convolutions, because each block contains the next",
        ),
        Entry("GAN generator", lambda: (images.Generator(), on((4, 8, 1, 1))), 5, "main.0", "main.6"),
        Entry("DQN", lambda: (images.DQN(), on(_IMAGES)), 5, "conv1", "head"),
        Entry("residual in residual dense blocks", lambda: (images.RRDBNet(), on((2, 3, 8, 8))), 3, "body.0", "body.2"),
        Entry(
            "GoogLeNet: inception3a, ...", lambda: (images.GoogLeNet(), on(_IMAGES)), 3, "inception3a", "inception4a"
        ),
        Entry(
            "residual blocks in one sequence",
            lambda: (nn.Sequential(*[ConvBlock(3, 3) for _ in range(3)]), on(_IMAGES)),
            3,
            "0",
            "2",
        ),
    ]
