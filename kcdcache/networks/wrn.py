"""The wide residual networks of the paper, in the layout of the published CRD checkpoints."""

from collections import OrderedDict

from jaxtyping import Float
from torch import Tensor, nn

from kcdcache.networks.resnet import initialise_convolutions, stage


class WideBlock(nn.Module):
    """Two 3x3 convolutions, each after normalisation and activation, beside an identity or 1x1 shortcut.

    Where the width changes, the shortcut starts from the activated input, else from the raw one.
    Source: Zagoruyko and Komodakis 2016, "Wide Residual Networks", Figure 1.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        # not in place: feature taps read what the normalisation before it gives
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.convShortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, features: Float[Tensor, "batch inputs h w"]) -> Float[Tensor, "batch outputs h2 w2"]:
        """Return the sum of both branches, not activated."""
        active = self.relu1(self.bn1(features))
        shortcut = features if self.convShortcut is None else self.convShortcut(active)
        return shortcut + self.conv2(self.relu2(self.bn2(self.conv1(active))))


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layer=stage(WideBlock, inputs, outputs, blocks, stride)))


class WideResNet(nn.Module):
    """A wide residual network of `depth` = 6n + 4 layers, with 16, 32 and 64 times `factor` channels per stage.

    Source: Zagoruyko and Komodakis 2016, Table 1; names and initialisation as in RepDistiller's `models/wrn.py`.
    """

    def __init__(self, depth: int, factor: int, classes: int, channels: int = 3) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        assert depth == 6 * blocks + 4
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.block1 = _stage(16, 16 * factor, blocks, stride=1)
        self.block2 = _stage(16 * factor, 32 * factor, blocks, stride=2)
        self.block3 = _stage(32 * factor, 64 * factor, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * factor)
        # not in place, as in the blocks
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64 * factor, classes)
        initialise_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, pixels: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of transformed pixels."""
        features = self.block3(self.block2(self.block1(self.conv1(pixels))))
        return self.fc(self.avgpool(self.relu(self.bn1(features))).flatten(1))
