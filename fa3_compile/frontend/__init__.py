"""From a Dynamo graph to attention specs, and back into the graph.

dynamo    reading Dynamo's graph: its values, memory, writes and regions
expand    calls that hold an attention, written out in plain tensor operations
shadow    a functional copy of the graph, made to be read, and its softmaxes
lift      what is element [index] of a node? an expression
detect    the two products of an attention, and what lies between and around them
layout    which axes are b, h, q, kv and d; the spec in those terms
rewrite   whether a region may be taken, and the operator in its place
reasons   why something that looks like attention is left alone

`region.py` is what they hand on: one attention, in the terms that a rewrite needs.
"""
