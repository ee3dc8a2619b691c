"""Resampling of images and grids, regions and boxes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from qgraph.torch.ops.types import Ints, Operators, ints


def _coordinates(
    count: int, length: int, scale: float, mode: str, roi: tuple[float, float]
) -> Tensor:
    """Where each of `count` outputs lies on an axis of `length` inputs; float64."""
    place = torch.arange(count, dtype=torch.float64)
    match mode:
        case "asymmetric":
            return place / scale
        case "align_corners":
            return place * (length - 1) / (count - 1) if count > 1 else torch.zeros_like(place)
        case "pytorch_half_pixel" if count <= 1:
            return torch.zeros_like(place)
        case "tf_half_pixel_for_nn":
            return (place + 0.5) / scale
        case "tf_crop_and_resize":
            start, end = roi
            if count <= 1:
                return torch.full_like(place, 0.5 * (start + end) * (length - 1))
            return start * (length - 1) + place * (end - start) * (length - 1) / (count - 1)
        case "half_pixel_symmetric":
            centre, adjustment = length / 2, count / (scale * length)
            return centre * (1 - adjustment) + (place + 0.5) / scale - 0.5
    return (place + 0.5) / scale - 0.5


def _nearest(place: Tensor, mode: str) -> Tensor:
    if mode == "floor":
        return torch.floor(place)
    if mode == "ceil":
        return torch.ceil(place)
    if mode == "round_prefer_ceil":
        return torch.floor(place + 0.5)
    return torch.ceil(place - 0.5)


def _linear(distance: Tensor) -> Tensor:
    return (1 - distance.abs()).clamp(min=0)


def _cubic(a: float) -> Callable[[Tensor], Tensor]:
    def weight(distance: Tensor) -> Tensor:
        x = distance.abs()
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        return torch.where(x <= 1, near, torch.where(x < 2, far, 0))

    return weight


def _weights(
    place: Tensor,
    length: int,
    scale: float,
    kernel: Callable[[Tensor], Tensor],
    reach: int,
    antialias: bool,
    exclude_outside: bool,
) -> Tensor:
    """(outputs, inputs): how much each input contributes to each output."""
    wide = max(1 / scale, 1.0) if antialias else 1.0
    margin = math.ceil(reach * wide) + 1
    taps = torch.arange(-margin, length + margin, dtype=torch.float64)
    weights = kernel((taps - place[:, None]) / wide)
    if exclude_outside:
        weights = torch.where((taps >= 0) & (taps < length), weights, 0)
    if exclude_outside or antialias:
        weights = weights / weights.sum(1, keepdim=True)
    matrix = torch.zeros(place.numel(), length, dtype=torch.float64)
    return matrix.index_add(1, taps.clamp(0, length - 1).to(torch.int64), weights)


def _sizes(
    lengths: Sequence[int], sizes: Sequence[int], policy: str
) -> tuple[list[int], list[float]]:
    """Sizes and scales where sizes are given."""
    scales = [size / length for size, length in zip(sizes, lengths, strict=True)]
    if policy == "stretch":
        return list(sizes), scales
    scale = min(scales) if policy == "not_larger" else max(scales)
    return [math.floor(scale * n + 0.5) for n in lengths], [scale] * len(scales)


def resize(
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Ints | None = None,
    *,
    antialias: int = 0,
    axes: list[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
    opset: int,
) -> Tensor:
    """One axis after another: by index for nearest, else by a matrix of weights."""
    if opset < 11:
        return upsample(x, roi, mode=mode)
    along = [axis % x.ndim for axis in axes] if axes is not None else list(range(x.ndim))
    lengths = [x.shape[axis] for axis in along]
    if sizes is not None and ints(sizes):
        counts, factors = _sizes(lengths, ints(sizes), keep_aspect_ratio_policy)
    else:
        assert scales is not None
        factors = [float(s) for s in scales.tolist()]
        counts = [math.floor(n * s) for n, s in zip(lengths, factors, strict=True)]
    corners = [0.0] * len(along) + [1.0] * len(along) if roi is None or not roi.numel() else (
        roi.tolist()
    )  # fmt: skip
    crop = coordinate_transformation_mode == "tf_crop_and_resize"
    outside = []
    for i, axis in enumerate(along):
        length, count, factor = lengths[i], counts[i], factors[i]
        region = (corners[i], corners[i + len(along)])
        if length == count and factor == 1 and not (crop and region != (0.0, 1.0)):
            continue
        place = _coordinates(count, length, factor, coordinate_transformation_mode, region)
        if crop:
            outside.append((axis, (place < 0) | (place > length - 1)))
        if mode == "nearest":
            index = _nearest(place, nearest_mode).clamp(0, length - 1).to(torch.int64)
            x = x.index_select(axis, index.to(x.device))
            continue
        kernel, reach = (_linear, 1) if mode == "linear" else (_cubic(cubic_coeff_a), 2)
        excluded = bool(exclude_outside) and mode == "cubic"
        weights = _weights(place, length, factor, kernel, reach, bool(antialias), excluded)
        x = _blended(x, weights.to(x.device), axis)
    for axis, beyond in outside:
        shape = [1] * x.ndim
        shape[axis] = -1
        x = x.masked_fill(beyond.to(x.device).reshape(shape), extrapolation_value)
    return x


def _blended(x: Tensor, weights: Tensor, axis: int) -> Tensor:
    exact = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
    y = torch.matmul(exact.movedim(axis, -1), weights.to(exact.dtype).t()).movedim(-1, axis)
    if not x.is_floating_point():
        info = torch.iinfo(x.dtype)
        y = torch.round(y).clamp(info.min, info.max)
    return y.to(x.dtype)


def upsample(x: Tensor, scales: Tensor | list[float] | None, *, mode: str = "nearest") -> Tensor:
    """Resize as it was before opset 11."""
    assert scales is not None
    factors = scales if isinstance(scales, Tensor) else torch.tensor(scales)
    return resize(
        x,
        None,
        factors,
        coordinate_transformation_mode="asymmetric",
        mode=mode,
        nearest_mode="floor",
        opset=11,
    )


_GRID_MODES = {"linear": "bilinear", "cubic": "bicubic"}


def grid_sample(
    x: Tensor,
    grid: Tensor,
    *,
    align_corners: int = 0,
    mode: str = "linear",
    padding_mode: str = "zeros",
) -> Tensor:
    how = _GRID_MODES.get(mode, mode)
    return F.grid_sample(x, grid, how, padding_mode, bool(align_corners))


def affine_grid(theta: Tensor, size: Ints, *, align_corners: int = 0) -> Tensor:
    return F.affine_grid(theta, ints(size), bool(align_corners))


def non_max_suppression(
    boxes: Tensor,
    scores: Tensor,
    max_output_boxes_per_class: Ints | None = None,
    iou_threshold: Tensor | None = None,
    score_threshold: Tensor | None = None,
    *,
    center_point_box: int = 0,
) -> Tensor:
    """(batch, class, box) of the boxes that stay, the best first; nothing flows back from it."""
    limit = 0 if max_output_boxes_per_class is None else ints(max_output_boxes_per_class)[0]
    overlap = 0.0 if iou_threshold is None else float(iou_threshold)
    if center_point_box:
        half = boxes[..., 2:] / 2
        boxes = torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], -1)
    else:
        first, second = boxes[..., :2], boxes[..., 2:]
        boxes = torch.cat([torch.minimum(first, second), torch.maximum(first, second)], -1)
    chosen = []
    for batch, of_batch in enumerate(scores):
        for kind, score in enumerate(of_batch):
            order = torch.argsort(score, descending=True, stable=True)
            if score_threshold is not None:
                order = order[score[order] > float(score_threshold)]
            for index in _suppressed(boxes[batch], order, overlap, limit):
                chosen.append([batch, kind, index])
    return torch.tensor(chosen, dtype=torch.int64, device=boxes.device).reshape(-1, 3)


def _suppressed(boxes: Tensor, order: Tensor, overlap: float, limit: int) -> list[int]:
    chosen: list[int] = []
    while order.numel() and len(chosen) < limit:
        best, order = order[0], order[1:]
        chosen.append(int(best))
        low = torch.maximum(boxes[best, :2], boxes[order, :2])
        high = torch.minimum(boxes[best, 2:], boxes[order, 2:])
        common = (high - low).clamp(min=0).prod(-1)
        union = _area(boxes[best]) + _area(boxes[order]) - common
        order = order[~(common > overlap * union)]
    return chosen


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def roi_align(
    x: Tensor,
    rois: Tensor,
    batch_indices: Tensor,
    *,
    coordinate_transformation_mode: str | None = None,
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
    opset: int,
) -> Tensor:
    """Each region (x1, y1, x2, y2) averaged, or its largest samples, in a grid of bins."""
    default = "half_pixel" if opset >= 16 else "output_half_pixel"
    aligned = (coordinate_transformation_mode or default) == "half_pixel"
    results = []
    for roi, batch in zip(rois * spatial_scale, batch_indices, strict=True):
        x1, y1, x2, y2 = (roi - 0.5 if aligned else roi).unbind()
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = width.clamp(min=1), height.clamp(min=1)
        rows, row_count = _samples(y1, height, output_height, sampling_ratio)
        columns, column_count = _samples(x1, width, output_width, sampling_ratio)
        down, low, high = _taps(rows, x.shape[2])
        across, left, right = _taps(columns, x.shape[3])
        image = x[int(batch)]
        corners = [
            image[:, i][:, :, j] * p[:, None] * q
            for i, p in ((low, 1 - down[0]), (high, down[0]))
            for j, q in ((left, 1 - across[0]), (right, across[0]))
        ]
        inside = down[1][:, None] * across[1]
        shape = (-1, output_height, row_count, output_width, column_count)
        if mode == "max":
            stacked = torch.stack(corners).amax(0) * inside
            results.append(stacked.reshape(shape).amax((2, 4)))
        else:
            results.append((sum(corners[1:], corners[0]) * inside).reshape(shape).mean((2, 4)))
    if not results:
        return x.new_zeros(0, x.shape[1], output_height, output_width)
    return torch.stack(results)


def _samples(start: Tensor, extent: Tensor, bins: int, ratio: int) -> tuple[Tensor, int]:
    """Sampling points along one side of a region, and how many each bin has."""
    count = ratio or max(math.ceil(float(extent) / bins), 1)
    steps = torch.arange(bins * count, device=start.device, dtype=start.dtype)
    return start + (steps + 0.5) * extent / (bins * count), count


def _taps(place: Tensor, length: int) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Share of the upper neighbour and whether the point counts; both neighbours."""
    counts = ((place >= -1) & (place <= length)).to(place.dtype)
    place = place.clamp(0, length - 1)
    low = place.floor().clamp(max=length - 1)
    return (place - low, counts), low.long(), (low + 1).clamp(max=length - 1).long()


OPERATORS: Operators = {
    "AffineGrid": affine_grid,
    "GridSample": grid_sample,
    "NonMaxSuppression": non_max_suppression,
    "Resize": resize,
    "RoiAlign": roi_align,
    "Upsample": upsample,
}
