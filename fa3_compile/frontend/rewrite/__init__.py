"""The region's place in Dynamo's graph: whether it may be taken, and the operator for it."""
