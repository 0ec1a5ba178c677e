"""A pause at the end of a process, for whatever of this package issues collectives: importing it is enough."""

from __future__ import annotations

import atexit
import time

_SECONDS = 0.1  # threads need microseconds, once a loaded machine runs them


@atexit.register  # on import, so it runs after the functions that scripts register
def _let_threads_finish() -> None:
    """Give gloo's threads the interpreter once more before it is torn down, where they would abort the process.

    They need it to drop the tensors of the last collectives. Otherwise the process ends with "terminate called without
    an active exception" and exit code -6, and the launcher ends ranks that may still be saving. After
    ``destroy_process_group`` the threads still run while a mesh or a :class:`VocabShard` refers to their group.
    """
    time.sleep(_SECONDS)
