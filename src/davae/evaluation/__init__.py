"""Measurements on images, reconstructions and generated sets."""
