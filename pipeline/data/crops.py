"""What part of a photograph a unit saw: from the map to the input, and from the input to the source picture."""

Box = tuple[int, int, int, int]


def seen(
    y: int,
    x: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    offset: tuple[int, ...],
    limits: tuple[int, ...],
    least: int = 48,
) -> Box:
    """(left, top, right, bottom) of the receptive field of unit (y, x), in pixels of the network's input.

    `size`, `stride`, `offset` of the field and `limits` of the input are (height, width). Grown to at least `least`
    pixels, so that a person can see it, and moved inside the input.
    """
    box = []
    for axis, position in enumerate((y, x)):
        middle = position * stride[axis] + offset[axis] + size[axis] / 2
        side = min(max(size[axis], least), limits[axis])
        start = min(max(round(middle - side / 2), 0), limits[axis] - side)
        box.append((start, start + side))
    return box[1][0], box[0][0], box[1][1], box[0][1]


def in_picture(
    box: Box,
    limits: tuple[int, ...],
    whole: tuple[float, ...],
    picture: tuple[int, ...],
    shown: tuple[int, ...] | None = None,
) -> Box:
    """`box` of the input as (left, top, right, bottom) in pixels of the source picture, clipped to it.

    `limits` is the input's (height, width), `whole` the part of the picture that became the input, `picture` its
    (width, height); `shown` the size of a smaller copy, in whose pixels the box is wanted.
    """
    across, down = (whole[2] - whole[0]) / limits[1], (whole[3] - whole[1]) / limits[0]
    exact = (whole[0] + box[0] * across, whole[1] + box[1] * down, whole[0] + box[2] * across, whole[1] + box[3] * down)
    scale = [s / p for s, p in zip(shown or picture, picture, strict=True)] * 2
    most = [*(shown or picture)] * 2
    left, top, right, bottom = (min(max(round(v * s), 0), m) for v, s, m in zip(exact, scale, most, strict=True))
    # Never empty: at least the pixel that it lies in.
    left, top = min(left, most[0] - 1), min(top, most[1] - 1)
    return left, top, max(right, left + 1), max(bottom, top + 1)
