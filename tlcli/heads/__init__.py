"""Classifiers of features, and how one is chosen."""
