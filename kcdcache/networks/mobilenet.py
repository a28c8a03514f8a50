"""MobileNetV2 at half width for small images, in the layout of RepDistiller's checkpoints."""

from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

from kcdcache.networks.resnet import initialise_classifier, initialise_convolutions, normalised, stage

STEM = 16
STAGES = ((1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1))
"""expansion, channels, blocks, and stride of the first block, per stage; the channels are half of Table 2's"""
LAST = 1280
"""channels before the classifier, the same for widths below 1"""


class InvertedResidual(nn.Module):
    """A widening 1x1, a depthwise 3x3 and a narrowing 1x1 convolution without final activation.

    The input is added if it has the output's shape. Source: Sandler et al. 2018, Figure 4 (d).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *normalised(inputs, inner),
            nn.ReLU(inplace=True),
            *normalised(inner, inner, 3, stride, groups=inner),
            nn.ReLU(inplace=True),
            *normalised(inner, outputs),
        )

    def forward(self, features: Float[Tensor, "batch inputs h w"]) -> Float[Tensor, "batch outputs h2 w2"]:
        """Return the convolutions' output, plus the input if it has that shape."""
        return features + self.conv(features) if self.residual else self.conv(features)


class MobileNetV2(nn.Module):
    """Inverted residual blocks between a 3x3 stem and a 1x1 convolution, which divide the image's side by 16.

    Source: Sandler et al. 2018, "MobileNetV2", Table 2 at width 0.5; names, initialisation, ReLU in place of ReLU6 and
    stride 1 in the second stage as in RepDistiller's `models/mobilenetv2.py`.
    """

    def __init__(self, classes: int, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(*normalised(channels, STEM, 3, stride=2), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential()
        width = STEM
        for expansion, outputs, blocks, stride in STAGES:
            self.blocks.append(stage(partial(InvertedResidual, expansion=expansion), width, outputs, blocks, stride))
            width = outputs
        self.conv2 = nn.Sequential(*normalised(width, LAST), nn.ReLU(inplace=True))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        classifier = nn.Linear(LAST, classes)
        self.classifier = nn.Sequential(classifier)
        initialise_convolutions(self)
        initialise_classifier(classifier)

    def forward(self, pixels: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of transformed pixels."""
        features = self.conv2(self.blocks(self.conv1(pixels)))
        return self.classifier(self.avgpool(features).flatten(1))
