"""Features and labels for tests of heads."""

import torch


def make(num_rows=150, width=40, num_classes=3, seed=0, spread=2.0):
    """Return features with a decaying spectrum and an offset, like pooled activations, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_rows) % num_classes
    centres = torch.randn(num_classes, width, generator=generator)
    noise = torch.randn(num_rows, width, generator=generator) @ torch.diag(torch.logspace(0.5, -1.5, width))
    mixing = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    return (spread * centres[labels] * 0.3 + noise) @ mixing + 3.0, labels


def scaled(train, rows, scaling):
    """Return fp64 rows scaled by the rows a head trains on, as the documentation says it is done."""
    train, rows = train.double(), rows.double()
    if scaling == "l2-normalised":
        train, rows = (part / part.norm(dim=1, keepdim=True) for part in (train, rows))
    centre, deviation = train.mean(0), train.std(0, correction=0)
    if scaling == "standardised":
        typical = deviation[deviation > 1e-6 * centre.abs()].median()
        divisor = torch.where(deviation > 1e-6 * centre.abs(), deviation.maximum(0.05 * typical), typical)
    else:
        divisor = torch.ones_like(deviation)
    divisor = divisor * (deviation / divisor).square().mean().sqrt()
    return (rows - centre) / divisor
