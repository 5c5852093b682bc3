"""Reading the graph that Dynamo gives: its values, memory, writes and regions."""
