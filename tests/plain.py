"""The methods on maps and relations again, in plain float64 arithmetic: one number or one kernel position at a time.

Each reference takes the term, whose weights it uses, and the student's and the teacher's values by name.
"""

import math
from itertools import pairwise

import numpy as np
import torch


def plain(values):
    return values.detach().numpy().astype(np.float64)


def convolved(x, layer):
    """A convolution by its definition, for any stride and padding."""
    w, stride, pad = plain(layer.weight), layer.stride[0], layer.padding[0]
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    kh, kw = w.shape[2:]
    height, width = (x.shape[2] - kh) // stride + 1, (x.shape[3] - kw) // stride + 1
    out = np.zeros((len(x), len(w), height, width))
    for i in range(height):
        for j in range(width):
            patch = x[:, :, i * stride : i * stride + kh, j * stride : j * stride + kw]
            out[:, :, i, j] = np.einsum("bcuv,ocuv->bo", patch, w)
    return out if layer.bias is None else out + plain(layer.bias)[:, None, None]


def spread(x, layer):
    """A transposed convolution: every input position adds its kernel to the output, whose border is cut off."""
    w, stride, pad = plain(layer.weight), layer.stride[0], layer.padding[0]
    side = (x.shape[2] - 1) * stride + w.shape[2]
    out = np.zeros((len(x), w.shape[1], side, side))
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            added = np.einsum("bc,couv->bouv", x[:, :, i, j], w)
            out[:, :, i * stride : i * stride + w.shape[2], j * stride : j * stride + w.shape[3]] += added
    return out[:, :, pad:-pad, pad:-pad] + plain(layer.bias)[:, None, None]


def normalised(x, norm):
    mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    scale, shift = (plain(p)[:, None, None] for p in (norm.weight, norm.bias))
    return (x - mean) / np.sqrt(variance + 1e-5) * scale + shift


def pooled(x, side):
    """The average over windows from floor(i h / H) to ceil((i + 1) h / H)."""
    out = np.zeros((*x.shape[:2], *side))
    (h, w), (height, width) = x.shape[2:], side
    for i in range(height):
        for j in range(width):
            rows = slice(i * h // height, -(-(i + 1) * h // height))
            columns = slice(j * w // width, -(-(j + 1) * w // width))
            out[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
    return out


def nearest(x, side):
    out = np.zeros((*x.shape[:2], side, side))
    for i in range(side):
        for j in range(side):
            out[:, :, i, j] = x[:, :, i * x.shape[2] // side, j * x.shape[3] // side]
    return out


def relu(x):
    return np.maximum(x, 0)


def mean_square(x):
    return (x**2).reshape(len(x), -1).mean(1)


def huber(x):
    return np.where(abs(x) < 1, x**2 / 2, abs(x) - 0.5)


def plain_fitnet(term, ours, theirs):
    layer, norm, _ = term.regressor
    apply = spread if isinstance(layer, torch.nn.ConvTranspose2d) else convolved
    return mean_square(relu(normalised(apply(ours["stage2"], layer), norm)) - theirs["maps:stage2"])


def plain_sp(term, ours, theirs):
    grams = []
    for values in (ours["stage3"], theirs["maps:stage3"]):
        flat = values.reshape(len(values), -1)
        gram = np.array([[sum(a * b) for b in flat] for a in flat])
        grams.append(np.array([row / math.sqrt(sum(row**2)) for row in gram]))
    return ((grams[0] - grams[1]) ** 2).sum(1) / len(grams[0])


def plain_vid(term, ours, theirs):
    total = 0
    for tap, module, raw in zip(("stage1", "stage2", "stage3"), term.means, term.raw_variances, strict=True):
        own, target = ours[tap], theirs[f"maps:{tap}"]
        side = tuple(min(sizes) for sizes in zip(own.shape[2:], target.shape[2:], strict=True))
        own, target = pooled(own, side), pooled(target, side)
        mean = convolved(relu(convolved(relu(convolved(own, module[0])), module[2])), module[4])
        variance = (np.log1p(np.exp(plain(raw))) + 1e-5)[:, None, None]
        entries = ((mean - target) ** 2 / variance + np.log(variance)) / 2
        total += entries.reshape(len(own), -1).mean(1)
    return total


def plain_fsp(term, ours, theirs):
    total = 0
    stages = ("stage0", "stage1", "stage2", "stage3")
    for bottom, top in pairwise(stages):
        side = tuple(min(sizes) for sizes in zip(ours[bottom].shape[2:], ours[top].shape[2:], strict=True))
        low, high = pooled(ours[bottom], side), pooled(ours[top], side)
        gram = np.zeros((len(low), low.shape[1], high.shape[1]))
        for i in range(low.shape[1]):
            for j in range(high.shape[1]):
                gram[:, i, j] = (low[:, i] * high[:, j]).mean((1, 2))
        total += mean_square(gram - theirs[f"fsp:{bottom}:{top}"])
    return total


def plain_hcl(found, wanted):
    total, shares, weight = mean_square(found - wanted), 1.0, 1.0
    for side in (4, 2, 1):
        if side < found.shape[2]:
            weight /= 2
            shares += weight
            total = total + weight * mean_square(pooled(found, (side, side)) - pooled(wanted, (side, side)))
    return total / shares


def plain_reviewkd(term, ours, theirs):
    """As the paper draws it: from the vector before the classifier, a 1x1 map, down to the first stage."""
    levels = [("penultimate", "penultimate"), *((tap, f"maps:{tap}.pre") for tap in ("stage3", "stage2", "stage1"))]
    total, above = 0, None
    for (tap, name), fusion in zip(levels, term.fusions, strict=True):
        own, wanted = (x.reshape(*x.shape[:2], *(x.shape[2:] or (1, 1))) for x in (ours[tap], theirs[name]))
        fused = normalised(convolved(own, fusion.narrow[0]), fusion.narrow[1])
        if above is not None:
            above = nearest(above, fused.shape[2])
            shares = 1 / (1 + np.exp(-convolved(np.concatenate([fused, above], 1), fusion.attend[0])))
            fused = fused * shares[:, :1] + above * shares[:, 1:]
        above = nearest(fused, wanted.shape[2])
        total += plain_hcl(normalised(convolved(above, fusion.answer[0]), fusion.answer[1]), wanted)
    return total


def plain_rkd(term, ours, theirs):
    distances, angles = [], []
    for values in (ours["penultimate"], theirs["penultimate"]):
        found = np.array([[math.dist(a, b) for b in values] for a in values])
        distances.append(found / found[found > 0].mean())
        corner = np.zeros((len(values),) * 3)
        for i, j, k in np.ndindex(corner.shape):
            if i not in (j, k):
                a, b = values[j] - values[i], values[k] - values[i]
                corner[i, j, k] = (a @ b) / math.sqrt((a @ a) * (b @ b))
        angles.append(corner)
    return 25 * huber(distances[0] - distances[1]).mean(1) + 50 * huber(angles[0] - angles[1]).mean((1, 2))


def plain_pkt(term, ours, theirs):
    rows = []
    for values in (ours["penultimate"], theirs["penultimate"]):
        cosines = np.array([[a @ b / math.sqrt((a @ a) * (b @ b)) for b in values] for a in values])
        rows.append((cosines + 1) / 2 / ((cosines + 1) / 2).sum(1, keepdims=True))
    return (rows[1] * np.log((rows[1] + 1e-7) / (rows[0] + 1e-7))).mean(1)


PLAIN = {
    "fitnet": plain_fitnet, "sp": plain_sp, "vid": plain_vid, "fsp": plain_fsp, "reviewkd": plain_reviewkd,
    "rkd": plain_rkd, "pkt": plain_pkt,
}  # fmt: skip
