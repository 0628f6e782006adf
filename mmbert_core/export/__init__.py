"""Export of a model folder to ONNX or PyTorch's .pt2, with a script that scores a CSV without this package.

Modules, each importing only those before it: example, exporter.
"""
