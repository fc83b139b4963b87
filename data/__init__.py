"""Text and generated documents to token shards, and the loader that reads them. Imports nothing else of this repository."""
