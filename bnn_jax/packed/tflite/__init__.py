"""Networks as .tflite files for Larq Compute Engine."""
