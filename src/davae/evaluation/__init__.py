"""Measurements on pictures, reconstructions and generated sets."""
