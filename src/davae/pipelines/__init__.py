"""A pipeline in, a pipeline out: upgrade, load, adapt, sample, publish, import."""
