"""The CIFAR residual networks of the paper, in the layout of the published CRD checkpoints."""

from jaxtyping import Float
from torch import Tensor, nn

from kcdcache.models.initial import initialise_convolutions


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside an identity or projected shortcut, activated after the sum.

    Source: He et al. 2016, "Deep Residual Learning", Figure 2.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = _projection(inputs, outputs, stride)
        # not in place: feature taps read what goes into it
        self.relu2 = nn.ReLU()

    def forward(self, features: Float[Tensor, "batch inputs h w"]) -> Float[Tensor, "batch outputs h2 w2"]:
        """Return the activated sum of both branches."""
        shortcut = features if self.downsample is None else self.downsample(features)
        branch = self.relu1(self.bn1(self.conv1(features)))
        return self.relu2(self.bn2(self.conv2(branch)) + shortcut)


class ResNet(nn.Module):
    """A residual network of `depth` = 6n + 2 layers for small images: a stem and three stages of n blocks.

    `widths` are the channels of the stem and the three stages; the last two stages halve the image, whose side is free.
    Source: He et al. 2016, section 4.2; names and initialisation as in RepDistiller's `models/resnet.py`.
    """

    def __init__(self, depth: int, widths: tuple[int, int, int, int], classes: int, channels: int = 3) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        assert depth == 6 * blocks + 2
        stem, first, second, third = widths
        self.conv1 = nn.Conv2d(channels, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(stem, first, blocks, stride=1)
        self.layer2 = _stage(first, second, blocks, stride=2)
        self.layer3 = _stage(second, third, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(third, classes)
        initialise_convolutions(self)

    def forward(self, pixels: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of transformed pixels."""
        features = self.relu(self.bn1(self.conv1(pixels)))
        features = self.layer3(self.layer2(self.layer1(features)))
        return self.fc(self.avgpool(features).flatten(1))


def _projection(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    rest = [BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(inputs, outputs, stride), *rest)
