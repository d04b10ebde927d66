"""Measuring on this machine: random packed layers, what they compute, how fast, and what it means for whole models.

``hf-spqr bench``, ``hf-spqr doctor`` and the scripts in ``benchmarks/`` stand on this; nothing else does.
"""
