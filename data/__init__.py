"""Text and generated documents to token shards, and the loader that reads them."""
