"""The sum and the difference of two vectors."""


class Model:
    def execute(self, batch):  # type: ignore[no-untyped-def]
        """{"INPUT0": [n, 16], "INPUT1": [n, 16]} -> {"OUTPUT0": [n, 16], "OUTPUT1": [n, 16]}, all INT32."""
        first, second = batch["INPUT0"], batch["INPUT1"]
        return {"OUTPUT0": first + second, "OUTPUT1": first - second}
