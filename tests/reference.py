"""Every loss again in plain float64 arithmetic, one number at a time: what the fast ones are held against.

Arrays in, one value per sample out, in the order of arguments of the package's own functions; nothing here is from it.
"""

import math

import numpy as np
import torch
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


# rows of logits and probabilities


def softmax(row, temperature=1.0):
    top = max(row)
    powers = [math.exp((z - top) / temperature) for z in row]
    total = sum(powers)
    return [power / total for power in powers]


def entropy(row, temperature=1.0):
    return -sum(p * math.log(p) for p in softmax(row, temperature) if p > 0)


def hard(row, label, smoothing=0.0):
    """Cross-entropy of one row, a share of its label spread evenly over all classes."""
    logs = [-math.log(p) for p in softmax(row)]
    return (1 - smoothing) * logs[label] + smoothing * sum(logs) / len(logs)


def divergence(target, found):
    """KL(target || found) in nats of two rows of probabilities."""
    return sum(p * math.log(p / q) for p, q in zip(target, found, strict=True) if p > 0)


def row_divergence(row, target, temperature):
    """T^2 KL(target || softmax(row / T)) with the logarithm of softmax written out."""
    top = max(row) / temperature
    log_sum = top + math.log(sum(math.exp(z / temperature - top) for z in row))
    terms = [p * (math.log(p) - (z / temperature - log_sum)) for p, z in zip(target, row, strict=True) if p > 0]
    return temperature**2 * sum(terms)


def logits(student, teacher, temperature=1.0):
    rows = zip(student.tolist(), teacher.tolist(), strict=True)
    return np.array([row_divergence(s, softmax(t, temperature), temperature) for s, t in rows])


def entropy_weights(student, teacher, temperature):
    rows = zip(student.tolist(), teacher.tolist(), strict=True)
    pairs = [(entropy(s, temperature), entropy(t, temperature)) for s, t in rows]
    return np.array([(theirs + theirs * ours / math.log(student.shape[1])) / 2 for ours, theirs in pairs])


def entropy_weighted(student, teacher, temperature, weight_temperature):
    return entropy_weights(student, teacher, weight_temperature) * logits(student, teacher, temperature)


def decoupled(student, teacher, labels, alpha, beta, temperature):
    """TCKD and NCKD from probabilities."""
    found = []
    for s, t, label in zip(student.tolist(), teacher.tolist(), labels, strict=True):
        rows = softmax(t, temperature), softmax(s, temperature)
        target = divergence(*([r[label], 1 - r[label]] for r in rows))
        rest = divergence(*([v / (1 - r[label]) for c, v in enumerate(r) if c != label] for r in rows))
        found.append(temperature**2 * (alpha * target + beta * rest))
    return np.array(found)


def boundary(student, teacher, weights, temperature):
    total = sum(weights)
    rows = logits(student, teacher, temperature) / temperature**2
    return rows * np.asarray(weights) * len(rows) / total if total else np.zeros(len(rows))


def base_weights(student, teacher, labels, most):
    scores = []
    for i, label in enumerate(labels):
        if student[i].argmax() == label == teacher[i].argmax():
            others = [c for c in range(student.shape[1]) if c != label]
            scores.append((-sum((student[i, c] - teacher[i, c]) ** 2 for c in others), i))
    chosen = {i for _, i in sorted(scores)[:most]}
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
    rows = []
    for sample in features if side is None else pooled(features, *side):
        q = [sum(channel[at] ** 2 for channel in sample) / len(sample) for at in np.ndindex(sample.shape[1:])]
        rows.append(unit(q))
    return np.array(rows)


def error(student, target):
    gaps = [[(a - b) ** 2 for a, b in zip(s.flat, t.flat, strict=True)] for s, t in zip(student, target, strict=True)]
    return np.array([sum(gap) / len(gap) for gap in gaps])


def flow(bottom, top):
    bottom, top = smaller(bottom, top)
    out = np.zeros((len(bottom), bottom.shape[1], top.shape[1]))
    for n, i, j in np.ndindex(*out.shape):
        out[n, i, j] = (bottom[n, i] * top[n, j]).mean()
    return out


def variational(mean, target, raw):
    variance = [math.log1p(math.exp(a)) + 1e-5 for a in raw]
    rows = []
    for mu, t in zip(mean, target, strict=True):
        each = [(mu[at] - t[at]) ** 2 / variance[at[0]] + math.log(variance[at[0]]) for at in np.ndindex(*mu.shape)]
        rows.append(sum(each) / len(each) / 2)
    return np.array(rows)


def context(student, target):
    parts = [(1.0, error(student, target))]
    for side in (4, 2, 1):
        if side < min(student.shape[2:]):
            parts.append((parts[-1][0] / 2, error(pooled(student, side, side), pooled(target, side, side))))
    return sum(weight * part for weight, part in parts) / sum(weight for weight, _ in parts)


# relations


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(a):
    size = math.sqrt(dot(a, a))
    return [x / size if size else 0.0 for x in a]


def units(rows):
    return np.array([unit(row) for row in rows.tolist()])


def huber(a, b):
    gap = abs(a - b)
    return gap**2 / 2 if gap < 1 else gap - 0.5


def similarity(student, teacher):
    tables = []
    for features in (student, teacher):
        flat = features.reshape(len(features), -1).tolist()
        tables.append(np.array([unit([dot(a, b) for b in flat]) for a in flat]))
    return ((tables[0] - tables[1]) ** 2).sum(axis=1) / len(student)


def distances(features):
    table = [[math.dist(a, b) for b in features.tolist()] for a in features.tolist()]
    positive = [d for row in table for d in row if d > 0]
    mean = sum(positive) / len(positive) if positive else 1.0
    return [[d / mean for d in row] for row in table]


def distance(student, teacher):
    rows = zip(distances(student), distances(teacher), strict=True)
    return np.array([sum(map(huber, found, wanted)) / len(student) for found, wanted in rows])


def angle(student, teacher):
    """Of the cosines of all angles j-i-k; those of equal samples are 0."""
    count, found = len(student), np.zeros(len(student))
    for i, j, k in np.ndindex(count, count, count):
        cosines = (dot(unit(f[j] - f[i]), unit(f[k] - f[i])) for f in (student, teacher))
        found[i] += huber(*cosines) / count**2
    return found


def neighbours(features):
    rows = units(features).tolist()
    table = [[(dot(a, b) + 1) / 2 for b in rows] for a in rows]
    return [[value / sum(row) for value in row] for row in table]


def probabilistic(student, teacher):
    count, tiny = len(student), 1e-7
    rows = zip(neighbours(teacher), neighbours(student), strict=True)
    each = [[p * math.log((p + tiny) / (q + tiny)) for p, q in zip(*row, strict=True)] for row in rows]
    return np.array([sum(row) / count for row in each])


# contrast


def nce(positive, negatives, count, z):
    """CRD's loss as released."""
    rows, noise, tiny = [], negatives.shape[1] / count, 1e-7
    for own, others in zip(positive, negatives, strict=True):
        x = math.exp(own) / z
        loss = -math.log(x / (x + noise + tiny))
        rows.append(loss - sum(math.log(noise / (math.exp(other) / z + noise + tiny)) for other in others))
    return np.array(rows)


def dual(positive, negatives):
    return np.array([sum(others) / len(others) - own for own, others in zip(positive, negatives, strict=True)])


def costs(student, teacher):
    return np.array([[1 - dot(unit(s), unit(t)) for t in teacher.tolist()] for s in student.tolist()])


def plan(student, teacher, epsilon, iterations):
    """Scaling of exp(-C / epsilon), columns first, rows last."""
    cost, b = costs(student, teacher), len(student)
    kernel, left = np.exp(-cost / epsilon), np.ones(b)
    for _ in range(iterations):
        right = np.array([1 / b / sum(kernel[i, j] * left[i] for i in range(b)) for j in range(b)])
        left = np.array([1 / b / sum(kernel[i, j] * right[j] for j in range(b)) for i in range(b)])
    return left[:, None] * kernel * right[None, :], cost


def sinkhorn(student, teacher, epsilon, iterations):
    moved, cost = plan(student, teacher, epsilon, iterations)
    return len(student) * (moved * cost).sum(axis=1)


# rotations


def selected(scores, truth, share):
    """Sort all rows by the truth's rank, then its probability; keep the correct ones and the best of the wrong."""
    keys = []
    for row, own in zip(scores.tolist(), truth, strict=True):
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
    views = rotated.shape[1]
    rows = [hard(row, i // views) for i, row in enumerate(similarities(rotated, plain).tolist())]
    return np.array(rows).reshape(-1, views).mean(axis=1)


# filters


def quantiles(weight, count):
    norms = sorted(math.sqrt(sum(w * w for w in filt)) for filt in weight.reshape(len(weight), -1).tolist())
    found = []
    for number in range(count):
        place = number * (len(norms) - 1) / (count - 1)
        low = min(int(place), len(norms) - 1)
        high = min(low + 1, len(norms) - 1)
        found.append(norms[low] + (place - low) * (norms[high] - norms[low]))
    return found


def recoded(student, teacher, threshold):
    rows = []
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        rests = [(t, math.copysign(max(abs(s - t) - threshold, 0.0), s - t)) for s, t in zip(ours, theirs, strict=True)]
        rows.append(sum(math.exp(t) * (math.exp(rest) - 1 - rest) for t, rest in rests))
    return np.array(rows)


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
    rows = [i * x.shape[2] // side for i in range(side)]
    columns = [j * x.shape[3] // side for j in range(side)]
    return x[:, :, rows][:, :, :, columns]


def relu(x):
    return np.maximum(x, 0)
