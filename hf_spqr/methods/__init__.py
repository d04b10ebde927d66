"""Quantization methods: pure functions from a weight and a Hessian to a logical packed weight."""
