"""Errors of a GPU, as opposed to errors of the work on it: too little memory, and a context that is lost.

PyTorch has a class for the first of its own allocator only. The driver, its libraries and Triton report the same by
texts, and so does whatever ends the context of a process.
"""

import torch

# Parts of the messages of errors that a smaller batch may avoid, in lower case. "CUDA error: out of memory" is one of
# the driver: the context still works.
_MEMORY_TEXTS = ("out of memory", "alloc_failed")

# Parts of the messages of errors after which a context may not be usable any more, in lower case.
_LOST_TEXTS = (
    "cuda error",
    "cuda driver error",
    "hip error",
    "triton error [cuda]",
    "cublas_status_execution_failed",
    "cudnn_status_execution_failed",
    "cufft_exec_failed",
    "device-side assert",
    "illegal memory access",
    "misaligned address",
    "unspecified launch failure",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device had too little memory for the work, so that a smaller batch may succeed."""
    return isinstance(error, torch.OutOfMemoryError) or _has_text(error, _MEMORY_TEXTS)


def is_device_lost(error: BaseException) -> bool:
    """Return whether the context of this process on its GPU is lost: everything that follows would fail, too.

    The same texts are used for errors that leave the context intact, such as a kernel that was not compiled for the
    GPU: while the GPU still answers, it is not lost.
    """
    if is_out_of_memory(error) or not _has_text(error, _LOST_TEXTS):
        return False
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError as failure:
        return not is_out_of_memory(failure)
    return False


def is_device_failure(error: BaseException) -> bool:
    """Return whether an error says nothing about the code that raised it, because memory or the device failed."""
    return is_out_of_memory(error) or is_device_lost(error)


def _has_text(error: BaseException, texts: tuple[str, ...]) -> bool:
    """Return whether the message of an error of PyTorch, all of which are `RuntimeError`, contains one of `texts`."""
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(text in message for text in texts)
