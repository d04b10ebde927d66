"""Packed weight formats: dataclasses of tensors, and pure functions that pack, unpack and count them.

The bytes are specified in docs/format.md. Nothing here knows kernels, modules or files.
"""
