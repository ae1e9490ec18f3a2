"""Features of images: computed once by the frozen prefix, kept in the cache, read back."""
