"""Turns text and generated documents into token shards, and loads them in batches."""
