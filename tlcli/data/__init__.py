"""From files on disk to labelled, split, decoded and resized images."""
