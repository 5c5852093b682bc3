"""From a spec to code that computes it.

choose    which kernel family computes an attention, and why the others do not
kernels   the families, a file each
printers  expressions of a spec as source text
render    a spec as the source of whole kernels
tiles     tile configurations: what fits, what to try first, what was measured
binaries  source text -> something that runs, and the cache on disk
launch    kernels launched at the least cost for the host
"""
