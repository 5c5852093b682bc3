"""A functional copy of the graph, made to be read, and what its softmaxes are."""
