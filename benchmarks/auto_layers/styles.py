"""The hand-written architectures, and what was found on looking at what is picked of each."""

from __future__ import annotations

from torch import nn

from benchmarks.auto_layers import images, text
from benchmarks.auto_layers.parts import TOKENS, WIDTH, Block, ConvBlock, Entry, on, on_ids

_IDS = (2, TOKENS)
_STREAM = (2, TOKENS, WIDTH)
_PATCHES = (2, TOKENS, 12)
_IMAGES = (4, 3, 16, 16)


def style_entries() -> list[Entry]:
    shared = Block()
    return [
        Entry("nanoGPT: blocks in a ModuleDict", lambda: (text.NanoGPT(), on_ids(_IDS)), 0, "", ""),
        Entry("nanoGPT of one block", lambda: (text.NanoGPT(1), on_ids(_IDS)), 0, "", ""),
        Entry("minGPT: blocks and MLP in ModuleDicts", lambda: (text.MinGPT(), on_ids(_IDS)), 0, "", ""),
        Entry("lecture GPT: a list of heads", lambda: (text.LectureGPT(), on_ids(_IDS)), 0, "", ""),
        Entry("lecture GPT of one block", lambda: (text.LectureGPT(1), on_ids(_IDS)), 0, "", ""),
        Entry("ViT of [attention, MLP] pairs", lambda: (text.PairViT(), on(_PATCHES)), 0, "", ""),
        Entry("ViT of one [attention, MLP] pair", lambda: (text.PairViT(1), on(_PATCHES)), 0, "", ""),
        Entry("MLP-Mixer in sequences", lambda: (text.mixer(), on((2, TOKENS, 3, 4))), 0, "", ""),
        Entry("annotated transformer: clones()", lambda: (text.Annotated(), on_ids(_IDS, _IDS)), 0, "", ""),
        Entry("nn.Transformer", lambda: (nn.Transformer(WIDTH, 2, 2, 2, 32, batch_first=True), on(_STREAM, _STREAM)), 0, "", ""),
        Entry("DiT", lambda: (text.DiT(), on(_PATCHES, (2, 4))), 0, "", ""),
        Entry("MoE transformer", lambda: (text.Stream([text.MoEBlock() for _ in range(3)]), on_ids(_IDS)), 0, "", ""),
        Entry("MoE without attention", lambda: (text.MoEOnly(), on(_STREAM)), 0, "", ""),
        Entry("weights shared by all blocks", lambda: (text.Stream([shared] * 3), on_ids(_IDS)), 0, "", ""),
        Entry("two towers of one class", lambda: (text.Towers(), on(_PATCHES, _PATCHES)), 0, "", ""),
        Entry("LSTM classifier", lambda: (text.Classifier(), on_ids(_IDS)), 0, "", ""),
        Entry("list of LSTMs", lambda: (text.LSTMStack(), on(_STREAM)), 0, "", ""),
        Entry("WaveNet: lists side by side", lambda: (text.WaveNet(), on((2, 4, 32))), 0, "", ""),
        Entry("self.model of a training framework", lambda: (text.Module(text.NanoGPT()), on_ids(_IDS)), 0, "", ""),
        Entry("student and frozen teacher", lambda: (text.Module(text.Tower(3), ema=True), on(_PATCHES)), 0, "", ""),
        Entry("frozen backbone, trained head", lambda: (text.Probe(), on(_STREAM)), 0, "", ""),
        Entry("backbone with one trained block", lambda: (text.Probe(1), on(_STREAM)), 0, "", ""),
        Entry("normalising flow of coupling layers", lambda: (text.flow(), on((4, 8))), 0, "", ""),
        Entry("trunk and a list of heads", lambda: (text.MultiTask(), on((4, 8))), 0, "", ""),
        Entry("actor and critic", lambda: (text.ActorCritic(), on((4, 8))), 0, "", ""),
        Entry("NeRF", lambda: (text.NeRF(), on((4, 3), (4, 3))), 0, "", ""),
        Entry("SIREN", lambda: (text.siren(), on((4, 3))), 0, "", ""),
        Entry("graph convolutions in a list", lambda: (text.GNN(), on((6, 8))), 0, "", ""),
        Entry("one Linear", lambda: (nn.Linear(8, 3), on((4, 8))), 0, "", ""),
        Entry("ResNet: layer1 ... layer4", lambda: (images.ResNet(), on(_IMAGES)), 0, "", ""),
        Entry("ResNet with a block a stage", lambda: (images.ResNet((1, 1, 1)), on(_IMAGES)), 0, "", ""),
        Entry("wide ResNet: stages of a class", lambda: (images.WideResNet(), on(_IMAGES)), 0, "", ""),
        Entry("wide ResNet with a block a stage", lambda: (images.WideResNet(1), on(_IMAGES)), 0, "", ""),
        Entry("stages.N.layers.M.layer.K", lambda: (images.StagedResNet(), on(_IMAGES)), 0, "", ""),
        Entry("stages.N.layers.M.layer.K, one block a stage", lambda: (images.StagedResNet((1, 1)), on(_IMAGES)), 0, "", ""),
        Entry("VGG", lambda: (images.vgg(), on((4, 3, 8, 8))), 0, "", ""),
        Entry("VGG of staged sequences", lambda: (images.staged_vgg(), on((4, 3, 8, 8))), 0, "", ""),
        Entry("MobileNet of sequences", lambda: (images.mobilenet(), on((4, 3, 8, 8))), 0, "", ""),
        Entry("U-Net: down1, up1, ...", lambda: (images.UNet(), on(_IMAGES)), 0, "", ""),
        Entry("diffusion U-Net of nested lists", lambda: (images.DiffusionUNet(), on(_IMAGES)), 0, "", ""),
        Entry("diffusion U-Net of one level", lambda: (images.DiffusionUNet(1), on(_IMAGES)), 0, "", ""),
        Entry("U-Net of modules in modules", lambda: (images.SkipBlock(images.SkipBlock(images.SkipBlock(None))), on((2, 16, 16, 16))), 0, "", ""),
        Entry("GAN generator", lambda: (images.Generator(), on((4, 8, 1, 1))), 0, "", ""),
        Entry("DQN", lambda: (images.DQN(), on(_IMAGES)), 0, "", ""),
        Entry("residual in residual dense blocks", lambda: (images.RRDBNet(), on((2, 3, 8, 8))), 0, "", ""),
        Entry("GoogLeNet: inception3a, ...", lambda: (images.GoogLeNet(), on(_IMAGES)), 0, "", ""),
        Entry("ensemble of ResNets in a list", lambda: (nn.Sequential(*[ConvBlock(3, 3) for _ in range(3)]), on(_IMAGES)), 0, "", ""),
    ]
