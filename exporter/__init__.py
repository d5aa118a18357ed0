"""The torch side: read a checkpoint, wrap a family's modules, export them to ONNX, compile them for a backend."""
