"""Source text -> something that runs, and the cache on disk."""
