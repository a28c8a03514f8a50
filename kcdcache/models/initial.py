"""The initial weights that several families share."""

from torch import nn


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
