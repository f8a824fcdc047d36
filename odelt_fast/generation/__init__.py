"""Many images by their indices: divided between processes, in shards, gone on with after a kill."""
