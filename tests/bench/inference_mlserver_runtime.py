"""The digits network inside MLServer: a runtime that calls ONNX Runtime, as its documentation says to write one.

MLServer's own interpreter imports it from a model's folder, where it can import nothing of this project. The session
has the settings of the embedded backend's.
"""

import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Digits(MLModel):
    """`parameters.uri` names the file; one input, and outputs named and shaped as the embedded backend's."""

    async def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            self.settings.parameters.uri, options, providers=["CPUExecutionProvider"]
        )
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        # Called at once on the event loop: for a network this small a thread costs more than it gains.
        pixels = NumpyCodec.decode_input(payload.inputs[0])
        label, probabilities = self._session.run(["label", "probabilities"], {"pixels": pixels})
        outputs = [
            NumpyCodec.encode_output("label", label.reshape(-1, 1)),
            NumpyCodec.encode_output("probabilities", probabilities),
        ]
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=outputs)
