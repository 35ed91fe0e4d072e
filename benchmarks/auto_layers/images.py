"""Architectures in the styles of public scripts: convolutions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.auto_layers.parts import WIDTH, Attention, ConvBlock, DoubleConv, double_conv


class ResNet(nn.Module):
    """Sequences of blocks in numbered attributes."""

    def __init__(self, depths: tuple[int, ...] = (2, 2, 1, 1)) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)
        for number, depth in enumerate(depths, 1):
            setattr(self, f"layer{number}", nn.Sequential(*[ConvBlock(WIDTH, WIDTH) for _ in range(depth)]))
        self.stages = len(depths)
        self.fc = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for number in range(1, self.stages + 1):
            x = getattr(self, f"layer{number}")(x)
        return self.fc(x.mean(dim=(2, 3)))


class NetworkBlock(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(*[ConvBlock(WIDTH, WIDTH) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """Stages of a class of their own, in numbered attributes."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.block1, self.block2, self.block3 = (NetworkBlock(depth) for _ in range(3))
        self.fc = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(x.mean(dim=(2, 3)))


class ConvUnit(nn.Module):
    """A convolution with what follows it."""

    def __init__(self, inner: int, outer: int, size: int = 3) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inner, outer, size, padding=size // 2)
        self.normalization, self.activation = nn.BatchNorm2d(outer), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.normalization(self.convolution(x)))


class UnitBlock(nn.Module):
    """A residual block of a sequence of units."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Identity()
        self.layer = nn.Sequential(ConvUnit(WIDTH, 4, 1), ConvUnit(4, 4), ConvUnit(4, WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.shortcut(x)


class UnitStage(nn.Module):
    def __init__(self, depth: int, down: bool) -> None:
        super().__init__()
        self.downsample = nn.Conv2d(WIDTH, WIDTH, 2, stride=2) if down else nn.Identity()
        self.layers = nn.Sequential(*[UnitBlock() for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.downsample(x))


class UnitEncoder(nn.Module):
    def __init__(self, depths: tuple[int, ...]) -> None:
        super().__init__()
        self.stages = nn.ModuleList([UnitStage(depth, i > 0) for i, depth in enumerate(depths)])

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


class StagedResNet(nn.Module):
    """Lists in lists: encoder.stages.N.layers.M.layer.K."""

    def __init__(self, depths: tuple[int, ...] = (2, 2)) -> None:
        super().__init__()
        self.embedder, self.encoder = ConvUnit(3, WIDTH), UnitEncoder(depths)
        self.classifier = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.encoder(self.embedder(x)).mean(dim=(2, 3)))


def vgg() -> nn.Module:
    features = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    )
    return nn.Sequential(features, nn.Flatten(), nn.Sequential(nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 3)))


def staged_vgg() -> nn.Module:
    """A sequence of sequences of operations."""
    stages = [nn.Sequential(double_conv(inner, 8), nn.MaxPool2d(2)) for inner in (3, 8)]
    return nn.Sequential(*stages, nn.Flatten(), nn.Linear(32, 3))


def mobilenet() -> nn.Module:
    def depthwise() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        )

    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(nn.Sequential(stem, depthwise(), depthwise(), depthwise()), nn.Flatten(), nn.LazyLinear(3))


class Down(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(inner, outer))

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool_conv(x)


class Up(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.up, self.conv = nn.ConvTranspose2d(inner, outer, 2, stride=2), DoubleConv(2 * outer, outer)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv(torch.cat([skip, self.up(x)], dim=1))


class UNet(nn.Module):
    """Down and up in numbered attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.inc, self.down1, self.down2 = DoubleConv(3, 4), Down(4, 8), Down(8, 16)
        self.up1, self.up2, self.outc = Up(16, 8), Up(8, 4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.inc(x)
        b = self.down1(a)
        return self.outc(self.up2(self.up1(self.down2(b), b), a))


class DiffusionUNet(nn.Module):
    """Nested lists of [block, block, attention, resampling], and two blocks in the middle."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.init_conv = nn.Conv2d(3, WIDTH, 3, padding=1)

        def level(resample: nn.Module) -> nn.ModuleList:
            return nn.ModuleList([ConvBlock(WIDTH, WIDTH), ConvBlock(WIDTH, WIDTH), ImageAttention(), resample])

        self.downs = nn.ModuleList([level(nn.Conv2d(WIDTH, WIDTH, 2, stride=2)) for _ in range(depth)])
        self.mid_block1, self.mid_attn, self.mid_block2 = (
            ConvBlock(WIDTH, WIDTH),
            ImageAttention(),
            ConvBlock(WIDTH, WIDTH),
        )
        self.ups = nn.ModuleList([level(nn.ConvTranspose2d(WIDTH, WIDTH, 2, stride=2)) for _ in range(depth)])
        self.final_conv = nn.Conv2d(WIDTH, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.init_conv(x)
        kept = []
        downs: Any = self.downs
        ups: Any = self.ups
        for first, second, attention, resample in downs:
            x = attention(second(first(x)))
            kept.append(x)
            x = resample(x)
        x = self.mid_block2(self.mid_attn(self.mid_block1(x)))
        for first, second, attention, resample in ups:
            x = attention(second(first(resample(x) + kept.pop())))
        return self.final_conv(x)


class ImageAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x.flatten(2).transpose(1, 2))
        return x + y.transpose(1, 2).reshape(x.shape)


class Generator(nn.Module):
    """One sequence of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(8, WIDTH, 4, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
            nn.ConvTranspose2d(WIDTH, 8, 4, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 3, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)


class DQN(nn.Module):
    """Numbered operations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 2), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.head(x.mean(dim=(2, 3)))


class DenseBlock(nn.Module):
    """Dense layers in a block in a trunk: residuals at two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(WIDTH * i, WIDTH, 3, padding=1) for i in (1, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.conv1(x))
        b = F.relu(self.conv2(torch.cat([x, a], dim=1)))
        return x + 0.2 * self.conv3(torch.cat([x, a, b], dim=1))


class RRDB(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = DenseBlock(), DenseBlock(), DenseBlock()

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.2 * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_first, self.conv_last = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 3, 3, padding=1)
        self.body = nn.Sequential(*[RRDB() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_last(self.body(self.conv_first(x)))


class SkipBlock(nn.Module):
    """A U-Net of nested modules: each holds the next deeper one."""

    def __init__(self, deeper: nn.Module | None) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 4, 2, 1),
            *([deeper] if deeper is not None else []),
            nn.ReLU(),
            nn.ConvTranspose2d(WIDTH * (1 if deeper is None else 2), WIDTH, 4, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.model(x)], dim=1)


class Inception(nn.Module):
    def __init__(self, inner: int) -> None:
        super().__init__()
        self.branch1 = ConvUnit(inner, 8, 1)
        self.branch2 = nn.Sequential(ConvUnit(inner, 4, 1), ConvUnit(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x)], dim=1)


class GoogLeNet(nn.Module):
    """Blocks in attributes with a number and a letter, with branches inside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvUnit(3, 8), ConvUnit(8, WIDTH)
        self.inception3a, self.inception3b, self.inception4a = Inception(16), Inception(16), Inception(16)
        self.fc = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inception4a(self.inception3b(self.inception3a(self.conv2(self.conv1(x)))))
        return self.fc(x.mean(dim=(2, 3)))
