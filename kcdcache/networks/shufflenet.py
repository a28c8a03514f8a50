"""ShuffleNet V1 and V2 for small images, in the layout of RepDistiller's checkpoints."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kcdcache.networks.resnet import Trunk, normalised

STEM = 24
BLOCKS, STRIDES = (4, 8, 4), (2, 2, 2)
"""per stage; the first block halves the image"""
GROUPS = 3
"""of V1's 1x1 convolutions"""
WIDTHS_V1 = (240, 480, 960)
"""channels per stage at 3 groups"""
WIDTHS_V2 = (116, 232, 464)
"""channels per stage at width 1"""
LAST_V2 = 1024


def shuffle(features: Float[Tensor, "batch channels h w"], groups: int) -> Float[Tensor, "batch channels h w"]:
    """Return the channels interleaved from `groups` equal parts: the first of each, the second of each, ...

    Source: Zhang et al. 2018, "ShuffleNet", section 3.1.
    """
    return features.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleBlock(nn.Module):
    """Grouped 1x1, depthwise 3x3 and grouped 1x1 convolutions; the input is added, or in a halving block appended.

    Source: Zhang et al. 2018, Figure 2 (b) and (c); the ReLU after the 3x3 convolution as in RepDistiller's
    `models/ShuffleNetv1.py`.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        grown = outputs - inputs if stride == 2 else outputs
        inner = grown // 4
        # the stem has too few channels for groups
        self.groups = 1 if inputs == STEM else GROUPS
        self.conv1, self.bn1 = normalised(inputs, inner, groups=self.groups)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = normalised(inner, inner, 3, stride, groups=inner)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3, self.bn3 = normalised(inner, grown, groups=GROUPS)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None
        # not in place: feature taps read its input
        self.relu3 = nn.ReLU()

    def forward(self, features: Float[Tensor, "batch inputs h w"]) -> Float[Tensor, "batch outputs h2 w2"]:
        """Return the activated sum of both branches, or both concatenated in a halving block."""
        branch = shuffle(self.relu1(self.bn1(self.conv1(features))), self.groups)
        branch = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(branch)))))
        joined = branch + features if self.pool is None else torch.cat([branch, self.pool(features)], 1)
        return self.relu3(joined)


class ShuffleV1(Trunk):
    """ShuffleNet with 3 groups and width 1, whose stem keeps the image's size; three stages halve it.

    Source: Zhang et al. 2018, Table 1; 1x1 stem, names and torch's own initialisation as in RepDistiller's
    `models/ShuffleNetv1.py`.
    """

    def __init__(self, classes: int, channels: int = 3) -> None:
        super().__init__(channels, (STEM, *WIDTHS_V1), ShuffleBlock, BLOCKS, STRIDES, kernel=1)
        self.linear = nn.Linear(WIDTHS_V1[-1], classes)


class SplitBlock(nn.Module):
    """1x1, depthwise 3x3 and 1x1 convolutions of the second half of the channels, shuffled with the first half.

    Source: Ma et al. 2018, "ShuffleNet V2", Figure 3 (c).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = normalised(half, half)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = normalised(half, half, 3, groups=half)
        self.conv3, self.bn3 = normalised(half, half)
        # not in place: feature taps read its input
        self.relu3 = nn.ReLU()

    def forward(self, features: Float[Tensor, "batch width h w"]) -> Float[Tensor, "batch width h w"]:
        """Return both halves, the second convolved and activated, with their channels shuffled."""
        kept, branch = features.chunk(2, dim=1)
        branch = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(branch)))))
        joined = torch.cat([kept, self.bn3(self.conv3(branch))], 1)
        # the kept half is activated already
        return shuffle(self.relu3(joined), 2)


class HalvingBlock(nn.Module):
    """Two branches that halve the image, each with half of the output channels, shuffled.

    Source: Ma et al. 2018, Figure 3 (d).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1, self.bn1 = normalised(inputs, inputs, 3, stride=2, groups=inputs)
        self.conv2, self.bn2 = normalised(inputs, half)
        self.conv3, self.bn3 = normalised(inputs, half)
        self.conv4, self.bn4 = normalised(half, half, 3, stride=2, groups=half)
        self.conv5, self.bn5 = normalised(half, half)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, features: Float[Tensor, "batch inputs h w"]) -> Float[Tensor, "batch outputs h2 w2"]:
        """Return both activated branches, shuffled."""
        left = self.relu(self.bn2(self.conv2(self.bn1(self.conv1(features)))))
        right = self.bn4(self.conv4(self.relu(self.bn3(self.conv3(features)))))
        right = self.relu(self.bn5(self.conv5(right)))
        return shuffle(torch.cat([left, right], 1), 2)


def _block(inputs: int, outputs: int, stride: int) -> nn.Module:
    return HalvingBlock(inputs, outputs) if stride == 2 else SplitBlock(outputs)


class ShuffleV2(Trunk):
    """ShuffleNet V2 of width 1 whose stem keeps the image's size; three stages halve it.

    Source: Ma et al. 2018, Table 5; 1x1 stem, names and torch's own initialisation as in RepDistiller's
    `models/ShuffleNetv2.py`.
    """

    def __init__(self, classes: int, channels: int = 3) -> None:
        super().__init__(channels, (STEM, *WIDTHS_V2), _block, BLOCKS, STRIDES, kernel=1)
        self.conv2, self.bn2 = normalised(WIDTHS_V2[-1], LAST_V2)
        self.linear = nn.Linear(LAST_V2, classes)

    def features(self, pixels: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch width h2 w2"]:
        """Return the map after the last 1x1 convolution."""
        return torch.relu(self.bn2(self.conv2(super().features(pixels))))
