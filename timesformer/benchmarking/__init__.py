# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: what is timed against what, how, and what a run records. `timesformer benchmark` and benchmarks/ use it.

shapes.py   sizes of one call, and the work it takes
peers.py    attention as its users call it today; layouts.py: the rearrangements that takes
problem.py  a problem: rows that do the same task, each checked against float64 before it is timed
core.py  half_block.py  block.py  model.py  train.py     the levels
timing.py   interleaved rounds, cold and warm caches, CUDA events and graphs
cost.py     memory, what a forward saves for its backward, determinism, the largest batch
machine.py  the machine's facts, and the copy and matmul rates that it reaches
run.py      measures problems and records every row at once; record.py: the file
plots.py    pictures
"""
