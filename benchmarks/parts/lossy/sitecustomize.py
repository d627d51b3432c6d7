"""On the path of the coordinator's NVFlare process: a share of all answers from silos is lost (FEDLM_LOSS)."""

import os
import random
import sys

if any("server_train" in word for word in sys.orig_argv):
    from fedlm.federation.engines.flare import site
    from fedlm.federation.engines.flare.session import UnreachableError

    _deliver, _draw = site.CoordinatorRelay.send, random.Random()

    def _send(self: site.CoordinatorRelay, silo: str, message: bytes, timeout: float) -> bytes:
        answer = _deliver(self, silo, message, timeout)
        if _draw.random() < float(os.environ["FEDLM_LOSS"]):
            raise UnreachableError("its answer was lost")
        return answer

    site.CoordinatorRelay.send = _send  # type: ignore[method-assign]
