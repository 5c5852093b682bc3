"""From a Dynamo graph to attention specs, and back into the graph."""
