"""Every input comes back as it was, whatever its shape; run by a real Triton's Python backend."""

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        outputs = [pb_utils.Tensor(f"{tensor.name()}_OUT", tensor.as_numpy()) for tensor in request.inputs()]
        return pb_utils.InferenceResponse(output_tensors=outputs)
