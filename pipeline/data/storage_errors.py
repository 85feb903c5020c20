"""Errors of the storage that images are read from, as opposed to properties of an image.

A file server that fails over, a lost mount or a worker without free file handles says nothing about an image. Such
errors are retried, then fail the task; they are never recorded as the reason why an image cannot be read.
"""

import errno
import re

# Errors of the device, the network, the server or this process. All others, such as EINVAL of a seek to an offset that
# a broken file names, may be properties of the file.
_NAMES = (
    "EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EINTR", "EBUSY", "ENOMEM", "EMFILE", "ENFILE", "ENODEV", "ENXIO",
    "ENETDOWN", "ENETUNREACH", "ENETRESET", "ECONNABORTED", "ECONNRESET", "ECONNREFUSED", "ENOTCONN", "ESHUTDOWN",
    "EHOSTDOWN", "EHOSTUNREACH", "EREMOTEIO", "ENOLINK", "ECOMM", "EPROTO", "ENOKEY", "EKEYEXPIRED", "EKEYREVOKED",
    "EUCLEAN", "ENODATA",
)  # fmt: skip
STORAGE_ERRNOS = frozenset(getattr(errno, name) for name in _NAMES if hasattr(errno, name))

# Of these, the errors of a disk or of a file server that has gone.
_DEVICE_ERRNOS = frozenset(
    getattr(errno, name)
    for name in ("EIO", "ESTALE", "ENODEV", "ENXIO", "EREMOTEIO", "EHOSTDOWN", "EUCLEAN", "ESHUTDOWN")
    if hasattr(errno, name)
)


class StorageError(OSError):
    """An image could not be read because of its storage; the image itself may be in order."""


def is_storage_error(error: BaseException) -> bool:
    """Return whether an exception is an error of the storage. Decoders raise `OSError` without a number."""
    return isinstance(error, StorageError) or (isinstance(error, OSError) and error.errno in STORAGE_ERRNOS)


def is_device_error(error: BaseException) -> bool:
    """Return whether a disk or file server failed; HDF5 reports the number only in the text of its errors."""
    if isinstance(error, OSError) and error.errno in _DEVICE_ERRNOS:
        return True
    return isinstance(error, OSError | RuntimeError) and any(f"errno = {n}," in str(error) for n in _DEVICE_ERRNOS)


def names_storage_error(reason: str) -> bool:
    """Return whether a recorded reason is an error of the storage: earlier versions recorded those, too."""
    match = re.match(r"unreadable: \w+: \[Errno (\d+)\]", reason)
    return match is not None and int(match[1]) in STORAGE_ERRNOS
