"""WebP by the library that Pillow brings, called with RGB as it is.

Pillow hands libwebp one 32-bit word a pixel, which libwebp then turns into the YUV 4:2:0 that it encodes; given
24-bit RGB it does so with SIMD. The bytes are alike, and come a fifth to a third sooner. Where Pillow's library
cannot be called from here, Pillow encodes.

Source: webp/encode.h of libwebp 1.x, whose layout of these structures is fixed by the major number of its ABI.
"""

import ctypes
import functools
import importlib.util
import io
from ctypes import POINTER, Structure, byref, c_float, c_int, c_size_t, c_uint32, c_void_p

import numpy as np
from PIL import Image

# Version of the ABI: the major number, which must be the library's, in the higher byte.
ABI = 0x020F
# The fastest, for a site may have a hundred thousand pictures.
METHOD = 0
# The longest side that the format holds.
LONGEST = 16383


class _Config(Structure):
    """`WebPConfig`; what is not set here keeps the value that the library gives it."""

    _fields_ = (
        ("lossless", c_int),
        ("quality", c_float),
        ("method", c_int),
        ("rest", c_uint32 * 61),  # 26 fields at present, and room for more
    )


class _Picture(Structure):
    """`WebPPicture`: its input as YUV or ARGB, and where its bytes go."""

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
    """`WebPMemoryWriter`: bytes that grow."""

    _fields_ = (("mem", c_void_p), ("size", c_size_t), ("max_size", c_size_t), ("pad", c_uint32))


@functools.cache
def library() -> ctypes.CDLL | None:
    """Pillow's libwebp, or None where it has none that can be called, or one of another ABI."""
    found = importlib.util.find_spec("PIL._webp")
    if found is None or found.origin is None:
        return None
    try:
        lib = ctypes.CDLL(found.origin)  # symbols of the libraries that it needs are found through it
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
    return lib if version() >> 16 == 1 and lib.WebPConfigInitInternal(byref(_Config()), 0, 75.0, ABI) else None


def encode(image: Image.Image, quality: int) -> bytes:
    """A picture as lossy WebP of `quality` 1 to 100."""
    lib = library()
    if lib is None or image.mode != "RGB" or max(image.size) > LONGEST:
        return _by_pillow(image, quality)
    config, picture, writer = _Config(), _Picture(), _Writer()
    pixels = np.asarray(image)
    if not lib.WebPConfigInitInternal(byref(config), 0, quality, ABI):
        return _by_pillow(image, quality)
    config.method = METHOD
    lib.WebPPictureInitInternal(byref(picture), ABI)
    picture.width, picture.height = image.size
    lib.WebPMemoryWriterInit(byref(writer))
    picture.writer = ctypes.cast(lib.WebPMemoryWrite, c_void_p)
    picture.custom_ptr = ctypes.addressof(writer)
    try:
        done = lib.WebPPictureImportRGB(byref(picture), pixels.ctypes.data, pixels.strides[0])
        done = done and lib.WebPEncode(byref(config), byref(picture))
        return ctypes.string_at(writer.mem, writer.size) if done else _by_pillow(image, quality)
    finally:
        lib.WebPMemoryWriterClear(byref(writer))
        lib.WebPPictureFree(byref(picture))


def _by_pillow(image: Image.Image, quality: int) -> bytes:
    with io.BytesIO() as buffer:
        image.save(buffer, "WEBP", quality=quality, method=METHOD)
        return buffer.getvalue()
