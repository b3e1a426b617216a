"""Waits, and says in the server's log when its request was cancelled; run by a real Triton's Python backend."""

import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self._wait(request) for request in requests]

    def _wait(self, request):
        wanted = float(pb_utils.get_input_tensor_by_name(request, "SECONDS").as_numpy()[0])
        began = time.monotonic()
        pb_utils.Logger.log_info(f"patience {request.request_id()} started")
        while (waited := time.monotonic() - began) < wanted:
            if request.is_cancelled():
                pb_utils.Logger.log_info(f"patience {request.request_id()} cancelled")
                error = pb_utils.TritonError("cancelled", pb_utils.TritonError.CANCELLED)
                return pb_utils.InferenceResponse(output_tensors=[], error=error)
            time.sleep(0.02)
        pb_utils.Logger.log_info(f"patience {request.request_id()} finished")
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("WAITED", np.array([waited], np.float32))])
