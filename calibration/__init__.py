"""What precision each part of a graph computes in, decided and written into the ONNX itself."""
