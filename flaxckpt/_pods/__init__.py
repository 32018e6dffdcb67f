"""Saves of several processes: agreed on, and each writes its shards."""
