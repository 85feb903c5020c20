"""Batch sizes that fit into the memory of a device, kept by the driver: they outlive the worker that learnt them."""

from collections.abc import Mapping

from pipeline.engine.tasks import MemoryKey, Task, memory_key


class BatchSizes:
    """Batch sizes that fit, by what the memory of a task depends on and by the name of the device.

    They are forgotten at the end of a run: the next one may find more memory.
    """

    def __init__(self) -> None:
        self._sizes: dict[MemoryKey, dict[str, int]] = {}

    def of(self, task: Task) -> Mapping[str, int]:
        """Return the batch sizes that fit for tasks like `task`, by device; empty if none was too large."""
        return self._sizes.get(memory_key(task), {})

    def note(self, task: Task, batch: tuple[str, int] | None) -> None:
        """Note that batches of `batch` (device, number of images) fit for tasks like `task`, and larger ones do not."""
        if batch is not None:
            device, size = batch
            sizes = self._sizes.setdefault(memory_key(task), {})
            sizes[device] = min(size, sizes.get(device, size))
