"""A server for pipelines: requests as OpenAI clients send them, a queue, a worker for each device, and a page."""
