"""tlcli: transfer learning on images, with the frozen part of the work done exactly once."""

__version__ = "0.2.0"
