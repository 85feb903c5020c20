"""WebP encoding by direct calls to the libwebp that Pillow includes.

Pillow passes 32-bit pixels to libwebp, which converts them to YUV 4:2:0 before encoding; from 24-bit RGB the conversion
uses SIMD. The result is almost identical and takes a fifth to a third less time. If Pillow's library cannot be called
directly, Pillow encodes.

Source: webp/encode.h of libwebp 1.x; the layout of these structures is fixed by the major version of its ABI.
"""

import ctypes
import functools
import importlib.util
import io
from ctypes import POINTER, Structure, byref, c_float, c_int, c_size_t, c_uint32, c_void_p

import numpy as np
from PIL import Image

# ABI version; the high byte is the major version, which must equal that of the library.
ABI = 0x020F
# 0 is the fastest method; a site can have 100,000 images.
METHOD = 0
# Longest side that the format supports, in pixels.
LONGEST = 16383


class _Config(Structure):
    """`WebPConfig`; all fields but `method` keep the values that the library initializes them with."""

    _fields_ = (
        ("lossless", c_int),
        ("quality", c_float),
        ("method", c_int),
        ("remaining", c_uint32 * 61),  # 26 fields in libwebp 1.x; the size leaves room for more
    )


class _Picture(Structure):
    """`WebPPicture`: the input as YUV or ARGB, and the output callback."""

    _fields_ = (
        ("use_argb", c_int), ("colorspace", c_int), ("width", c_int), ("height", c_int),
        ("y", c_void_p), ("u", c_void_p), ("v", c_void_p), ("y_stride", c_int), ("uv_stride", c_int),
        ("a", c_void_p), ("a_stride", c_int), ("pad1", c_uint32 * 2),
        ("argb", c_void_p), ("argb_stride", c_int), ("pad2", c_uint32 * 3),
        ("writer", c_void_p), ("custom_ptr", c_void_p), ("extra_info_type", c_int), ("extra_info", c_void_p),
        ("stats", c_void_p), ("error_code", c_int), ("progress_hook", c_void_p), ("user_data", c_void_p),
        ("pad3", c_uint32 * 3), ("pad4", c_void_p), ("pad5", c_void_p), ("pad6", c_uint32 * 8),
        ("memory", c_void_p), ("memory_argb", c_void_p), ("pad7", c_void_p * 2),
    )  # fmt: skip


class _Writer(Structure):
    """`WebPMemoryWriter`: a growing output buffer."""

    _fields_ = (("mem", c_void_p), ("size", c_size_t), ("max_size", c_size_t), ("pad", c_uint32))


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return Pillow's libwebp, or None if it cannot be called directly or has another ABI version."""
    spec = importlib.util.find_spec("PIL._webp")
    if spec is None or spec.origin is None:
        return None
    try:
        lib = ctypes.CDLL(spec.origin)  # symbols of its dependencies resolve through this handle
        version = lib.WebPGetEncoderVersion
        calls = {
            "WebPConfigInitInternal": (POINTER(_Config), c_int, c_float, c_int),
            "WebPPictureInitInternal": (POINTER(_Picture), c_int),
            "WebPPictureImportRGB": (POINTER(_Picture), c_void_p, c_int),
            "WebPEncode": (POINTER(_Config), POINTER(_Picture)),
            "WebPPictureFree": (POINTER(_Picture),),
            "WebPMemoryWriterInit": (POINTER(_Writer),),
            "WebPMemoryWriterClear": (POINTER(_Writer),),
        }
        for name, arguments in calls.items():
            getattr(lib, name).argtypes = arguments
        for name in ("WebPPictureFree", "WebPMemoryWriterInit", "WebPMemoryWriterClear"):
            getattr(lib, name).restype = None
    except (OSError, AttributeError):
        return None
    if version() >> 16 != 1 or not lib.WebPConfigInitInternal(byref(_Config()), 0, 75.0, ABI):
        return None
    return lib


def encode(image: Image.Image, quality: int) -> bytes:
    """Encode an image as lossy WebP of `quality` 1 to 100."""
    lib = library()
    if lib is None or image.mode != "RGB" or max(image.size) > LONGEST:
        return _encode_with_pillow(image, quality)
    config, picture, writer = _Config(), _Picture(), _Writer()
    pixels = np.asarray(image)
    if not lib.WebPConfigInitInternal(byref(config), 0, quality, ABI):
        return _encode_with_pillow(image, quality)
    config.method = METHOD
    lib.WebPPictureInitInternal(byref(picture), ABI)
    picture.width, picture.height = image.size
    lib.WebPMemoryWriterInit(byref(writer))
    picture.writer = ctypes.cast(lib.WebPMemoryWrite, c_void_p)
    picture.custom_ptr = ctypes.addressof(writer)
    try:
        done = lib.WebPPictureImportRGB(byref(picture), pixels.ctypes.data, pixels.strides[0])
        done = done and lib.WebPEncode(byref(config), byref(picture))
        return ctypes.string_at(writer.mem, writer.size) if done else _encode_with_pillow(image, quality)
    finally:
        lib.WebPMemoryWriterClear(byref(writer))
        lib.WebPPictureFree(byref(picture))


def _encode_with_pillow(image: Image.Image, quality: int) -> bytes:
    with io.BytesIO() as buffer:
        image.save(buffer, "WEBP", quality=quality, method=METHOD)
        return buffer.getvalue()
