"""Fill a gap of accelerate on CPUs where ``CLIENTS_CPU_BACKEND`` is set, so that DeepSpeed's own AutoTP can be compared.

Accelerate knows no backend for DeepSpeed on a CPU: every process takes itself for the only one.
"""

import os

if os.environ.get("CLIENTS_CPU_BACKEND") and "LOCAL_RANK" in os.environ:
    from accelerate.state import DistributedType, PartialState

    _original = PartialState._prepare_backend

    def _prepare_backend(self, *args, **kwargs):
        found, kind = _original(self, *args, **kwargs)
        return ("gloo", kind) if found is None and kind == DistributedType.NO else (found, kind)

    PartialState._prepare_backend = _prepare_backend
