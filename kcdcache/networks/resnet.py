"""The paper's residual and wide residual networks, and parts for other families: trunk, stages, initial weights."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn


def initialise_convolutions(network: nn.Module) -> None:
    """Draw every kernel from a normal distribution of variance 2 / fan_out; set biases to zero.

    fan_out is output channels x kernel area. Source: He et al. 2015, "Delving Deep into Rectifiers", equation 14.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def initialise_classifier(classifier: nn.Linear) -> None:
    """Draw the weights from a normal distribution of standard deviation 0.01; set the biases to zero.

    Source: RepDistiller's `models/vgg.py` and `models/mobilenetv2.py`.
    """
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)


def normalised(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Return a convolution padded to keep the image's size at stride 1, and the batch normalisation after it."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return convolution, nn.BatchNorm2d(outputs)


Block = Callable[[int, int, int], nn.Module]
"""(input channels, output channels, stride) -> block"""


def stage(block: Block, inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    """Return a row of blocks, of which the first has the stride."""
    rest = [block(outputs, outputs, 1) for _ in range(blocks - 1)]  # made first, on which a seed's weights depend
    return nn.Sequential(block(inputs, outputs, stride), *rest)


class Trunk(nn.Module):
    """A stem that keeps the image's size, stages `layer1`, `layer2`, ... with the given strides, and a classifier.

    `widths` are the channels of the stem and of each stage, `blocks` the blocks of each stage.
    """

    head = "linear"
    """name of the classifier"""

    def __init__(
        self, channels: int, widths: Sequence[int], block: Block, blocks: Sequence[int], strides: Sequence[int],
        kernel: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv1, self.bn1 = normalised(channels, widths[0], kernel)
        self.relu = nn.ReLU(inplace=True)
        self.stages = len(blocks)
        for n, (pair, count, stride) in enumerate(zip(pairwise(widths), blocks, strides, strict=True), start=1):
            self.add_module(f"layer{n}", stage(block, *pair, count, stride))
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    def features(self, pixels: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch width h2 w2"]:
        """Return the last stage's map of transformed pixels."""
        features = self.relu(self.bn1(self.conv1(pixels)))
        for n in range(1, self.stages + 1):
            features = self.get_submodule(f"layer{n}")(features)
        return features

    def forward(self, pixels: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of transformed pixels."""
        return self.get_submodule(self.head)(self.avgpool(self.features(pixels)).flatten(1))


def _projection(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(*normalised(inputs, outputs, stride=stride))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside an identity or projected shortcut, activated after the sum.

    Source: He et al. 2016, "Deep Residual Learning", Figure 2.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = normalised(inputs, outputs, 3, stride)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = normalised(outputs, outputs, 3)
        self.downsample = _projection(inputs, outputs, stride)
        # not in place: feature taps read its input
        self.relu2 = nn.ReLU()

    def forward(self, features: Float[Tensor, "batch inputs h w"]) -> Float[Tensor, "batch outputs h2 w2"]:
        """Return the activated sum of both branches."""
        shortcut = features if self.downsample is None else self.downsample(features)
        branch = self.relu1(self.bn1(self.conv1(features)))
        return self.relu2(self.bn2(self.conv2(branch)) + shortcut)


class ResNet(Trunk):
    """A residual network of `depth` = 6n + 2 layers for small images: a stem and three stages of n blocks.

    `widths` are the channels of the stem and the three stages; the last two stages halve the image.
    Source: He et al. 2016, section 4.2; names and initialisation as in RepDistiller's `models/resnet.py`.
    """

    head = "fc"

    def __init__(self, depth: int, widths: tuple[int, int, int, int], classes: int, channels: int = 3) -> None:
        blocks = (depth - 2) // 6
        assert depth == 6 * blocks + 2
        super().__init__(channels, widths, BasicBlock, [blocks] * 3, strides=(1, 2, 2))
        self.fc = nn.Linear(widths[-1], classes)
        initialise_convolutions(self)


EXPANSION = 4
"""output channels of a bottleneck over those of its 3x3 convolution"""


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a widening 1x1 convolution beside an identity or projected shortcut, activated after the sum.

    The 3x3 convolution carries the stride. Source: He et al. 2016, "Deep Residual Learning", Figure 5 right.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = outputs // EXPANSION
        self.conv1, self.bn1 = normalised(inputs, inner)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = normalised(inner, inner, 3, stride)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3, self.bn3 = normalised(inner, outputs)
        self.shortcut = _projection(inputs, outputs, stride) or nn.Sequential()
        # not in place: feature taps read its input
        self.relu3 = nn.ReLU()

    def forward(self, features: Float[Tensor, "batch inputs h w"]) -> Float[Tensor, "batch outputs h2 w2"]:
        """Return the activated sum of both branches."""
        branch = self.relu1(self.bn1(self.conv1(features)))
        branch = self.relu2(self.bn2(self.conv2(branch)))
        return self.relu3(self.bn3(self.conv3(branch)) + self.shortcut(features))


class ResNet50(Trunk):
    """The residual network of 50 layers with a 3x3 stem that keeps the image's size; three stages halve it.

    Source: He et al. 2016, Table 1; stem, names and initialisation as in RepDistiller's `models/resnetv2.py`.
    """

    def __init__(self, classes: int, channels: int = 3) -> None:
        super().__init__(channels, (64, 256, 512, 1024, 2048), Bottleneck, (3, 4, 6, 3), strides=(1, 2, 2, 2))
        self.linear = nn.Linear(2048, classes)
        initialise_convolutions(self)


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


class WideResNet(nn.Module):
    """A wide residual network of `depth` = 6n + 4 layers, with 16, 32 and 64 times `factor` channels per stage.

    Source: Zagoruyko and Komodakis 2016, Table 1; names and initialisation as in RepDistiller's `models/wrn.py`.
    """

    def __init__(self, depth: int, factor: int, classes: int, channels: int = 3) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        assert depth == 6 * blocks + 4
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        narrow, middle, wide = 16 * factor, 32 * factor, 64 * factor
        self.block1 = nn.Sequential(OrderedDict(layer=stage(WideBlock, 16, narrow, blocks, stride=1)))
        self.block2 = nn.Sequential(OrderedDict(layer=stage(WideBlock, narrow, middle, blocks, stride=2)))
        self.block3 = nn.Sequential(OrderedDict(layer=stage(WideBlock, middle, wide, blocks, stride=2)))
        self.bn1 = nn.BatchNorm2d(wide)
        # not in place, as in the blocks
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(wide, classes)
        initialise_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, pixels: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of transformed pixels."""
        features = self.block3(self.block2(self.block1(self.conv1(pixels))))
        return self.fc(self.avgpool(self.relu(self.bn1(features))).flatten(1))
