"""One run, whatever it trains: recipe, processes, files that are written whole, record, checkpoint."""
