"""Geometry of crops: from a position in a feature map to the network's input, and from there to the source image."""

Box = tuple[int, int, int, int]  # (left, top, right, bottom)


def receptive_field_box(
    y: int,
    x: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    offset: tuple[int, ...],
    input_size: tuple[int, ...],
    min_side: int = 48,
) -> Box:
    """Return the receptive field of unit (y, x), in pixels of the network's input.

    Args:
        y: Row of the unit in the feature map.
        x: Column of the unit in the feature map.
        size: (height, width) of the receptive field.
        stride: (vertical, horizontal) distance of the fields of neighboring units.
        offset: First (row, column) of the field of unit (0, 0); negative with padding.
        input_size: (height, width) of the input.
        min_side: Smaller fields are enlarged to this side, so that a viewer can recognize something.

    Returns:
        (left, top, right, bottom), shifted to lie inside the input.
    """
    intervals = []
    for axis, position in enumerate((y, x)):
        center = position * stride[axis] + offset[axis] + size[axis] / 2
        side = min(max(size[axis], min_side), input_size[axis])
        start = min(max(round(center - side / 2), 0), input_size[axis] - side)
        intervals.append((start, start + side))
    (top, bottom), (left, right) = intervals
    return left, top, right, bottom


def to_source_box(
    box: Box,
    input_size: tuple[int, ...],
    input_box: tuple[float, ...],
    source_size: tuple[int, ...],
    copy_size: tuple[int, ...] | None = None,
) -> Box:
    """Convert a box from pixels of the network's input to pixels of the source image.

    Args:
        box: Box in the input.
        input_size: (height, width) of the input.
        input_box: Region of the source image that became the input, (left, top, right, bottom) in its pixels.
        source_size: (width, height) of the source image.
        copy_size: (width, height) of a resized copy of the source image. If given, the result is in its pixels.

    Returns:
        (left, top, right, bottom), clipped to the image, and at least one pixel wide and high.
    """
    scale_x, scale_y = (input_box[2] - input_box[0]) / input_size[1], (input_box[3] - input_box[1]) / input_size[0]
    exact = (
        input_box[0] + box[0] * scale_x,
        input_box[1] + box[1] * scale_y,
        input_box[0] + box[2] * scale_x,
        input_box[1] + box[3] * scale_y,
    )
    target = source_size if copy_size is None else copy_size
    scales = [t / s for t, s in zip(target, source_size, strict=True)] * 2
    limits = [*target] * 2
    left, top, right, bottom = (
        min(max(round(value * scale), 0), limit) for value, scale, limit in zip(exact, scales, limits, strict=True)
    )
    left, top = min(left, limits[0] - 1), min(top, limits[1] - 1)
    return left, top, max(right, left + 1), max(bottom, top + 1)
