"""The feature cache: content-addressed rows in immutable, checksummed safetensors shards.

It knows keys and rows, not models, and imports no torch. docs/cache-format.md specifies the bytes.
"""
