"""Measuring speed: random packed layers, candidates called in turn, and what it means for whole models.

``hf-spqr bench`` and the scripts in ``benchmarks/`` stand on this; nothing else does.
"""
