"""FedGCS's generator of sets of clients, as mathematics alone: records, networks and search among embeddings."""
