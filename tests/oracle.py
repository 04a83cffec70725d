"""The equations once more, in loops over float64 numbers.

Those of method page, section 2 to section 4: slow, and written apart from iib_kernels.reference on
purpose.
"""

import math

import numpy as np


def unit(v):
    length = math.sqrt(sum(x * x for x in v))
    return [x / length for x in v] if length > 0 else list(v)


def distance(z, p, metric):
    if metric == "cosine":
        z, p = unit(z), unit(p)
    return sum((a - b) ** 2 for a, b in zip(z, p))


def softmax(scores):
    top = max(scores)
    weights = [math.exp(s - top) if s > -math.inf else 0.0 for s in scores]
    total = sum(weights)
    return [w / total for w in weights]


def alignment(features, prototypes, targets, budgets, tau, metric, seen, mask, ignore=-100):
    """C, A and confidence of every sample and modality, [B, M] each; and which count."""
    B, M, K = len(targets), len(features), len(prototypes[0])
    anchor = int(np.argmax(budgets))
    C, A, q_true, counts = (np.zeros((B, M)) for _ in range(4))
    for i in range(B):
        y = targets[i]
        posterior = []
        for m in range(M):
            known = [k for k in range(K) if seen is None or seen[m][k]]
            present = mask is None or mask[i][m]
            if y == ignore or not present or y not in known:
                posterior.append(None)
                continue
            values = softmax(
                [-distance(features[m][i], prototypes[m][k], metric) / tau for k in known]
            )
            posterior.append(dict(zip(known, values)))
            C[i, m], q_true[i, m], counts[i, m] = -math.log(posterior[m][y]), posterior[m][y], 1
        for m in range(M):
            if m == anchor or posterior[m] is None or posterior[anchor] is None:
                continue
            rho = budgets[m] / budgets[anchor] if budgets[anchor] > 0 else 1.0
            delta = max(0.0, rho * posterior[anchor][y] - posterior[m][y])
            common = [k for k in posterior[anchor] if k in posterior[m]]
            A[i, m] = delta * sum(
                posterior[anchor][k] * (math.log(posterior[anchor][k]) - math.log(posterior[m][k]))
                for k in common
                if posterior[anchor][k] > 0
            )
    return C, A, q_true, counts


def fusion(logits, log_prior, gate_logits, temperature, kappa, scale, mask):
    """Fused logits [N, K], weights and uncertainty [N, M], scaled logits [N, M, K].

    The logits are [M, N, K].
    """
    M, N, K = logits.shape
    fused, weights, uncertainty, scaled = (
        np.zeros((N, K)),
        np.zeros((N, M)),
        np.zeros((N, M)),
        np.zeros((N, M, K)),
    )
    for i in range(N):
        scores = []
        for m in range(M):
            if mask is not None and not mask[i][m]:
                scores.append(-math.inf)
                continue
            t = [l / temperature[m] for l in logits[m, i]]
            scaled[i, m] = t
            p = softmax(t)
            uncertainty[i, m] = (
                -sum(x * math.log(x) for x in p if x > 0) / math.log(K) if K > 1 else 0.0
            )
            scores.append(log_prior[m] + gate_logits[i, m] - kappa[m] * uncertainty[i, m])
        weights[i] = softmax(scores)
        for k in range(K):
            fused[i, k] = scale * sum(
                weights[i, m] * scaled[i, m, k] for m in range(M) if weights[i, m] > 0
            )
        for m in range(M):
            if mask is not None and not mask[i][m]:
                uncertainty[i, m] = 1.0 if K > 1 else 0.0  # nothing is known of it
    return fused, weights, uncertainty, scaled


def cross_entropy(row, y):
    top = max(row)
    return top + math.log(sum(math.exp(x - top) for x in row)) - row[y]
