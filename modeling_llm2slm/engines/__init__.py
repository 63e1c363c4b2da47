"""Engines that compute a model: PyTorch, OpenVINO, ONNX Runtime; and quantization."""
