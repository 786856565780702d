"""A threshold for mask logits from local Otsu thresholds, without materialising the local windows."""

import torch

_BINS = 64
_WINDOW = 31


def otsu_thresholds(logits: torch.Tensor) -> torch.Tensor:
    """Compute one threshold per mask: the largest of the Otsu thresholds of all windows of 31 x 31 pixels.

    Logits are scaled to 0…1 by their own minimum and maximum and put into 64 bins; windows at the border are
    filled up with zeros of this scale. The threshold of a window is the first bin that maximises the variance
    between the classes at most and above it.

    Args:
        logits: Low-resolution logits (N, h, w).

    Returns:
        Thresholds (N,) float32 on the device of the logits, in units of the logits, at least 0.
    """
    low = logits.amin(dim=(1, 2)).float()
    scale = (logits.amax(dim=(1, 2)).float() - low).clamp(min=1e-6)
    bins = (((logits.float() - low[:, None, None]) / scale[:, None, None]) * (_BINS - 1)).to(torch.int32)
    # A mask at a time: some hundred planes of its size, whatever the number of masks. MPS has no float64.
    bins = bins if bins.device.type != "mps" else bins.cpu()
    best = torch.stack([_largest_otsu_bin(mask) for mask in bins]) if len(bins) else low
    return (low + best.to(low) / (_BINS - 1) * scale).clamp(min=0)


def _largest_otsu_bin(bins: torch.Tensor) -> torch.Tensor:
    n = _WINDOW**2
    rows, columns = (_band(size, bins.device) for size in bins.shape)
    planes = (bins == torch.arange(_BINS, device=bins.device)[:, None, None]).float()
    members = rows @ planes @ columns  # numbers of pixels per bin and window, exact in float32
    del planes
    members[0] += n - members.sum(dim=0)  # what fills up windows at the border
    members = members.to(torch.int32)
    total = (members * torch.arange(_BINS, device=bins.device, dtype=torch.int32)[:, None, None]).sum(0).to(torch.int32)

    count, weighted = torch.zeros_like(total), torch.zeros_like(total)
    best_value, best = torch.full_like(total, -1, dtype=torch.float64), torch.zeros_like(total)
    for k in range(_BINS):
        count += members[k]
        weighted += k * members[k]
        # w1 w2 (m1 - m2)^2 = (n s1 - s w1)^2 / (w1 w2): exact integers until the one division.
        value = (n * weighted - total * count).double().square_() / (count * (n - count)).clamp_(min=1)
        best[value > best_value] = k
        torch.maximum(best_value, value, out=best_value)
    return best.max()


def _band(size: int, device: torch.device) -> torch.Tensor:
    """Symmetric matrix that sums over the window along one axis."""
    index = torch.arange(size, device=device)
    return ((index[:, None] - index).abs() <= _WINDOW // 2).float()
