"""The whole job, from a folder of images to an upgraded pipeline: its recipe, its estimate, its run, its page."""
