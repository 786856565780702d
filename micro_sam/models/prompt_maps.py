"""A prompt encoder that also draws points and boxes as maps, for networks that are trained with little data.

SAM tells its mask decoder where prompts are by position encodings alone, and learns from a billion masks what these
mean for each pixel. Maps of the prompts on the pixel grid, as in other interactive segmentation (Xu et al. 2016,
10.1109/CVPR.2016.47; Sofiiuk et al. 2022, 10.1109/ICIP46576.2022.9897365), are learnt from a few thousand.
"""

import torch
from segment_anything.modeling import PromptEncoder
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

PREFIX = "prompt_maps."  # of the weights that SAM's own prompt encoder does not have
NEGATIVE, POSITIVE, FIRST_CORNER, LAST_CORNER, PADDING = 0, 1, 2, 3, -1  # labels of points, as in SAM
_WIDTHS = (8.0, 32.0)  # standard deviations in pixels of the canvas of the Gaussians around points
_N_MAPS = 2 * len(_WIDTHS) + 2


def draw_prompts(coords: Tensor, labels: Tensor, grid: tuple[int, int], canvas: tuple[int, int]) -> Tensor:
    """Draw the prompts of N objects.

    Args:
        coords: Points and corners of boxes (N, P, 2), XY in pixels of the canvas. P is at least 1.
        labels: What they are (N, P): 1 positive, 0 negative, 2 and 3 the first and last corner of a box, -1 padding.
        grid: Shape (h, w) of the maps.
        canvas: Shape (H, W) of the canvas, which they cover.

    Returns:
        Maps (N, 6, h, w): for positive and then for negative points the nearest one's Gaussian of each width; the share
        of each grid cell that the box covers; and a paraboloid in the box, 1 at its centre, 0 on the inscribed ellipse
        and -1 at least outside. What there is no prompt for is 0.
    """
    cells = [size / n for size, n in zip(canvas, grid)]
    y, x = (
        (torch.arange(n, dtype=coords.dtype, device=coords.device) + 0.5) * cell for n, cell in zip(grid, cells)
    )
    dy, dx = y - coords[..., 1:], x - coords[..., :1]
    maps = []
    for label in (POSITIVE, NEGATIVE):
        chosen = (labels == label).to(coords.dtype)[..., None]
        for width in _WIDTHS:
            rows, columns = (torch.exp(-d.square() / (2 * width**2)) for d in (dy, dx))
            maps.append(((rows * chosen)[..., :, None] * columns[..., None, :]).amax(1))

    is_first, is_last = ((labels == corner).to(coords.dtype)[..., None] for corner in (FIRST_CORNER, LAST_CORNER))
    first, last = (coords * is_first).sum(1), (coords * is_last).sum(1)
    has_box = is_first.amax(1)[..., None]
    covered, squares = [], []
    for axis, (centres, cell) in enumerate(((x, cells[1]), (y, cells[0]))):
        start, stop = first[:, axis, None], last[:, axis, None]
        overlap = torch.minimum(stop, centres + cell / 2) - torch.maximum(start, centres - cell / 2)
        covered.append((overlap / cell).clamp(0, 1))
        half = ((stop - start) / 2).clamp(min=0.5)
        squares.append(((centres - (start + stop) / 2) / half).square())
    maps.append(covered[1][:, :, None] * covered[0][:, None, :])
    maps.append((1 - squares[1][:, :, None] - squares[0][:, None, :]).clamp(min=-1) * has_box)
    return torch.stack(maps, dim=1)


class MapPromptEncoder(PromptEncoder):
    """SAM's prompt encoder, which adds an embedding of drawn prompts to that of the mask prompt.

    The embedding starts at zero, so that with SAM's weights its results are those of SAM.

    Args:
        arguments: Those of segment_anything's `PromptEncoder`.
    """

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.prompt_maps = nn.Sequential(
            nn.Conv2d(_N_MAPS, 32, kernel_size=2, stride=2), LayerNorm2d(32), nn.GELU(),
            nn.Conv2d(32, 64, kernel_size=2, stride=2), LayerNorm2d(64), nn.GELU(),
            nn.Conv2d(64, 64, kernel_size=3, padding=1), nn.GELU(),
            nn.Conv2d(64, self.embed_dim, kernel_size=1),
        )
        nn.init.zeros_(self.prompt_maps[-1].weight)
        nn.init.zeros_(self.prompt_maps[-1].bias)

    def embed_maps(self, coords: Tensor, labels: Tensor) -> Tensor:
        """The embedding (N, C, h, w) of points and corners of boxes, see `draw_prompts`."""
        grid = tuple(4 * n for n in self.image_embedding_size)
        return self.prompt_maps(draw_prompts(coords, labels, grid, self.input_image_size))

    def forward(
        self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Embed prompts as SAM does; the dense embeddings (N, C, h, w) differ for all objects."""
        sparse, dense = super().forward(points, boxes, masks)
        n = len(sparse)
        coords = [sparse.new_zeros(n, 1, 2)]
        labels = [sparse.new_full((n, 1), PADDING)]
        if points is not None:
            coords.append(points[0].to(sparse))
            labels.append(points[1].to(sparse))
        if boxes is not None:
            coords.append(boxes.reshape(-1, 2, 2).to(sparse))
            labels.append(sparse.new_tensor([[FIRST_CORNER, LAST_CORNER]]).expand(n, -1))
        return sparse, dense + self.embed_maps(torch.cat(coords, 1), torch.cat(labels, 1))
