"""Every loss again in float64 with NumPy and SciPy: what the fast ones are held against.

Arrays in, one value per sample out, in the order of arguments of the package's own functions; nothing here is from it.
"""

import numpy as np
import torch
from scipy.spatial.distance import cdist
from scipy.special import entr, log_softmax, softmax, xlogy
from torch import nn
from torch.nn import functional


def drawn(seed, *shape, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, shape)


def tensor(array):
    return torch.from_numpy(np.asarray(array)).float()


def array(values):
    return values.detach().double().numpy()


def close(found, expected, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=rtol, atol=atol)


# logits and probabilities


def entropy(z, temperature=1.0):
    return entr(softmax(z / temperature, axis=-1)).sum(-1)


def hard(z, labels, smoothing=0.0):
    """Cross-entropy, a share of the label spread evenly over all classes."""
    logs, labels = -log_softmax(z, axis=-1), np.asarray(labels)[..., None]
    return (1 - smoothing) * np.take_along_axis(logs, labels, -1)[..., 0] + smoothing * logs.mean(-1)


def soft(z, target, temperature=1.0):
    """T^2 KL(target || softmax(z / T))."""
    return temperature**2 * (xlogy(target, target) - target * log_softmax(z / temperature, axis=-1)).sum(-1)


def logits(student, teacher, temperature=1.0):
    return soft(student, softmax(teacher / temperature, axis=-1), temperature)


def entropy_weights(student, teacher, temperature):
    ours, theirs = entropy(student, temperature), entropy(teacher, temperature)
    return (theirs + theirs * ours / np.log(student.shape[1])) / 2


def entropy_weighted(student, teacher, temperature, weight_temperature):
    return entropy_weights(student, teacher, weight_temperature) * logits(student, teacher, temperature)


def divergence(target, found):
    """KL(target || found) in nats of rows of probabilities."""
    return (xlogy(target, target) - xlogy(target, found)).sum(-1)


def decoupled(student, teacher, labels, alpha, beta, temperature):
    """TCKD and NCKD from probabilities."""
    found = []
    for *rows, label in zip(teacher, student, labels, strict=True):
        p, q = (softmax(z / temperature) for z in rows)
        target = divergence(*(np.array([r[label], 1 - r[label]]) for r in (p, q)))
        rest = divergence(*(np.delete(r, label) / (1 - r[label]) for r in (p, q)))
        found.append(temperature**2 * (alpha * target + beta * rest))
    return np.array(found)


def boundary(student, teacher, weights, temperature):
    rows, weights = logits(student, teacher, temperature) / temperature**2, np.asarray(weights)
    return rows * weights * len(rows) / (weights.sum() or 1)


def base_weights(student, teacher, labels, most):
    right = [i for i, y in enumerate(labels) if student[i].argmax() == y == teacher[i].argmax()]
    gaps = {i: (np.delete(student[i] - teacher[i], labels[i]) ** 2).sum() for i in right}
    chosen = sorted(right, key=lambda i: (-gaps[i], i))[:most]
    return [float(i in chosen) for i in range(len(labels))]


# maps


def pooled(features, height, width):
    """Average over the cells floor(i H / h) to ceil((i + 1) H / h), one at a time."""
    H, W = features.shape[2:]
    out = np.zeros((*features.shape[:2], height, width))
    for i, j in np.ndindex(height, width):
        rows = slice(i * H // height, -(-(i + 1) * H // height))
        columns = slice(j * W // width, -(-(j + 1) * W // width))
        out[:, :, i, j] = features[:, :, rows, columns].mean(axis=(2, 3))
    return out


def smaller(left, right):
    """Both at the smaller height and width."""
    side = np.minimum(left.shape[2:], right.shape[2:])
    return pooled(left, *side), pooled(right, *side)


def attention(features, side=None):
    features = features if side is None else pooled(features, *side)
    return units((features**2).mean(1).reshape(len(features), -1))


def error(student, target):
    return ((student - target) ** 2).reshape(len(student), -1).mean(1)


def flow(bottom, top):
    bottom, top = smaller(bottom, top)
    return np.einsum("bchw,bdhw->bcd", bottom, top) / (bottom.shape[2] * bottom.shape[3])


def variational(mean, target, raw):
    variance = (np.log1p(np.exp(raw)) + 1e-5)[:, None, None]
    return ((mean - target) ** 2 / variance + np.log(variance)).reshape(len(mean), -1).mean(1) / 2


def context(student, target):
    parts = [(1.0, error(student, target))]
    for side in (4, 2, 1):
        if side < min(student.shape[2:]):
            parts.append((parts[-1][0] / 2, error(pooled(student, side, side), pooled(target, side, side))))
    return sum(weight * part for weight, part in parts) / sum(weight for weight, _ in parts)


# relations


def units(rows):
    size = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(size > 0, size, 1)


def huber(left, right):
    gap = abs(left - right)
    return np.where(gap < 1, gap**2 / 2, gap - 0.5)


def similarity(student, teacher):
    flat = (features.reshape(len(features), -1) for features in (student, teacher))
    ours, theirs = (units(rows @ rows.T) for rows in flat)
    return ((ours - theirs) ** 2).sum(1) / len(student)


def distances(features):
    """Over the mean of those that are not 0."""
    found = cdist(features, features)
    return found / (found[found > 0].mean() if found.any() else 1)


def distance(student, teacher):
    return huber(distances(student), distances(teacher)).mean(1)


def angle(student, teacher):
    """Of the cosines of all angles j-i-k; those of equal samples are 0."""
    sides = (units(features[None] - features[:, None]) for features in (student, teacher))
    return huber(*(np.einsum("ijd,ikd->ijk", side, side) for side in sides)).mean((1, 2))


def probabilistic(student, teacher):
    found = ((units(features) @ units(features).T + 1) / 2 for features in (teacher, student))
    wanted, ours = (table / table.sum(1, keepdims=True) for table in found)
    return (wanted * np.log((wanted + 1e-7) / (ours + 1e-7))).mean(1)


# contrast


def nce(positive, negatives, count, z):
    """CRD's loss as released."""
    noise, tiny = negatives.shape[1] / count, 1e-7
    x, others = np.exp(positive) / z, np.exp(negatives) / z
    return -np.log(x / (x + noise + tiny)) - np.log(noise / (others + noise + tiny)).sum(1)


def costs(student, teacher):
    return 1 - units(student) @ units(teacher).T


def plan(student, teacher, epsilon, iterations):
    """Scaling of exp(-C / epsilon), columns first, rows last."""
    cost, b = costs(student, teacher), len(student)
    kernel, left = np.exp(-cost / epsilon), np.ones(b)
    for _ in range(iterations):
        right = 1 / b / (kernel.T @ left)
        left = 1 / b / (kernel @ right)
    return left[:, None] * kernel * right, cost


def sinkhorn(student, teacher, epsilon, iterations):
    moved, cost = plan(student, teacher, epsilon, iterations)
    return len(student) * (moved * cost).sum(1)


# rotations


def selected(scores, truth, share):
    """Sort all rows by the truth's rank, then its probability; keep the correct ones and the best of the wrong."""
    keys = []
    for row, own in zip(scores, truth, strict=True):
        order = sorted(range(len(row)), key=lambda c, row=row: (-row[c], c))
        keys.append((order.index(own), -softmax(row)[own]))
    wrong = [i for i, key in enumerate(keys) if key[0] > 0]
    best = sorted(wrong, key=lambda i: (*keys[i], i))[: int(len(wrong) * share)]
    return [key[0] == 0 or i in best for i, key in enumerate(keys)]


def anchors(student, teacher, truth, views, temperature, share):
    """Losses of kept anchors, added up per sample, so that their mean over samples is the mean over kept anchors."""
    kept = selected(teacher, truth, share)
    each = (logits(student, teacher, temperature) * kept).reshape(-1, views)
    return each.sum(axis=1) * len(each) / max(sum(kept), 1)


def similarities(rotated, plain):
    return 1 - costs(rotated.reshape(-1, rotated.shape[2]), plain)


def rotation_similarity(rotated, plain, teacher_rotated, teacher_plain, temperature, share):
    batch, views = rotated.shape[:2]
    tables = similarities(rotated, plain), similarities(teacher_rotated, teacher_plain)
    return anchors(*tables, np.repeat(np.arange(batch), views), views, temperature, share)


def rotated_divergence(student, teacher, labels, temperature, share):
    views = student.shape[1]
    flat = [z.reshape(-1, z.shape[2]) for z in (student, teacher)]
    return anchors(*flat, np.repeat(labels, views), views, temperature, share)


def rotation_task(rotated, plain):
    batch, views = rotated.shape[:2]
    own = np.repeat(np.arange(batch), views)
    return hard(similarities(rotated, plain), own).reshape(-1, views).mean(axis=1)


# filters


def quantiles(weight, count):
    norms = np.linalg.norm(weight.reshape(len(weight), -1), axis=1)
    return np.quantile(norms, np.linspace(0, 1, count))


def recoded(student, teacher, threshold):
    gap = student - teacher
    rest = np.sign(gap) * np.maximum(abs(gap) - threshold, 0)
    return (np.exp(teacher) * (np.exp(rest) - 1 - rest)).sum(-1)


# layers


def convolved(x, layer):
    """The convolution, transposed or not, in float64."""
    apply = functional.conv_transpose2d if isinstance(layer, nn.ConvTranspose2d) else functional.conv2d
    weight, bias = layer.weight.detach().double(), None if layer.bias is None else layer.bias.detach().double()
    return apply(torch.from_numpy(x), weight, bias, layer.stride, layer.padding).numpy()


def normalised(x, norm):
    mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    scale, shift = (array(p)[:, None, None] for p in (norm.weight, norm.bias))
    return (x - mean) / np.sqrt(variance + 1e-5) * scale + shift


def nearest(x, side):
    rows, columns = (np.arange(side) * length // side for length in x.shape[2:])
    return x[:, :, rows][:, :, :, columns]


def relu(x):
    return np.maximum(x, 0)
